"""Read a folder, ours or another program's, into a model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers, packed
from ..experts import unfuse
from ..packed import PackedWeight, to_packed
from .compressed_tensors import CompressedTensors
from .folder import CONFIG, GENERATION, OLD_CONFIG, Tensors, optional, read_json, read_manifest
from .gptq import GPTQ
from .layer import LINEAR, Format, Outline
from .sapq import Sapq

ALL: tuple[Format, ...] = (
    Sapq(), GPTQ("gptq", 1), GPTQ("gptq_v2", 0), CompressedTensors()
)  # fmt: skip
FORMATS = tuple(known.name for known in ALL)


def find_format(name: object) -> Format:
    for known in ALL:
        if known.name == name:
            return known
    raise ValueError(f"format must be one of {FORMATS}, got {name!r}")


@dataclass(frozen=True)
class Stored:
    """A folder as it lies on the disk. ValueError for one that cannot be read.

    layers: the packed ones by name. manifest: what `save` noted; empty for others' folders.
    """

    format: Format
    tensors: Tensors
    layers: Mapping[str, Outline]
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> "Stored":
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        manifest, config = read_manifest(folder), _quantization_config(folder)
        known = find_format(manifest.get("format") or _format_name(folder, config))
        tensors = Tensors.of(folder)
        try:
            outlines = known.outlines(tensors, config, manifest)
        except (AttributeError, KeyError, OverflowError, TypeError, re.error) as error:
            raise ValueError(f"{folder}: {known.name} options are damaged: {error!r}") from None
        if not outlines:
            raise ValueError(f"{folder} has no quantized layer")
        return cls(known, tensors, {layer.name: layer for layer in outlines}, manifest)

    @property
    def others(self) -> list[str]:
        """Names of the tensors that belong to no packed layer's codes."""
        owned = set().union(*map(self.format.owned, self.layers.values()))
        return [name for name in self.tensors.files if name not in owned]


def _quantization_config(folder: Path) -> Mapping[str, Any]:
    """Of config.json, or of the file of its own that older programs wrote for GPTQ."""
    found = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if "quantization_config" in found:
        content: Any = found["quantization_config"]
        if not isinstance(content, dict):
            raise ValueError(f"{folder / CONFIG}: quantization_config is no object: {content!r}")
        return content
    alone = folder / OLD_CONFIG
    return {"quant_method": "gptq", **read_json(alone)} if alone.exists() else {}


def _format_name(folder: Path, config: Mapping[str, Any]) -> object:
    if not config:
        raise ValueError(f"{folder} is not quantized: neither sapq.json nor a quantization_config")
    method = config.get("quant_method")
    if method == "gptq":
        return config.get("checkpoint_format") or config.get("format") or "gptq"
    return method


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a folder that `save` wrote, or GPTQ and compressed-tensors folders of other programs.

    model: its layers become packed ones, in place, and all its tensors are read from the folder.
        None: transformers builds it from config.json, in evaluation mode, on the CPU.

    ValueError for files that are damaged, or were changed after `save` wrote them, for tensors
    that are missing, left over, or not as the model has them, and for options that packed layers
    do not hold: groups in the order of activations, quantized activations. The model is then as it
    was. Another dtype is accepted where the values do not change. Only safetensors are read.
    """
    stored = Stored.of(Path(folder))
    stored.tensors.check(stored.manifest)
    target = _build(stored) if model is None else model
    modules = dict(target.named_modules(remove_duplicate=False))
    if model is None and not stored.layers.keys() <= modules.keys() and unfuse(target):
        modules = dict(target.named_modules(remove_duplicate=False))
    buffers: dict[str, packed.Tensors] = {}
    twins: dict[str, list[str]] = {}
    first: dict[int, str] = {}  # of the layers with one weight, by its id
    for name, layer in stored.layers.items():
        _check_fits(stored, layer, modules.get(name))
        decoded = stored.format.decode(stored.tensors, layer)
        other = first.setdefault(id(modules[name]._parameters["weight"]), name)
        if other != name:
            if stored.layers[other].spec != layer.spec or not _equal(buffers[other], decoded):
                raise ValueError(
                    f"{stored.tensors.folder}: {other!r} and {name!r} share one weight in the "
                    "model, and hold different codes: load into a model that does not tie them"
                )
            continue
        twins[name] = _twins(modules, name)
        for twin in twins[name][1:]:
            _check_fits(stored, layer, modules[twin])
        buffers[name] = decoded
    weights = {id(modules[name]._parameters["weight"]) for name in buffers}
    values = _read_others(stored, target, weights)
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
    for name, tensors in buffers.items():
        for twin in twins[name]:
            to_packed(modules[twin], stored.layers[name].spec, tensors)
    return target


def _check_fits(stored: Stored, layer: Outline, module: nn.Module | None) -> None:
    where = f"{stored.tensors.folder}: {layer.name!r}"
    if module is None:
        raise ValueError(f"{where} is not a layer of the model")
    if isinstance(module, PackedWeight):
        raise ValueError(f"{where} is packed already: load into a model as it was built")
    if layers.kind(module) is None or module._parameters.get("weight") is None:
        raise ValueError(f"{where} is a {type(module).__name__} in the model, which has no codes")
    if reason := packed.obstacle(module):
        raise ValueError(f"{where} cannot be packed: {reason}")
    if module._parameters["weight"].device.type == "meta":  # type: ignore[union-attr]
        raise ValueError(f"{where} has no data (meta device): build the model on a real device")
    own = Outline.of(layer.name, module, layer.spec)
    alike = own.kind == layer.kind or {own.kind, layer.kind} <= LINEAR
    if not alike or own.shape != layer.shape:
        raise ValueError(
            f"{where} is a {layer.kind} of {list(layer.shape)}, "
            f"in the model a {own.kind} of {list(own.shape)}"
        )


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two layers of one spec have the same buffers."""
    return all(x is None or torch.equal(x, other[name]) for name, x in one.items())


