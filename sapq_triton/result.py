"""What `solve` returns, and how the error of a quantized layer is measured."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .codebook import Codebook
from .spec import Order, QuantSpec

MEASURED_ELEMENTS = 2**17  # of the weight, whose errors are measured at a time; more if C is large


@dataclass(frozen=True)
class SolveReport:
    """What happened. Tensors have the batch shape of the weight: [] or [B].

    row_error, row_energy: e H e^T of each row e of W - Q, and of W; float64 [R] or [B, R]. None
        where `measure` was False.
    damp: the damping that was used, as a fraction of the mean diagonal.
    dead_columns: number of columns with H_cc = 0, which were rounded to nearest.
    fallback: True where no damping made the problem solvable: rounded to nearest.
    notes: what was done where memory ran out.
    """

    row_error: Tensor | None
    row_energy: Tensor | None
    damp: Tensor
    dead_columns: Tensor
    fallback: Tensor
    order: Order
    block: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> Tensor:
        """Layer error tr((W - Q) H (W - Q)^T), float64"""
        return _measured(self.row_error).sum(-1)

    @property
    def energy(self) -> Tensor:
        """tr(W H W^T), float64"""
        return _measured(self.row_energy).sum(-1)

    @property
    def relative_error(self) -> Tensor:
        """error / energy; 0 where there is no energy."""
        return torch.where(self.energy > 0, self.error / self.energy, 0.0)


def _measured(per_row: Tensor | None) -> Tensor:
    if per_row is None:
        raise ValueError("the error was not measured: solve(..., measure=True)")
    return per_row


@dataclass(frozen=True)
class SolveResult:
    """codes uint8 [..., R, C]; scale and zero_point float32 [..., R, G] in original column order.

    columns: int64 [..., C], the order in which the columns were quantized; None for "obq", where
    each row has its own.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: Tensor | None
    spec: QuantSpec
    report: SolveReport

    def dequantize(self) -> Tensor:
        """(codes - zero_point) * scale, or that of the codebook; float32 [..., R, C]"""
        return dequantize(self.codes, self.scale, self.zero_point, self.spec.levels)

    @property
    def sparsity(self) -> Tensor:
        """Share of the weights that are zero, pruned or rounded so, float64 [...]"""
        return share_of_zeros(self.codes, self.zero_point)


def moved(result: SolveResult, device: torch.device | str) -> SolveResult:
    """A result with its tensors on a device."""

    def on_device(record: Any) -> dict[str, Any]:
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        return {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}

    report = replace(result.report, **on_device(result.report))
    return replace(result, **on_device(result), report=report)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, levels: int | Codebook | None = None
) -> Tensor:
    """codes [..., R, C], scale, zero_point [..., R, G]  ->  (codes - zero_point) * scale

    levels: of the spec; needed where they are a codebook, and these are then levels[codes] * scale.
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))  # [..., R, G, C / G]
    if isinstance(levels, Codebook):
        grid = scale[..., None], zero_point[..., None], levels
        return reference.to_value(grouped, *grid).flatten(-2)
    return grouped.sub_(zero_point[..., None]).mul_(scale[..., None]).flatten(-2)


def share_of_zeros(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Share of codes that are their zero point, float64: [..., R, C], [..., R, G]  ->  [...]"""
    zeros = codes.unflatten(-1, (zero_point.shape[-1], -1)) == zero_point[..., None]
    return zeros.sum((-3, -2, -1)).double() / (codes.shape[-2] * codes.shape[-1])


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T), float64: [..., R, C] twice, [..., C, C]  ->  [...]"""
    return row_errors(weight.float(), hessian, quantized.float()).sum(-1)


def row_errors(
    weight: Tensor,
    hessian: Tensor,
    quantized: Tensor | Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """e H e^T of each row e of W - Q, or W, float64: [..., R, C], [..., C, C]  ->  [..., R]

    quantized: Q, or what makes Q[rows] of an index `rows`, so that it is never there as a whole.
    """
    columns = weight.shape[-1]
    step = max(1, max(MEASURED_ELEMENTS, columns**2 // 8) // columns)  # rows at a time
    parts = []
    for start in range(0, weight.shape[-2], step):
        rows = (..., slice(start, start + step), slice(None))
        error = weight[rows]
        if quantized is not None:
            error = error - (quantized(rows) if callable(quantized) else quantized[rows])
        error = error.to(hessian.dtype)
        parts.append((error @ hessian).mul_(error).sum(-1, dtype=torch.float64))
    errors = torch.cat(parts, -1)
    if hessian.dtype == torch.float64 or errors.isfinite().all():
        return errors
    return row_errors(weight, hessian.double(), quantized)  # products beyond float32
