"""What `quantize` did, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .result import dequantize, share_of_zeros
from .spec import Order, QuantSpec


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


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    shape: of the weight. codes uint8 [B, R, C], scale and zero_point float32 [B, R, G], on the CPU;
    B groups of a convolution, as in `layers.weight_matrix`.
    error: tr((W - Q) H (W - Q)^T) on the calibration rows, energy: tr(W H W^T).
    rows: calibration rows seen. damp: the largest that was needed. drift_correction: the fraction
    that was taken, see `quantize`. dead_columns, fallbacks: columns
    that never fired, and problems that were rounded to nearest, summed over the groups.
    seconds_hessian, seconds_solve: of layers that were solved together, the first one carries the
    time of their Hessian, and each one its part of the solve, by rows.
    notes: whatever deviates from what was asked for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: QuantSpec
    order: Order
    codes: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    zero_point: Tensor = field(repr=False)
    error: float
    energy: float
    rows: int
    damp: float
    drift_correction: float
    dead_columns: int
    fallbacks: int
    seconds_hessian: float
    seconds_solve: float
    notes: tuple[str, ...] = ()

    def dequantize(self) -> Tensor:
        """The quantized weight as a batch of matrices, float32 [B, R, C], on the CPU."""
        return dequantize(self.codes, self.scale, self.zero_point, self.spec.levels)

    @property
    def relative_error(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero, pruned or rounded so."""
        return float(share_of_zeros(self.codes, self.zero_point).mean())

    @property
    def bytes(self) -> float:
        """Of codes, scales and zero points, see `packed_bytes`."""
        _, rows, columns = self.codes.shape
        return packed_bytes(len(self.codes) * rows, columns, self.spec)


@dataclass(frozen=True)
class Report:
    """layers: quantized ones in the order of execution. skipped: name and reason of the others, and
    of BatchNorms that could not be corrected.

    corrected: BatchNorm layers and biases that were shifted, name to largest absolute shift.
    """

    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    corrected: Mapping[str, float]
    seconds: float

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} was not quantized; layers are {[x.name for x in self.layers]}")

    @property
    def relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / max(1, len(self.layers))

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':{width}} {'kind':16} {'weight':>18} bits  rel. error  solve s  notes"]
        for x in self.layers:
            notes = list(x.notes)
            if x.dead_columns:
                notes.append(f"{x.dead_columns} columns never fired")
            if x.fallbacks:
                notes.append(f"{x.fallbacks} of {len(x.codes)} problems rounded to nearest")
            if x.spec.sparsity:
                notes.append(f"{x.sparsity:.1%} of the weights are zero")
            shape = "x".join(map(str, x.shape))
            lines.append(
                f"{x.name:{width}} {x.kind:16} {shape:>18} {x.spec.bits:4} "
                f"{x.relative_error:11.3e} {x.seconds_solve:8.3f}  {'; '.join(notes)}"
            )
        lines += [f"{name}: left as it was, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def to_json(self):
        import pickle, base64

        return base64.b64encode(pickle.dumps(self)).decode()

    @classmethod
    def from_json(cls, c):
        import pickle, base64

        return pickle.loads(base64.b64decode(c))