def _twins(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Names of the layers with the weight of this one, which comes first."""
    weight = modules[name]._parameters["weight"]
    names = {id(modules[name]): name}  # a layer may be in two places
    for other, module in modules.items():
        if module._parameters.get("weight") is weight:
            names.setdefault(id(module), other)
    return list(names.values())


def _read_others(
    stored: Stored, model: nn.Module, weights: set[int]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the model, and what they are to hold; weights: ids of those that codes replace."""
    tensors = stored.tensors
    expected = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in weights
    }
    values, filled = [], set()
    for name in stored.others:
        if name not in expected:
            _check_ignorable(stored, model, name)
            continue
        tensor = expected[name]
        value = tensors.take(name, tuple(tensor.shape))
        same = value.dtype == tensor.dtype
        if not same and not torch.equal(value.to(tensor.dtype).to(value.dtype), value):
            raise ValueError(
                f"{tensors.where(name)} is {value.dtype}, and {tensor.dtype}, as the model has it, "
                "would change it"
            )
        values.append((tensor, value))
        filled.add(id(tensor))
    for name, tensor in expected.items():
        if id(tensor) not in filled:  # a tied one is filled under another name
            raise ValueError(f"{tensors.where(name)} of the model is missing")
    return values


def _check_ignorable(stored: Stored, model: nn.Module, name: str) -> None:
    """ValueError for a tensor that the model does not have, and that means something."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in patterns):
        return
    # early GPTQ files give every layer a bias
    shape, biases = stored.tensors.shapes[name], {f"{x.prefix}bias" for x in stored.layers.values()}
    if name in biases and not stored.tensors.take(name, shape).any():
        return
    raise ValueError(f"{stored.tensors.where(name)} has no place in the model")


def _build(stored: Stored) -> nn.Module:
    """The model that config.json describes, its weights not set."""
    folder = stored.tensors.folder
    transformers = optional("transformers")
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} has no {CONFIG}: pass the model to load into")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        named = (config.architectures or ["none"])[0]
    except Exception as error:  # whatever the class of the configuration thinks of
        raise _unbuildable(folder, error) from error
    architecture: Any = getattr(transformers, named, None) if isinstance(named, str) else None
    if not isinstance(architecture, type) or not hasattr(architecture, "_from_config"):
        raise ValueError(
            f"{folder / CONFIG} names architecture {named!r}, which transformers "
            f"{transformers.__version__} does not have: pass the model to load into"
        )
    config.quantization_config = None
    many = getattr(config, "num_hidden_layers", None)
    if isinstance(many, int) and many > len(stored.tensors.files):
        raise ValueError(f"{folder / CONFIG} has {many} layers, more than there are tensors")
    try:
        with optional("transformers.initialization").no_init_weights():
            with torch.device("meta"):  # shapes first: a file of bytes may ask for terabytes
                _check_size(stored, architecture._from_config(config))
            dtype = config.dtype or torch.float32
            model: Any = architecture._from_config(config, dtype=dtype)
        model.tie_weights()  # a part of the initialization that was left out
        if (folder / GENERATION).exists():
            found = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
            model.generation_config = found
    except Exception as error:
        raise _unbuildable(folder, error) from error
    built: nn.Module = model.eval()
    return built


def _unbuildable(folder: Path, error: Exception) -> ValueError:
    what = f"{folder / CONFIG} describes no model that transformers can build"
    return ValueError(f"{what}: {type(error).__name__}: {error}")


def _check_size(stored: Stored, model: Any) -> None:
    """ValueError for a model that the tensors of the folder cannot fill."""
    model.tie_weights()
    held = sum(math.prod(layer.shape) for layer in stored.layers.values())
    held += sum(math.prod(stored.tensors.shapes[name]) for name in stored.others)
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > held:
        raise ValueError(f"it has {asked} weights, and the files hold {held}")
