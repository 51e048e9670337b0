"""A small random Llama on disk, what it is calibrated on, and how good its quantized weights are.

    make peers

builds an environment with the packages that `sapq_triton.patch` knows, and runs these tests in it.
Without a package its tests are skipped.
"""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.pipelines import DISTRIBUTIONS, Weights
from sapq_triton import layer_error

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on two cores

HIDDEN, LAYERS, VOCABULARY = 128, 2, 256
GroupedError = Callable[[Weights], dict[str, float]]


def needs(name: str) -> None:
    """Skip where a package is missing."""
    try:
        version(DISTRIBUTIONS.get(name, name))
    except PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTIONS.get(name, name)} is not installed: make peers")


@pytest.fixture(autouse=True)
def poison_uninitialized_memory() -> None:
    """Not here: these packages compile, and a compiler allocates in ways of its own."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write logs into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("llama")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=256, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def calibration() -> Tensor:
    """int64 [16, 64]"""
    return torch.randint(3, VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def errors(folder: Path, calibration: Tensor) -> GroupedError:
    """Relative layer errors of quantized weights, by name; Hessians of the original model."""
    from transformers import LlamaForCausalLM

    from sapq_triton.calibrate import collect_hessians

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hessians = collect_hessians(
        model, list(calibration[:, None]), forward=lambda m, ids: m(input_ids=ids)
    )

    def measure(weights: Weights) -> dict[str, float]:
        found = {}
        for name, quantized in weights.items():
            weight, hessian = model.get_submodule(name).weight.detach(), hessians[name][0]
            energy = layer_error(weight, torch.zeros_like(weight), hessian)
            found[name] = (layer_error(weight, quantized, hessian) / energy).item()
        assert len(found) == 7 * LAYERS
        return found

    return measure
