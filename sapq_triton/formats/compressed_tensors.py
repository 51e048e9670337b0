"""compressed-tensors' "pack-quantized", as llm-compressor writes and vLLM and transformers read it.

A linear layer of R rows (outputs), C columns (inputs) and G groups is

    weight_packed      int32 [R, words(C)]    codes, packed along the columns
    weight_scale       [R, G]                 in the dtype of the model
    weight_shape       int64 [2]              R, C
    weight_zero_point  int32 [words(R), G]    packed along the rows; only where asymmetric

transformers 5.23 with compressed-tensors 0.20 loads asymmetric groups, whoever wrote them, with
`quantization_config=CompressedTensorsConfig(dequantize=True)` only, and asymmetric channels never.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packed import PackedWeight
from ..packing import pack, unpack, words
from ..spec import QuantSpec
from .folder import Tensors
from .layer import (
    Outline,
    check_group_order,
    check_packed_shape,
    prefixes_with,
    scale_dtype,
    take_scale,
)

FORMAT = "pack-quantized"
VERSION = "0.20.0"  # of compressed-tensors, whose configuration this is
SUFFIXES = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class CompressedTensors:
    name: str = "compressed-tensors"

    def check(self, layer: Outline) -> None:
        if layer.kind != "Linear":
            hint = "'gptq' or 'sapq'" if layer.kind == "Conv1D" else "'sapq'"
            raise ValueError(
                f"{layer.name!r} is a {layer.kind}; {self.name} holds nn.Linear: use format {hint}"
            )
        if layer.dtype not in DTYPES:
            raise ValueError(
                f"{layer.name!r} has a weight of {layer.dtype}; {self.name} holds float16, "
                "bfloat16 and float32: convert the model, or use format 'sapq'"
            )

    def encode(self, layer: Outline, module: PackedWeight) -> dict[str, Tensor]:
        assert layer.dtype is not None
        scale = module.scale.to(layer.dtype)
        if not torch.equal(scale.float(), module.scale.float()):
            dtype = str(layer.dtype).removeprefix("torch.")
            raise ValueError(
                f"{layer.name!r} has {layer.spec.scale_dtype} scales that {dtype}, the dtype of "
                f"the model, in which {self.name} stores them, would change: "
                f'quantize with QuantSpec(scale_dtype="{dtype}")'
            )
        tensors = {
            "weight_packed": module.qweight,
            "weight_scale": scale,
            "weight_shape": torch.tensor([layer.rows, layer.columns]),
        }
        if not layer.spec.symmetric:
            tensors["weight_zero_point"] = pack(module.zero_points().T, layer.spec.bits).T
        return tensors

    def config(
        self, layers: Iterable[Outline], left: Iterable[str], head: str | None
    ) -> dict[str, Any]:
        """One group per kind of grid. A single one targets the class and names what to ignore; of
        several, each names its layers, which keeps its meaning where an engine fuses some.
        """
        schemes: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for layer in layers:
            schemes.setdefault(tuple(_arguments(layer.spec).items()), []).append(layer.name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": dict(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for number, (scheme, names) in enumerate(schemes.items())
        }
        return {
            "config_groups": groups,
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": None,
            "format": FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(left),
            "moe_sparsity_config": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }

    def outlines(
        self, tensors: Tensors, config: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> list[Outline]:
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            if config.get(key):
                raise ValueError(f"{key} must be empty, got {config[key]!r}")
        found = []
        for prefix in prefixes_with(tensors, "weight_packed"):
            name = prefix.removesuffix(".")
            scale = f"{prefix}weight_scale"
            spec = _spec(_scheme(config, name), name, scale_dtype(tensors, scale))
            shape = tensors.take(f"{prefix}weight_shape", (2,), (torch.int64, torch.int32))
            rows, columns = shape.tolist()
            layer = Outline(name, "Linear", (rows, columns), rows, columns, spec)
            check_packed_shape(tensors, f"{prefix}weight_packed", layer)
            found.append(layer)
        return found

    def decode(self, tensors: Tensors, layer: Outline) -> dict[str, Tensor | None]:
        prefix, bits = layer.prefix, layer.spec.bits
        rows, groups = layer.rows, layer.groups
        check_group_order(tensors, f"{prefix}weight_g_idx", layer)
        packed_shape = rows, words(layer.columns, bits)
        qzeros = None
        if not layer.spec.symmetric:
            zeros = tensors.take(
                f"{prefix}weight_zero_point", (words(rows, bits), groups), (torch.int32,)
            )
            qzeros = pack(unpack(zeros.T, bits, rows).T, bits)
        return {
            "qweight": tensors.take(f"{prefix}weight_packed", packed_shape, (torch.int32,)),
            "scale": take_scale(tensors, f"{prefix}weight_scale", (rows, groups)),
            "qzeros": qzeros,
        }

    def owned(self, layer: Outline) -> set[str]:
        return {f"{layer.prefix}{suffix}" for suffix in SUFFIXES}


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    """QuantizationArgs of the weights."""
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "group_size": spec.group_size,
        "strategy": "channel" if spec.group_size == -1 else "group",
        "dynamic": False,
    }


def _scheme(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The group of a linear layer: a target that is its name goes before patterns and classes."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(x, dict) for x in groups.values()):
        raise ValueError(f"config_groups must be written out, got {groups!r}")
    targets = {target: group for group in groups.values() for target in group["targets"]}
    patterns = sorted(target for target in targets if target.startswith("re:"))
    fitting = [target for target in patterns if re.match(target.removeprefix("re:"), name)]
    for target in (name, *fitting, "Linear"):
        if target in targets:
            group: Mapping[str, Any] = targets[target]
            form = group.get("format") or config.get("format")
            if form != FORMAT:
                raise ValueError(f"{name!r} has format {form!r}; only {FORMAT!r} can be held")
            return group
    raise ValueError(f"{name!r} is packed, but no target of config_groups fits it")


def _spec(group: Mapping[str, Any], name: str, scale_dtype: Any) -> QuantSpec:
    """ValueError for options that no QuantSpec has."""
    weights = group["weights"]
    legal = {"type": ("int",), "strategy": ("group", "channel"), "dynamic": (False,),
             "actorder": (None, False, "weight", "static")}  # fmt: skip
    for key, values in legal.items():
        value = weights.get(key, values[0])
        if value not in values:
            raise ValueError(f"{name!r} has {key} {value!r}; only {values} can be held")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise ValueError(f"{name!r} quantizes activations ({key}); only weights can be held")
    return QuantSpec(
        bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else -1,
        symmetric=weights.get("symmetric", True),
        scale_dtype=scale_dtype,
    )
