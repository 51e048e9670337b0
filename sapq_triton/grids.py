"""Grids that a weight is rounded to: searched, changed into candidates, or given from outside."""

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor

from . import ops
from .hessian import inverse
from .memory import Rows
from .ops import Backend
from .scales import snapped
from .spec import Order, QuantSpec

STRETCH = 0.06  # between two candidates for a scale: 1, 0.94, 1.06, 0.88, ... of the searched one


def search_grids(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    order: Order,
    candidates: int,
    damp: float,
    backend: Backend,
    rows: Rows,
) -> tuple[Tensor, Tensor]:
    """The grids to try: weight [B, R, C]  ->  scale, zero_point [B, candidates R, G]"""
    importance = None
    if candidates > 1 or spec.scale_search == "hessian":
        importance = _importance(hessian, order, damp)

    def search(importance: Tensor | None) -> tuple[Tensor, Tensor]:
        group_size = spec.columns_per_group(weight.shape[2])
        grid = group_size, spec.levels, spec.symmetric, spec.shrink
        scale, zero_point = rows.map(
            weight.shape[1],
            lambda part: ops.quantize_groups(weight[:, part], *grid, importance, backend)[1:],
        )
        if not scale.isfinite().all():
            raise ValueError("weight spans more than float32 can hold; scale it down")
        return scale, zero_point

    grids = [search(importance if spec.scale_search == "hessian" else None)]
    if candidates > 1:
        weighted = grids[0] if spec.scale_search == "hessian" else search(importance)
        others = _neighbours(*weighted, spec)
        if spec.scale_search == "hessian":
            next(others)  # it is there already
        grids += islice(others, candidates - 1)
    scales = [snapped(scale, weight, zero_point, spec) for scale, zero_point in grids]
    return torch.cat(scales, 1), torch.cat([zero_point for _, zero_point in grids], 1)


def _neighbours(
    scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> Iterator[tuple[Tensor, Tensor]]:
    """A grid; unless symmetric, with zero points one higher and one lower; then stretched ones."""
    yield scale, zero_point
    if not spec.symmetric:
        yield scale, (zero_point + 1).clamp(max=spec.qmax)
        yield scale, (zero_point - 1).clamp(min=0)
    for step in count(1):
        yield scale * (1 - step * STRETCH), zero_point
        yield scale * (1 + step * STRETCH), zero_point


def _importance(hessian: Tensor, order: Order, damp: float) -> Tensor:
    """What a unit of squared error in a column costs: 1 / A_cc, float32 [B, C]

    H_cc where nothing compensates it, or where H is not positive definite.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if order != "nearest":
        a, solved = inverse(hessian, damp)
        compensated = 1 / a.diagonal(dim1=1, dim2=2)
        usable = solved & (compensated > 0).all(1) & compensated.isfinite().all(1)
        diagonal = torch.where(usable[:, None], compensated, diagonal)
    return (diagonal / diagonal.amax(1, keepdim=True)).float()


def given_grid(
    weight: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid to round to, checked. [B, R, G] float32 each"""
    B, R, C = weight.shape
    group_size = spec.columns_per_group(C)
    middle, top = ((spec.qmax + 1) // 2, spec.qmax) if spec.codebook == "int" else (0, 0)
    if zero_point is None:
        if not spec.symmetric:
            raise ValueError("an asymmetric spec with an external scale needs a zero_point")
        zero_point = torch.full_like(scale, middle)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape[-1:] != (C // group_size,) or tensor.numel() != B * R * (C // group_size):
            raise ValueError(
                f"{name} must be [..., {C // group_size}] for each of {B * R} rows, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.device}")
    scale, zero_point = (t.detach().to(weight).reshape(B, R, -1) for t in (scale, zero_point))
    bad = ~(scale.isfinite() & (scale > 0))
    if bad.any():
        raise ValueError(f"scale must be positive and finite, got {scale[bad][0].item()}")
    bad = (zero_point != zero_point.round()) | (zero_point < 0) | (zero_point > top)
    if bad.any():
        raise ValueError(
            f"zero_point must hold integers from 0 to {top}, got {zero_point[bad][0].item()}"
        )
    return scale, zero_point
