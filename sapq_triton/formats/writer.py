"""Write a model with packed layers, and believe nothing until it is read back."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import Experts
from ..packed import BUFFERS, PackedWeight
from ..report import Report
from ..report_files import REPORT_FILES, report_files
from .folder import (
    CONFIG,
    INDEX,
    MANIFEST,
    MANIFEST_VERSION,
    OLD_CONFIG,
    WEIGHTS,
    Tensors,
    program,
    raw,
    read_manifest,
    refuse_foreign,
    replaced,
    sha256,
    tensor_sha256,
    write_json,
    write_manifest,
    write_tensors,
)
from .gptq import GPTQ
from .layer import Format, Outline, unpacked_linear
from .reader import Stored, find_format
from .sapq import Sapq


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "sapq",
    *,
    report: Report | None = None,
    files: Iterable[str | Path] = (),
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model with packed layers, `quantize(..., pack=True)`, as safetensors.

    format: "sapq", of this project, holds everything. "gptq" (version 1, read by vLLM, GPTQModel,
        transformers), "gptq_v2" (GPTQModel) and "compressed-tensors" (pack-quantized: vLLM,
        transformers) hold linear layers. For the first two quantize with scale_dtype="float16", or
        "bfloat16" if the model is to run in that; for the last with the dtype of the model.
    report: of `quantize`; report.json and report.html then lie beside the model, and the manifest
        keeps the error of each layer.
    files: further ones to copy into the folder: tokenizer, generation_config.json.
    max_shard_size: in bytes or as "5GB", of one safetensors file.

    All tensors of the model are written, those of layers that are not packed as they are; tied ones
    once. config.json is that of a transformers model, with a quantization_config; sapq.json, the
    manifest, has the specs, the checksums and the errors. Everything is read back and compared, to
    the bit, before the folder takes its place in one step: until then, and whenever anything is
    raised, a folder that was there stays as it was.

    ValueError for what a format cannot hold, naming one that can, for a single path as files, and
    for a folder that holds files of others.
    """
    target, chosen = Path(folder), find_format(format)
    if isinstance(files, str | Path):
        raise ValueError(f"files must be an iterable of paths, got {files!r}: pass [{files!r}]")
    layers = {name: Outline.of(name, module) for name, module in _packed(model).items()}
    if not layers:
        raise ValueError("the model has no packed layer: quantize(..., pack=True)")
    check(chosen, model, layers)
    refuse_foreign(target.resolve())
    content = config(chosen, model, layers)
    tensors, others = _encode(chosen, model, layers)
    with replaced(target) as partial:
        write_tensors(partial, tensors, max_shard_size)
        _write_options(partial, chosen, content, files, report)
        manifest = _manifest(chosen, layers, tensors, report)
        manifest["files"] = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        write_manifest(partial, manifest)
        _read_back(partial, model, layers, others)


def save_part(model: nn.Module, folder: Path, format: str, report: Report | None) -> None:
    """Write a part of a model, which may have no packed layer, for `join`; as careful as `save`."""
    chosen = find_format(format)
    layers = {name: Outline.of(name, module) for name, module in _packed(model).items()}
    tensors, others = _encode(chosen, model, layers)
    with replaced(folder) as partial:
        write_tensors(partial, tensors, max_shard_size=2**60)
        if layers:
            _write_options(partial, chosen, config(chosen, model, layers))
        manifest = _manifest(chosen, layers, tensors, report)
        manifest["files"] = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        write_manifest(partial, manifest)
        _read_back(partial, model, layers, others)


def join(
    parts: Sequence[Path],
    folder: Path,
    format: str,
    content: Mapping[str, Any],
    files: Iterable[str | Path],
    report: Report,
) -> None:
    """One folder of the parts of a model, each of which becomes a file of weights.

    content: of config.json, see `config`. files, report: as in `save`.
    """
    chosen = find_format(format)
    manifest = _manifest(chosen, {}, {}, None)
    with replaced(folder) as partial:
        index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
        hashes: dict[str, str | None] = {}
        for number, part in enumerate(parts, 1):
            own, tensors = read_manifest(part), Tensors.of(part)
            name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            file = name if len(parts) > 1 else WEIGHTS
            _link(part / WEIGHTS, partial / file)
            hashes[file] = own["files"][WEIGHTS]
            index["weight_map"] |= dict.fromkeys(tensors.files, file)
            index["metadata"]["total_size"] += tensors.bytes_of(tensors.files)
            manifest["layers"] |= own["layers"]
            manifest["tensors"] |= own["tensors"]
        if len(parts) > 1:
            write_json(partial / INDEX, index)
        _write_options(partial, chosen, content, files, report)
        written = {path.name for path in partial.iterdir()} - hashes.keys()
        hashes |= {name: _digest(partial / name) for name in written}
        manifest["files"] = dict(sorted(hashes.items()))
        write_manifest(partial, manifest)
        stored = Stored.of(partial)
        stored.tensors.check(stored.manifest)


