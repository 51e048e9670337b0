"""The format of this project: the tensors of packed layers as they are, whatever they may be.

What they mean is in the manifest, sapq.json.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packed import BUFFERS, PackedWeight
from ..packing import words
from ..spec import QuantSpec
from .folder import Tensors
from .layer import Outline, check_packed_shape, take_scale


@dataclass(frozen=True)
class Sapq:
    name: str = "sapq"

    def check(self, layer: Outline) -> None:
        """Every packed layer can be held."""

    def encode(self, layer: Outline, module: PackedWeight) -> dict[str, Tensor]:
        buffers = {name: module._buffers[name] for name in BUFFERS}
        return {name: tensor for name, tensor in buffers.items() if tensor is not None}

    def config(
        self, layers: Iterable[Outline], left: Iterable[str], head: str | None
    ) -> dict[str, Any]:
        """A method that other programs do not know: better than weights that they do not find."""
        return {"quant_method": self.name}

    def outlines(
        self, tensors: Tensors, config: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> list[Outline]:
        found = []
        for name, entry in manifest["layers"].items():
            if not isinstance(entry["kind"], str):
                raise ValueError(f"{name!r} must have a kind, got {entry['kind']!r}")
            shape, rows, columns = tuple(entry["shape"]), entry["rows"], entry["columns"]
            layer = Outline(name, entry["kind"], shape, rows, columns, QuantSpec(**entry["spec"]))
            check_packed_shape(tensors, f"{layer.prefix}qweight", layer)
            found.append(layer)
        return found

    def decode(self, tensors: Tensors, layer: Outline) -> dict[str, Tensor | None]:
        prefix, spec, rows, groups = layer.prefix, layer.spec, layer.rows, layer.groups
        scale = take_scale(tensors, f"{prefix}scale", (rows, groups))
        if scale.dtype != getattr(torch, spec.scale_dtype):
            raise ValueError(
                f"{tensors.where(f'{prefix}scale')} must be {spec.scale_dtype}, got {scale.dtype}"
            )
        qzeros = (rows, words(groups, spec.bits))
        return {
            "qweight": tensors.take(
                f"{prefix}qweight", (rows, words(layer.columns, spec.bits)), (torch.int32,)
            ),
            "scale": scale,
            "qzeros": None
            if spec.symmetric
            else tensors.take(f"{prefix}qzeros", qzeros, (torch.int32,)),
        }

    def owned(self, layer: Outline) -> set[str]:
        return {f"{layer.prefix}{suffix}" for suffix in BUFFERS}
