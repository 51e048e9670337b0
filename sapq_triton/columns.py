"""What the columns of a layer cost, and when each was quantized, in some hundred numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import inverse, revive
from .spec import Order

BINS = 40  # of the histogram
POINTS = 512  # of the order, at most
EXPONENTS = -330.0, 308.9  # of float64, and half a bin to either side

# orders that rank columns by what they cost when the others compensate
RANKED: tuple[Order, ...] = ("sensitivity", "sensitivity-static")


@dataclass(frozen=True)
class ColumnSummary:
    """The columns of one layer, those of all groups of a convolution together.

    compensated: True, the sensitivity of a column is sum_r (w_rc - Q(w_rc))^2 / A_cc, what rounding
        it costs once all others have made up for that (A: inverse of the damped Hessian); False, in
        orders that do not rank by it, sum_r (w_rc - Q(w_rc))^2 H_cc: nothing makes up for it.
        Q rounds the weight to nearest, before any column is quantized.
    counts: columns by log10 of their sensitivity, in BINS bins of equal width from `low` to `high`.
    free: columns of sensitivity 0, which are in no bin.
    columns: their number in one group. order: of the first group, which column was quantized first,
        second, ...; evenly thinned to at most POINTS. Empty in order "obq": each row has its own.
    """

    compensated: bool
    counts: tuple[int, ...]
    low: float
    high: float
    free: int
    columns: int
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        """ValueError for what is no logarithm of a float64: a file may hold anything."""
        if not EXPONENTS[0] <= self.low <= self.high <= EXPONENTS[1]:
            raise ValueError(
                f"low and high must be in order, from {EXPONENTS[0]} to {EXPONENTS[1]}, "
                f"got {self.low} and {self.high}"
            )


def unit_costs(hessian: Tensor, order: Order, damp: Tensor) -> Tensor:
    """What a unit of squared error in each column costs: [B, C, C], damping [B]  ->  [B, C]

    1 / A_cc or H_cc, see `ColumnSummary`; H_cc also where H is not positive definite. 0 for columns
    that never fired.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if order not in RANKED:
        return diagonal.clone()
    revived, _ = revive(hessian)
    a, solved = inverse(revived, damp)
    compensated = 1 / a.diagonal(dim1=1, dim2=2)
    usable = solved[:, None] & (compensated > 0) & compensated.isfinite()
    return torch.where(usable, compensated, diagonal).masked_fill(diagonal == 0, 0)


def summarize(
    weight: Tensor, nearest: Tensor, cost: Tensor, columns: Tensor | None, order: Order
) -> ColumnSummary:
    """weight, and it rounded to nearest [B, R, C]; cost [B, C] of `unit_costs`; columns int64
    [B, C], or None, as in `SolveResult`."""
    squares = (weight.float() - nearest).square_().sum(1, dtype=torch.float64)
    sensitivity = (squares * cost).flatten().cpu()
    paid = sensitivity[(sensitivity > 0) & sensitivity.isfinite()].log10()
    low, high = (float(paid.min()), float(paid.max())) if len(paid) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    count = weight.shape[-1]
    thinned = torch.linspace(0, count - 1, min(count, POINTS), dtype=torch.float64).round().long()
    return ColumnSummary(
        compensated=order in RANKED,
        counts=tuple(map(int, torch.histc(paid, BINS, low, high).tolist())),
        low=low,
        high=high,
        free=len(sensitivity) - len(paid),
        columns=count,
        order=() if columns is None else tuple(columns[0].cpu()[thinned].tolist()),
    )
