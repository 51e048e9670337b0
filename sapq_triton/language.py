"""Quantize a language model from a folder into a folder: Hugging Face files, a text, a format."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from .blockwise import Blockwise, check_solve
from .experts import unfuse
from .formats import find_format
from .formats.folder import CONFIG, Tensors, optional, read_json, refuse_foreign, sha256
from .formats.job import Job, open_job
from .formats.layer import Outline
from .formats.writer import check, config, join
from .machine import environment
from .preset import PresetName
from .progress import layer_cost, progress_bar
from .ranks import Ranks
from .report import Report
from .spec import Order, QuantSpec
from .stream import Chain, find_chain
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
    spill: bool = False,
    restart: bool = False,
    distributed: bool = False,
    deterministic: bool = False,
    progress: bool = True,
) -> Report:
    """Load, calibrate on a text, quantize, and save beside the tokenizer's files.

    source: folder of a causal language model of transformers, in safetensors, with its tokenizer.
    target: folder to write, as `save` does. calibration: text in UTF-8, of which `samples`
    sequences of `sequence_length` tokens are drawn, without overlap, by `seed`.
    bits, group_size, symmetric: as in QuantSpec; scales are float16, or for "compressed-tensors"
        of the dtype of the model. format: as in `save`, but that "gptq" is symmetric here: it
        cannot hold zero points of 0, which a block may turn out to have when others are done.
    preset, order: as in `quantize`.
    skip: glob patterns of layer names. output_layer: quantize also the layer that makes logits.
    dtype: one of "auto" (as stored), "float32", "float16", "bfloat16".

    One block of the model after the other is copied to the device, quantized, and written; all else
    stays in the files until it is needed. A model that is no chain of blocks (`stream.find_chain`)
    is one part; its report says so.
    spill: keep what goes into a block on the disk, and of what is inside of it that of one batch,
        which runs anew for every layer. Else the former is in memory, and the latter, of all
        batches, on the device.
    restart: begin anew. Else a job that was interrupted, however, goes on after its last finished
        block, which `.TARGET.job` beside the target keeps, and comes to the same bytes.
    distributed, deterministic: as in `quantize`; source and target are folders that all processes
        see. A process that ends is an error in the others, and the job can go on.
    progress: a bar, or lines in a log.

    Returns the report, without codes and grids: those are in the files.

    ValueError, before anything is solved, for what cannot be read, drawn, or saved, and where an
    unfinished job had other options, inputs, or versions of this program and of PyTorch.
    """
    source, target, chosen = Path(source), Path(target), find_format(format)
    spec = QuantSpec(bits, group_size, symmetric, scale_dtype="float16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if isinstance(skip, str):
        raise ValueError(f"skip must be an iterable of patterns, got {skip!r}; pass [{skip!r}]")
    if format == "gptq" and not symmetric:
        raise ValueError(
            "format 'gptq' cannot hold a zero point of 0, which an asymmetric group may turn out "
            "to have: use format 'gptq_v2', 'compressed-tensors' or 'sapq', or symmetric=True"
        )
    check_solve(preset, order)
    check_device(device)
    _check_folders(source, target)
    skip = list(skip)
    model, sequences = _load(source, Path(calibration), samples, sequence_length, seed)
    if format == "sapq":
        unfuse(model)
    own = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if format == "compressed-tensors":
        scale_dtype: Any = str(own).removeprefix("torch.")
        spec = replace(spec, scale_dtype=scale_dtype)
    head = _output_layer(model)
    patterns = [*skip, *([] if output_layer else head)]
    goals, skipped = find_targets(model, spec, patterns, {})
    outlines = {
        goal.name: replace(Outline.of(goal.name, goal.module, goal.spec), dtype=own)
        for goal in goals.values()
    }
    check(chosen, model, outlines)
    ranks = Ranks(distributed)
    told: dict[str, Any] = dict(
        bits=bits, group_size=group_size, symmetric=symmetric, format=format, preset=preset,
        order=order, samples=samples, sequence_length=sequence_length, seed=seed, skip=skip,
        output_layer=output_layer, dtype=dtype, spill=spill, deterministic=deterministic,
        processes="any number" if deterministic else ranks.size,
    )  # fmt: skip
    begin = partial(_begin, source, target, Path(calibration), told, device, restart)
    with ranks.led(begin, lambda job: (job.folder, job.content), lambda said: Job(*said)) as job:
        batches = sequences.split(SEQUENCES_PER_BATCH)
        forward = _whole if output_layer else _body
        chain = find_chain(model, batches, forward, own, ranks.own(len(batches)))
        behind = outlines.keys() & set(head)
        if isinstance(chain, Chain) and not all(map(chain.holds, outlines.keys() - behind)):
            chain = "layers outside of its blocks are to be quantized"
        if isinstance(chain, str):
            model.to(own)
        content = config(chosen, model, outlines)
        costs = {
            name: layer_cost(*layers.matrix_shape(goal.module), sequences.numel())
            for name, goal in goals.items()
        }
        with progress_bar(costs, shown=progress and ranks.rank == 0) as advance:
            reports = Blockwise(
                model, chain, batches, forward, spec, format,
                options=dict(skip=patterns, preset=preset, order=order, replay=spill,
                             distributed=distributed, deterministic=deterministic),
                device=torch.device(device), dtype=own, in_memory=not spill, behind=bool(behind),
                job=job, ranks=ranks, advance=advance,
            ).run()  # fmt: skip
        told |= {"one part, because": chain if isinstance(chain, str) else None}
        told |= {"model": type(model).__name__}
        report = Report.of_parts(reports, skipped, told)
        if ranks.rank == 0:
            companions = [
                p for p in sorted(source.iterdir()) if p.is_file() and p.name.startswith(COMPANIONS)
            ]
            parts = [job.part(number) for number in range(len(reports))]
            join(parts, target, format, content, companions, report)
    return report


def check_device(device: str) -> None:
    """ValueError where a tensor cannot be, or has no data."""
    try:
        torch.zeros(1, device=torch.device(device)).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # each of some device
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'device must be one that this PyTorch computes on, as "cpu", got {device!r}: {reason}'
        ) from error


def _check_folders(source: Path, target: Path) -> None:
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} is not a model folder: it has no {CONFIG}")
    if "quantization_config" in read_json(source / CONFIG):
        raise ValueError(f"{source} is quantized already")
    refuse_foreign(target.resolve())
    Tensors.of(source)  # what is damaged is named here


def _load(
    source: Path, calibration: Path, samples: int, length: int, seed: int
) -> tuple[Any, Tensor]:
    """The model, as it is stored: its tensors stay in the files until somebody reads them; and
    sequences of the text, int64 [samples, length]"""
    text = read_text(calibration)
    transformers = optional("transformers")
    local: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **local)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    sequences = draw_sequences(tokens, samples, length, seed, str(calibration))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", use_safetensors=True, **local
    ).eval()
    _check_tokens(model, sequences)
    return model, sequences


def _begin(
    source: Path,
    target: Path,
    calibration: Path,
    options: dict[str, Any],
    device: str,
    restart: bool,
) -> AbstractContextManager[Job]:
    """The job, of which everything is known that its result depends on."""
    inputs = {path.name: sha256(path) for path in sorted(source.iterdir()) if path.is_file()}
    versions = {"transformers": optional("transformers").__version__}
    about = {
        "options": options,
        "inputs": inputs,
        "calibration": sha256(calibration),
        "environment": environment(torch.device(device)) | versions,
    }
    return open_job(target, about, restart)


def _whole(model: nn.Module, batch: Tensor) -> object:
    return model(input_ids=batch, use_cache=False)


def _body(model: nn.Module, batch: Tensor) -> object:
    """Without logits: those of all tokens would be the largest tensor of all."""
    body: Any = model.base_model
    return body(input_ids=batch, use_cache=False)


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
