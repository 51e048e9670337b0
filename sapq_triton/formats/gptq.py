"""GPTQ files, as AutoGPTQ introduced them and GPTQModel, vLLM and transformers read them.

A layer of R rows (outputs), C columns (inputs) and G groups is

    qweight  int32 [words(C), R]     codes, packed along the columns
    qzeros   int32 [G, words(R)]     zero points, less 1 in version 1, packed along the rows
    scales   float16 [G, R]
    g_idx    int32 [C]               the group of each column, i // group_size

A program that computes in bfloat16 rounds the scales to it, which leaves those alone that were made
with scale_dtype="bfloat16"; float16 holds these exactly unless they are below 1e-5.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packed import PackedWeight
from ..packing import WORD, pack, unpack, words
from ..spec import QuantSpec
from .folder import Tensors, program
from .layer import LINEAR, Outline, check_group_order, prefixes_with, scale_dtype, take_scale

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel has kernels for
MULTIPLE = 32  # of rows and columns: as many codes fill whole words, whatever their bits
REQUANTIZE = 'quantize with QuantSpec(scale_dtype="float16")'
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GPTQ:
    """name: "gptq", version 1, which every program reads, or "gptq_v2", for GPTQModel.

    zero_offset: what version 1 subtracts from the zero points.
    """

    name: str
    zero_offset: int

    def check(self, layer: Outline) -> None:
        spec, name = layer.spec, layer.name
        if layer.kind not in LINEAR:
            raise ValueError(
                f"{name!r} is a {layer.kind}; {self.name} holds linear layers: use format 'sapq'"
            )
        if spec.bits not in BITS:
            raise ValueError(
                f"{name!r} has {spec.bits} bits; {self.name} holds {BITS}: "
                "use format 'compressed-tensors' or 'sapq'"
            )
        for axis, count in (("rows", layer.rows), ("columns", layer.columns)):
            if count % MULTIPLE:
                raise ValueError(
                    f"{name!r} has {count} {axis}; {self.name} holds multiples of {MULTIPLE}: "
                    "skip this layer, or use format 'compressed-tensors' or 'sapq'"
                )
        if spec.group_size not in GROUP_SIZES:
            raise ValueError(
                f"{name!r} has groups of {spec.group_size} columns; {self.name} is read with "
                f"{GROUP_SIZES}: use format 'compressed-tensors' or 'sapq'"
            )
        if spec.scale_dtype == "float32":
            raise ValueError(
                f"{name!r} has float32 scales; {self.name} holds float16: {REQUANTIZE}"
            )

    def encode(self, layer: Outline, module: PackedWeight) -> dict[str, Tensor]:
        zero_points = module.zero_points().T
        if int(zero_points.min()) < self.zero_offset:
            raise ValueError(
                f"{layer.name!r} has a zero point of 0, which gptq would store as -1: use format "
                "'gptq_v2' or 'compressed-tensors', or a symmetric spec"
            )
        scale = module.scale.to(torch.float16)
        if not torch.equal(scale.float(), module.scale.float()):
            raise ValueError(
                f"{layer.name!r} has {layer.spec.scale_dtype} scales that float16, in which "
                f"{self.name} stores them, would change: {REQUANTIZE}"
            )
        return {
            "qweight": module.qweight.T,
            "qzeros": pack(zero_points - self.zero_offset, layer.spec.bits),
            "scales": scale.T,
            "g_idx": torch.arange(layer.columns, dtype=torch.int32)
            // layer.spec.columns_per_group(layer.columns),
        }

    def config(
        self, layers: Iterable[Outline], left: Iterable[str], head: str | None
    ) -> dict[str, Any]:
        """Layers that differ from most are named one by one under "dynamic". An engine that fuses
        layers, as vLLM does query, key and value, needs the same options for all of them.
        """
        options = {layer.name: _options(layer.spec) for layer in layers}
        counts = Counter(tuple(option.items()) for option in options.values())
        base = dict(counts.most_common(1)[0][0])
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(name)}$": option for name, option in options.items() if option != base
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in left if name != head}
        return {
            "quant_method": "gptq",
            **base,
            "desc_act": False,
            "lm_head": head in options,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [program()]},
        }

    def outlines(
        self, tensors: Tensors, config: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> list[Outline]:
        if config.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"pack_dtype must be 'int32', got {config['pack_dtype']!r}")
        found = []
        for prefix in prefixes_with(tensors, "qweight"):
            name = prefix.removesuffix(".")
            options = _options_of(config, name)
            spec = QuantSpec(
                bits=options["bits"],
                group_size=options.get("group_size", -1),
                symmetric=options.get("sym", True),
                scale_dtype=scale_dtype(tensors, f"{prefix}scales"),
            )
            shape = tensors.shapes[f"{prefix}qweight"]
            if len(shape) != 2:
                raise ValueError(
                    f"{tensors.where(f'{prefix}qweight')} must have 2 axes, got {shape}"
                )
            rows = shape[1]
            order = tensors.shapes.get(f"{prefix}g_idx", (shape[0] * WORD // spec.bits,))
            if len(order) != 1:
                raise ValueError(f"{tensors.where(f'{prefix}g_idx')} must have 1 axis, got {order}")
            columns = order[0]
            found.append(Outline(name, "Linear", (rows, columns), rows, columns, spec))
            grouped = 0 < spec.group_size < columns
            if options.get("desc_act") and grouped and f"{prefix}g_idx" not in tensors:
                raise ValueError(f"{name!r} has desc_act, but no g_idx that tells its groups")
        return found

    def decode(self, tensors: Tensors, layer: Outline) -> dict[str, Tensor | None]:
        prefix, spec = layer.prefix, layer.spec
        rows, columns, groups = layer.rows, layer.columns, layer.groups
        check_group_order(tensors, f"{prefix}g_idx", layer)
        packed = tensors.take(f"{prefix}qweight", (words(columns, spec.bits), rows), (torch.int32,))
        zeros = tensors.take(f"{prefix}qzeros", (groups, words(rows, spec.bits)), (torch.int32,))
        zero_points = unpack(zeros, spec.bits, rows).T.int() + self.zero_offset  # up to 256
        if int(zero_points.max()) > spec.qmax:
            raise ValueError(
                f"{tensors.where(f'{prefix}qzeros')} holds zero point {int(zero_points.max())}; "
                f"codes of {spec.bits} bits end at {spec.qmax}"
            )
        middle = 2 ** (spec.bits - 1)
        if spec.symmetric and not (zero_points == middle).all():
            raise ValueError(
                f"{tensors.where(f'{prefix}qzeros')} must hold {middle} only, as the configuration "
                "says that the layer is symmetric"
            )
        return {
            "qweight": packed.T.contiguous(),
            "scale": take_scale(tensors, f"{prefix}scales", (groups, rows)).T.contiguous(),
            "qzeros": None if spec.symmetric else pack(zero_points.byte(), spec.bits),
        }

    def owned(self, layer: Outline) -> set[str]:
        return {f"{layer.prefix}{suffix}" for suffix in SUFFIXES}


def _options(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}


def _options_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of one layer: those of the configuration, under the first pattern of "dynamic" that fits."""
    for pattern, overrides in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            if pattern.startswith("-:"):
                raise ValueError(f"{name!r} is quantized, but {pattern!r} of dynamic excludes it")
            return {**config, **overrides}
    return dict(config)