def _link(file: Path, target: Path) -> None:
    """Both names for one file, or a copy where the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _write_options(
    folder: Path,
    chosen: Format,
    content: Mapping[str, Any],
    files: Iterable[str | Path] = (),
    report: Report | None = None,
) -> None:
    """Everything but the weights and the manifest."""
    write_json(folder / CONFIG, content)
    if isinstance(chosen, GPTQ):  # where older programs look
        write_json(folder / OLD_CONFIG, content["quantization_config"])
    for name, text in (report_files(report) if report else {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    for file in map(Path, files):
        if (folder / file.name).exists() or file.name == MANIFEST:
            raise ValueError(f"{file} would take the place of a file of the model")
        shutil.copyfile(file, folder / file.name)


def _digest(file: Path) -> str | None:
    """For the manifest; of no report, which has the times of the run in it."""
    return None if file.name in REPORT_FILES else sha256(file)


def _packed(model: nn.Module) -> dict[str, PackedWeight]:
    """By name; of layers that share their codes the first one."""
    found: dict[int, tuple[str, PackedWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            found.setdefault(id(module.qweight), (name, module))
    return dict(found.values())


def check(chosen: Format, model: nn.Module, layers: Mapping[str, Outline]) -> None:
    """ValueError for what a format cannot hold; layers: those that are, or will be, packed."""
    for layer in layers.values():
        chosen.check(layer)
    if isinstance(chosen, Sapq):
        return
    # what follows has no place in files whose readers build the model by themselves
    alone = {id(model.get_submodule(name)) for name in layers}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and id(module) not in alone:
            raise ValueError(
                f"{name!r} shares its weight with another layer, which {chosen.name} cannot say: "
                "use format 'sapq'"
            )
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(
            f"programs that read {chosen.name} do not know these experts: use format 'sapq'"
        )
    if getattr(model, "_weight_conversions", None):
        raise ValueError(
            f"transformers renamed or merged tensors of this {type(model).__name__} while loading, "
            f"and programs that read {chosen.name} look for the old names: use format 'sapq'"
        )


def _encode(
    chosen: Format, model: nn.Module, layers: Mapping[str, Outline]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors by name, and those of them that are the same in every format."""
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}; files hold tensors only")
        if tensor.device.type == "meta":
            raise ValueError(f"{name!r} has no data (meta device)")
        state.setdefault(id(tensor), (name, tensor))  # tied tensors once, under the first name
    codes = {f"{layer.prefix}{buffer}" for layer in layers.values() for buffer in BUFFERS}
    others = {name: tensor for name, tensor in state.values() if name not in codes}
    encoded = {
        f"{layer.prefix}{suffix}": tensor
        for name, layer in layers.items()
        for suffix, tensor in chosen.encode(layer, model.get_submodule(name)).items()  # type: ignore[arg-type]
    }
    return {**others, **encoded}, others


def config(chosen: Format, model: nn.Module, layers: Mapping[str, Outline]) -> dict[str, Any]:
    """Content of config.json: of a transformers model, or only what the format says. layers: as in
    `check`.
    """
    content: dict[str, Any] = {}
    own: Any = getattr(model, "config", None)
    if hasattr(own, "to_json_string"):
        content = json.loads(own.to_json_string())
        dtype = str(model.dtype).removeprefix("torch.")
        content |= {"architectures": [type(model).__name__], "dtype": dtype}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((name for name, module in model.named_modules() if module is output), None)
    left = [name for name in unpacked_linear(model) if name not in layers]
    options = chosen.config(layers.values(), left, head)
    return {**content, "quantization_config": options}


def _manifest(
    chosen: Format,
    layers: Mapping[str, Outline],
    tensors: Mapping[str, Tensor],
    report: Report | None,
) -> dict[str, Any]:
    errors = {x.name: x.relative_error for x in report.layers} if report else {}
    return {
        "version": MANIFEST_VERSION,
        "writer": program(),
        "format": chosen.name,
        "layers": {
            name: {
                **layer.described(),
                **({"relative_error": errors[name]} if name in errors else {}),
            }
            for name, layer in layers.items()
        },
        "tensors": {name: tensor_sha256(tensor) for name, tensor in tensors.items()},
    }


def _read_back(
    folder: Path, model: nn.Module, layers: Mapping[str, Outline], others: Mapping[str, Tensor]
) -> None:
    """What lies in the folder is what the model holds, or RuntimeError: a fault of this program, or
    of the disk.
    """
    tensors = Tensors.of(folder)
    tensors.check(read_manifest(folder))
    if layers:
        _read_back_layers(folder, model, layers, others)
    elif tensors.files.keys() != others.keys():
        raise RuntimeError(f"{folder}: read back {[*tensors.files]}")
    for name, tensor in others.items():
        if not _same(tensor, tensors.take(name, tuple(tensor.shape), (tensor.dtype,))):
            raise RuntimeError(f"{folder}: {name!r} is not what was written")


def _read_back_layers(
    folder: Path, model: nn.Module, layers: Mapping[str, Outline], others: Mapping[str, Tensor]
) -> None:
    stored = Stored.of(folder)
    if stored.layers.keys() != layers.keys() or set(stored.others) != others.keys():
        raise RuntimeError(f"{folder}: read back {[*stored.layers]} and {stored.others}")
    for name, layer in stored.layers.items():
        module: Any = model.get_submodule(name)
        decoded, own = stored.format.decode(stored.tensors, layer), layers[name].spec
        if (layer.spec.bits, layer.groups, layer.spec.symmetric) != (
            own.bits, layers[name].groups, own.symmetric
        ):  # fmt: skip
            raise RuntimeError(f"{folder}: {name!r} was {own}, read back {layer.spec}")
        for buffer in BUFFERS:
            if not _same(getattr(module, buffer), decoded[buffer]):
                raise RuntimeError(f"{folder}: {buffer} of {name!r} is not what was written")


def _same(ours: Tensor | None, read: Tensor | None) -> bool:
    """To the bit; scales may be stored in another dtype that holds them exactly."""
    if ours is None or read is None:
        return ours is read
    ours = ours.detach().cpu()
    if ours.dtype != read.dtype:
        return torch.equal(ours.float(), read.float())
    if ours.shape != read.shape:
        return False
    return torch.equal(raw(ours), raw(read))
