"""What a file format has to know of a layer, and what it has to say."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import layers
from ..packed import PackedWeight
from ..packing import words
from ..spec import QuantSpec, ScaleDtype
from .folder import Tensors

SCALE_DTYPES: dict[str, ScaleDtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
LINEAR = {"Linear", "Conv1D"}


@dataclass(frozen=True)
class Outline:
    """A packed layer without its tensors, or one that is going to be packed.

    kind: of the plain layer. shape: of its weight, [R, C] also for transformers' Conv1D. rows: R,
    output channels. columns: C, of one group of a convolution. dtype: of the weight that is
    computed; None where only a file is known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    spec: QuantSpec
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """ValueError for what no weight can be: files say these things."""
        sides = (*self.shape, self.rows, self.columns)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)
        if not whole or math.prod(self.shape) != self.rows * self.columns:
            raise ValueError(
                f"{self.name!r} cannot have a weight of {self.shape!r} that is "
                f"{self.rows!r} rows of {self.columns!r} columns"
            )

    @classmethod
    def of(cls, name: str, module: Any, spec: QuantSpec | None = None) -> "Outline":
        """spec: of a plain layer."""
        groups, rows, columns = layers.matrix_shape(module)
        packed = isinstance(module, PackedWeight)
        return cls(
            name=name,
            # transformers' Conv1D, turned into a linear layer, keeps this attribute
            kind="Conv1D" if hasattr(module, "nf") else type(module).__name__.removeprefix("Quant"),
            shape=_weight_shape(module),
            rows=groups * rows,
            columns=columns,
            spec=spec or module.spec,
            dtype=module.weight_dtype if packed else module.weight.dtype,
        )

    @property
    def prefix(self) -> str:
        """Of the names of its tensors; a model that is one layer has none."""
        return f"{self.name}." if self.name else ""

    @property
    def groups(self) -> int:
        """Groups of columns that share a scale. ValueError where their size does not divide."""
        return self.columns // self.spec.columns_per_group(self.columns)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"kind": self.kind, "shape": list(self.shape), "rows": self.rows,
                "columns": self.columns, "spec": asdict(self.spec)}  # fmt: skip


class Format(Protocol):
    """A way to write a packed layer as tensors named <prefix><suffix>, and to read it.

    The other tensors of a model, biases among them, are the same in all formats.
    """

    @property
    def name(self) -> str: ...

    def check(self, layer: Outline) -> None:
        """ValueError for a layer that the format cannot hold, naming one that can."""

    def encode(self, layer: Outline, module: PackedWeight) -> dict[str, Tensor]:
        """The tensors by suffix. ValueError for values that the format cannot hold."""

    def config(
        self, layers: Iterable[Outline], left: Iterable[str], head: str | None
    ) -> dict[str, Any]:
        """quantization_config of config.json; left: names of linear layers that are not packed,
        head: of the output layer.
        """

    def outlines(
        self, tensors: Tensors, config: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> list[Outline]:
        """The packed layers of a folder. ValueError for options that this program does not hold."""

    def decode(self, tensors: Tensors, layer: Outline) -> dict[str, Tensor | None]:
        """Buffers of a packed layer. ValueError for tensors that do not describe one."""

    def owned(self, layer: Outline) -> set[str]:
        """Names of the tensors that `decode` may take."""


def _weight_shape(module: Any) -> tuple[int, ...]:
    groups, rows, columns = layers.matrix_shape(module)
    if not isinstance(module, layers.CONVOLUTIONS + layers.TRANSPOSED):
        return rows, columns
    return tuple(layers.as_weight(module, torch.empty(groups, rows, columns, device="meta")).shape)


def prefixes_with(tensors: Tensors, suffix: str) -> list[str]:
    """As `Outline.prefix`, of the layers that have such a tensor."""
    prefixes = [name.removesuffix(suffix) for name in tensors.files if name.endswith(suffix)]
    return [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]


def scale_dtype(tensors: Tensors, name: str) -> ScaleDtype:
    found = tensors.dtypes.get(name, "nothing")
    if found not in SCALE_DTYPES:
        raise ValueError(f"{tensors.where(name)} must be one of {[*SCALE_DTYPES]}, got {found}")
    return SCALE_DTYPES[found]


def check_packed_shape(tensors: Tensors, name: str, layer: Outline) -> None:
    """ValueError where codes are not [R, words(C)]: an outline is no larger than its file."""
    shape = layer.rows, words(layer.columns, layer.spec.bits)
    if tensors.shapes.get(name) != shape:
        got = list(tensors.shapes.get(name, ())) or "nothing"
        raise ValueError(f"{tensors.where(name)} must be {list(shape)}, got {got}")


def take_scale(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """ValueError for scales that are not finite."""
    scale = tensors.take(name, shape, (torch.float16, torch.bfloat16, torch.float32))
    if not scale.isfinite().all():
        raise ValueError(f"{tensors.where(name)} holds NaN or Inf")
    return scale


def check_group_order(tensors: Tensors, name: str, layer: Outline) -> None:
    """ValueError for a file in which groups are not runs of neighbouring columns."""
    if name not in tensors:
        return
    order = tensors.take(name, (layer.columns,), (torch.int32, torch.int64))
    if not torch.equal(order.long(), torch.arange(layer.columns) * layer.groups // layer.columns):
        raise ValueError(
            f"{tensors.where(name)} is not i // group_size: groups in the order of activations "
            "(desc_act, actorder='group') cannot be held"
        )


def unpacked_linear(model: nn.Module) -> list[str]:
    """Names of the linear layers that are not packed."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, PackedWeight)
    ]
