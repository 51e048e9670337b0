"""Quantize a language model from a folder into a folder: Hugging Face files, a text, a format."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from .formats import find_format, save
from .formats.folder import CONFIG, optional, read_json, refuse_foreign
from .formats.layer import Outline
from .preset import PresetName
from .quantize import quantize
from .report import Report
from .spec import Order, QuantSpec
from .targets import find_targets

SEQUENCES_PER_BATCH = 8
DTYPES = ("auto", "float32", "float16", "bfloat16")
COMPANIONS = (
    "added_tokens", "chat_template", "generation_config", "merges", "special_tokens_map",
    "spiece", "tokenizer", "vocab", "LICENSE", "NOTICE",
)  # fmt: skip


def quantize_folder(
    source: str | Path,
    target: str | Path,
    calibration: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    format: str = "gptq",
    preset: PresetName = "best",
    order: Order | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    skip: Iterable[str] = (),
    output_layer: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
) -> Report:
    """Load, calibrate on a text, quantize, and save beside the tokenizer's files.

    source: folder of a causal language model of transformers, in safetensors, with its tokenizer.
    target: folder to write, as `save` does. calibration: text in UTF-8, of which `samples`
    sequences of `sequence_length` tokens are drawn, without overlap, by `seed`.
    bits, group_size, symmetric: as in QuantSpec; scales are float16, or for "compressed-tensors"
        of the dtype of the model. format: as in `save`. preset, order: as in `quantize`.
    skip: glob patterns of layer names. output_layer: quantize also the layer that makes logits.
    dtype: one of "auto" (as stored), "float32", "float16", "bfloat16".

    ValueError, before anything is solved, for what cannot be read, drawn, or saved.
    """
    source, target, chosen = Path(source), Path(target), find_format(format)
    spec = QuantSpec(bits, group_size, symmetric, scale_dtype="float16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} is not a model folder: it has no {CONFIG}")
    if "quantization_config" in read_json(source / CONFIG):
        raise ValueError(f"{source} is quantized already")
    refuse_foreign(target.resolve())
    text = read_text(Path(calibration))

    transformers = optional("transformers")
    local: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **local)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    sequences = draw_sequences(tokens, samples, sequence_length, seed, str(calibration))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, **local
    ).to(device)
    _check_tokens(model, sequences)

    if format == "compressed-tensors":
        own: Any = str(model.dtype).removeprefix("torch.")
        spec = replace(spec, scale_dtype=own)
    patterns = [*skip, *([] if output_layer else _output_layer(model))]
    for goal in find_targets(model, spec, patterns, {})[0].values():
        chosen.check(Outline.of(goal.name, goal.module, goal.spec))

    def forward(_: nn.Module, batch: Tensor) -> object:
        # the logits of all tokens would be the largest tensor of all
        body = model if output_layer else model.base_model
        return body(input_ids=batch, use_cache=False)

    batches = sequences.split(SEQUENCES_PER_BATCH)
    report = quantize(
        model, batches, spec, skip=patterns, preset=preset, order=order, forward=forward, pack=True
    )
    companions = [path for path in sorted(source.iterdir()) if path.name.startswith(COMPANIONS)]
    save(model, target, format, report=report, files=companions)
    return report


def read_text(path: Path) -> str:
    """ValueError for a file that is missing, empty, or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def draw_sequences(tokens: Tensor, samples: int, length: int, seed: int, name: str) -> Tensor:
    """int64 [n]  ->  int64 [samples, length], in the order of the text, without overlap

    ValueError where there are too few; name: of the text, for the message.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and sequence length must be positive, got {samples}, {length}")
    there = len(tokens) // length
    if there < samples:
        fewer = f", fewer samples (at most {there})" if there else ""
        raise ValueError(
            f"{name} has {len(tokens)} tokens, which make {there} sequences of {length}, and "
            f"{samples} were asked for: give a longer text{fewer}, or shorter sequences"
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    return tokens[: there * length].unflatten(0, (there, length))[order[:samples].sort().values]


def _check_tokens(model: Any, sequences: Tensor) -> None:
    """What would be an IndexError deep in the model, or nonsense."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(sequences.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {int(sequences.max())}, and the model has embeddings for "
            f"{vocabulary}: they do not belong together"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and sequences.shape[1] > limit:
        raise ValueError(
            f"sequences of {sequences.shape[1]} tokens, but the model has {limit} positions"
        )


def _output_layer(model: Any) -> list[str]:
    """Name of the layer that makes logits, if it is one that could be quantized."""
    output = model.get_output_embeddings()
    return [name for name, module in layers.find_layers(model).items() if module is output]
