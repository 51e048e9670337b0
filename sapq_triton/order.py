"""Orders of columns that are known before the first column is quantized."""

import torch
from torch import Tensor

from . import ops
from .codebook import Codebook
from .hessian import damped, inverse
from .ops import Backend
from .spec import Order

PIVOT_BLOCK = 64  # pivots between two updates of the whole matrix


def static_order(
    order: Order,
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """weight [B, R, C], hessian [B, C, C]  ->  columns int64 [B, C], solved bool [B]"""
    B, _, C = weight.shape
    natural = torch.arange(C, device=weight.device).expand(B, C)
    solved = torch.ones(B, dtype=torch.bool, device=weight.device)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if order == "natural":
        return natural, solved
    if order == "activation":
        return diagonal.argsort(dim=1, descending=True, stable=True), solved
    if order == "min-pivot":
        return _eliminate_(damped(hessian, damp)), solved
    a, solved = inverse(hessian, damp)
    group = natural // (C // scale.shape[2])
    cost = ops.column_sensitivity(
        weight, scale, zero_point, group, a.diagonal(dim1=1, dim2=2).float(), qmax, backend
    )
    return cost.argsort(dim=1, descending=True, stable=True), solved


def min_pivot_order(hessian: Tensor) -> Tensor:
    """Eliminate the column of smallest pivot first; the order is the elimination read backwards.

    The column quantized last has nothing left to compensate it and costs its whole pivot, so it
    should be the cheapest (Chen et al. 2025, arXiv 2507.18553). hessian [B, C, C]  ->  int64 [B, C]
    """
    return _eliminate_(hessian.clone())


def _eliminate_(rest: Tensor) -> Tensor:
    """`min_pivot_order`, in the memory of the matrix"""
    B, C, _ = rest.shape
    each = torch.arange(B, device=rest.device)
    eliminated = torch.empty(B, C, dtype=torch.int64, device=rest.device)
    done = torch.zeros(B, C, dtype=torch.bool, device=rest.device)
    for start in range(0, C, PIVOT_BLOCK):
        end = min(start + PIVOT_BLOCK, C)
        pending = rest.new_zeros(B, end - start, C)
        diagonal = rest.diagonal(dim1=1, dim2=2).clone()
        for step in range(end - start):
            pivot = diagonal.masked_fill(done, torch.inf).argmin(1)
            earlier = pending[:, :step]
            row = rest[each, pivot] - torch.einsum("bm,bmc->bc", earlier[each, :, pivot], earlier)
            row /= row[each, pivot].clamp(min=torch.finfo(row.dtype).tiny).sqrt()[:, None]
            diagonal -= row.square()
            pending[:, step] = row
            eliminated[:, start + step] = pivot
            done[each, pivot] = True
        rest.baddbmm_(pending.mT, pending, alpha=-1)
    return eliminated.flip(1)
