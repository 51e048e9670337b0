"""What `quantize` did, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from . import plain
from .columns import ColumnSummary
from .result import dequantize
from .spec import Order, QuantSpec

SCHEMA, VERSION = "sapq-triton report", 1


def packed_bytes(rows: int, columns: int, spec: QuantSpec) -> float:
    """Size of packed codes, of packed zero points (none where symmetric), and of scales: of a byte
    for "power-of-two" and "uint8", the latter with a float16 number per row, else float16.
    """
    scales = rows * (columns // spec.columns_per_group(columns))
    size = rows * columns * spec.bits / 8
    size += scales * (1 if spec.scale_dtype in ("power-of-two", "uint8") else 2)
    if spec.scale_dtype == "uint8":
        size += rows * 2
    if not spec.symmetric:
        size += scales * spec.bits / 8
    return size


class Quantized(NamedTuple):
    """codes uint8 [B, R, C], scale and zero_point float32 [B, R, G], on the CPU; B groups of a
    convolution, as in `layers.weight_matrix`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    shape: of the weight; matrix: B, R, C of it as matrices. quantized: what the weight has become,
    None in a report that was read from a file.
    error: tr((W - Q) H (W - Q)^T) on the calibration rows, energy: tr(W H W^T); nearest_error: the
    error of W rounded to nearest on the grid that the same spec finds. W is what the layer aimed
    at, drift correction included.
    rows: calibration rows seen. damp: the largest that was needed. drift_correction: the fraction
    that was taken, see `quantize`. dead_columns, fallbacks: columns
    that never fired, and problems that were rounded to nearest, summed over the groups.
    sparsity: share of the weights that are zero, pruned or rounded so.
    seconds_hessian, seconds_solve: of layers that were solved together, the first one carries the
    time of their Hessian, and each one its part of the solve, by rows.
    columns: what they cost, and when each was quantized.
    notes: whatever deviates from what was asked for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    matrix: tuple[int, int, int]
    spec: QuantSpec
    order: Order
    quantized: Quantized | None = field(repr=False, compare=False, metadata=plain.LEFT_OUT)
    error: float
    energy: float
    nearest_error: float
    rows: int
    damp: float
    drift_correction: float
    dead_columns: int
    fallbacks: int
    sparsity: float
    seconds_hessian: float
    seconds_solve: float
    columns: ColumnSummary
    notes: tuple[str, ...] = ()

    @property
    def codes(self) -> Tensor:
        return self._tensors.codes

    @property
    def scale(self) -> Tensor:
        return self._tensors.scale

    @property
    def zero_point(self) -> Tensor:
        return self._tensors.zero_point

    @property
    def _tensors(self) -> Quantized:
        if self.quantized is None:
            raise ValueError(
                f"the report was read from a file: the codes of {self.name!r} are in the model's"
            )
        return self.quantized

    def dequantize(self) -> Tensor:
        """The quantized weight as a batch of matrices, float32 [B, R, C], on the CPU."""
        return dequantize(*self._tensors, self.spec.levels)

    @property
    def relative_error(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0

    @property
    def nearest_relative_error(self) -> float:
        """Of the weight rounded to nearest."""
        return self.nearest_error / self.energy if self.energy > 0 else 0.0

    @property
    def nearest_ratio(self) -> float | None:
        """error / nearest_error; None where rounding to nearest makes no error."""
        return self.error / self.nearest_error if self.nearest_error > 0 else None

    @property
    def bytes(self) -> float:
        """Of codes, scales and zero points, see `packed_bytes`."""
        groups, rows, columns = self.matrix
        return packed_bytes(groups * rows, columns, self.spec)

    @property
    def weights(self) -> int:
        """Their number."""
        return math.prod(self.matrix)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what figures say that should not be overlooked."""
        found = list(self.notes)
        if self.dead_columns:
            plural = "s" if self.dead_columns > 1 else ""
            found.append(f"{self.dead_columns} column{plural} never fired")
        if self.fallbacks:
            found.append(f"{self.fallbacks} of {self.matrix[0]} problems rounded to nearest")
        if self.spec.sparsity:
            found.append(f"{self.sparsity:.1%} of the weights are zero")
        return tuple(found)


@dataclass(frozen=True)
class Report:
    """layers: quantized ones in the order of execution. skipped: name and reason of the others, and
    of BatchNorms that could not be corrected.

    corrected: BatchNorm layers and biases that were shifted, name to largest absolute shift.
    stages: of the run, name to seconds; they add up to `seconds`, but for what lies between them.
    memory: see `machine.peak_memory`. environment: see `machine.environment`. options: what
    `quantize` was called with, or what its preset made of that; None is chosen for each layer.
    """

    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    corrected: Mapping[str, float]
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} was not quantized; layers are {[x.name for x in self.layers]}")

    @property
    def relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / max(1, len(self.layers))

    @property
    def nearest_ratio(self) -> float | None:
        """Geometric mean over the layers of error / error of rounding to nearest; None without a
        layer that has both."""
        ratios = [x.nearest_ratio for x in self.layers]
        logs = [math.log(ratio) for ratio in ratios if ratio]
        return math.exp(sum(logs) / len(logs)) if logs else None

    @property
    def mean_bits(self) -> float:
        """Of a quantized weight, its code alone."""
        weights = sum(x.weights for x in self.layers)
        return sum(x.weights * x.spec.bits for x in self.layers) / max(1, weights)

    @property
    def bytes(self) -> float:
        """Of the quantized layers."""
        return sum(x.bytes for x in self.layers)

    @classmethod
    def of_parts(
        cls, parts: Sequence["Report"], skipped: Mapping[str, str], options: Mapping[str, object]
    ) -> "Report":
        """Of a model that was quantized part by part. skipped, options: of the whole; what is None
        in the latter is as in the parts."""
        given = {name: value for name, value in options.items() if value is not None}
        stages: dict[str, float] = {}
        memory: dict[str, int] = {}
        for part in parts:
            for name, seconds in part.stages.items():
                stages[name] = stages.get(name, 0.0) + seconds
            for name, size in part.memory.items():
                memory[name] = max(size, memory.get(name, 0))
        first = next((part for part in parts if part.layers), cls((), {}, {}, 0.0))
        return cls(
            layers=tuple(layer for part in parts for layer in part.layers),
            skipped={**skipped, **{k: v for part in parts for k, v in part.skipped.items()}},
            corrected={k: v for part in parts for k, v in part.corrected.items()},
            seconds=sum(part.seconds for part in parts),
            stages=stages,
            memory=memory,
            environment=first.environment,
            options={**first.options, **given},
        )

    def without_codes(self) -> "Report":
        """Without codes and grids: a quarter or so of the memory of a model."""
        return replace(self, layers=tuple(replace(x, quantized=None) for x in self.layers))

    def to_json(self) -> dict[str, Any]:
        """All but codes and grids, as what JSON can hold: NaN and infinities are strings."""
        return {"schema": SCHEMA, "version": VERSION, **plain.encode(self)}

    @classmethod
    def from_json(cls, content: object) -> "Report":
        """What `to_json` made, without codes and grids. ValueError for anything else."""
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"is not a report: its schema is not {SCHEMA!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"has version {content.get('version')!r}; this program reads {VERSION}"
            )
        rest = {key: value for key, value in content.items() if key not in ("schema", "version")}
        report: Report = plain.decode(cls, rest, "")
        return report

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [
            f"{'layer':{width}} {'kind':16} {'weight':>18} bits  rel. error  of RTN  solve s  notes"
        ]
        for x in self.layers:
            shape = "x".join(map(str, x.shape))
            ratio = "-" if x.nearest_ratio is None else f"{x.nearest_ratio:.2f}"
            lines.append(
                f"{x.name:{width}} {x.kind:16} {shape:>18} {x.spec.bits:4} "
                f"{x.relative_error:11.3e} {ratio:>7} {x.seconds_solve:8.3f}  "
                f"{'; '.join(x.remarks)}"
            )
        lines += [f"{name}: left as it was, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
