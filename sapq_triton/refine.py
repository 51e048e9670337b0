"""Refinement of solved rows: sweeps of coordinate descent over whole rows, and refits of scales.

The solver fixes a column and never returns to it. Here every column is visited again while all
others stand, on E(Q) = (w - q) H (w - q)^T of each row: its error cannot rise but by rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .codebook import Codebook
from .hessian import PANEL
from .ops import Backend, Precision
from .result import dequantize, row_errors
from .tile import rows_innermost


def curvature(hessian: Tensor, columns: Tensor) -> Tensor:
    """H_jk / H_kk in the order of `columns` int64 [B, C], in place of the feedback of a solve.

    [B, C, C], of positive diagonal, column by column in memory, as the reference reads it
    """
    B, C, _ = hessian.shape
    each = torch.arange(B, device=hessian.device)[:, None]
    out = torch.empty_like(hessian, memory_format=torch.contiguous_format).mT
    diagonal = hessian.diagonal(dim1=1, dim2=2).gather(1, columns)
    for start in range(0, C, PANEL):
        panel = slice(start, start + PANEL)
        rows = hessian[each, columns[:, panel]]
        rows = rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
        out[:, panel] = rows.div_(diagonal[:, None, :])
    return out


def sweep(
    weight: Tensor,
    curvature: Tensor,
    quantized: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    columns: Tensor,
    qmax: int | Codebook,
    precision: Precision,
    backend: Backend,
    pruned: Tensor | None = None,
) -> Tensor:
    """One pass of coordinate descent over the columns, in the order of `columns`.

        code_k = Q(w_k + sum_{j != k} (w_j - q_j) H_jk / H_kk)

    with the new q_j of the columns before k (arXiv 2309.01885, 2406.17542): the loop of
    `solve_columns` with H for the feedback. weight, quantized [B, R, C], curvature [B, C, C] in
    that order, scale, zero_point [B, R, G], columns int64 [B, C], pruned bool [B, R, C] or None:
    codes that stay the zero point  ->  uint8 [B, R, C]
    """
    B, R, C = weight.shape
    index = columns[:, :, None].expand(B, C, R)
    w, error = (t.mT.gather(1, index).mT for t in (weight, weight - quantized))
    ahead = torch.empty(B, C, R, dtype=w.dtype, device=w.device)
    for start in range(0, C, PANEL):  # a lower triangle as a whole would be one more matrix
        panel = slice(start, start + PANEL)
        below = curvature[:, :, panel].tril(-1 - start)
        torch.baddbmm(w.mT[:, panel], below.mT, error.mT, out=ahead[:, panel])
    group = columns // (C // scale.shape[2])
    zeros = None if pruned is None else pruned.mT.gather(1, index).mT
    codes, _ = ops.solve_columns(
        w, ahead.mT, curvature, rows_innermost(scale), rows_innermost(zero_point), group, qmax,
        precision, backend, zeros,
    )  # fmt: skip
    return torch.empty_like(codes.mT).scatter_(1, index, codes.mT).mT


def refit_scales(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
) -> Tensor:
    """The scales of least error for given codes: least squares in the G scales of a row.

    Zero points stay: for one to move by a whole code, the residuals of its group would have to be
    half a step in the mean. Fitted along with the scales and rounded, none of 170,496 did, in
    groups of all-MiniLM-L6-v2 at 4 and at 2 bits. Others are tried as `candidates` of a solve.

        sum_h (z_g H z_h^T) s_h = z_g H w^T,    z_g = value / scale in group g, 0 elsewhere

    weight [B, R, C], hessian [B, C, C]  ->  [B, R, G]; a row whose system has no positive solution
    keeps its scales.
    """
    rows, columns, groups = weight.shape[1], weight.shape[2], scale.shape[2]
    # G x G numbers a row, twice while they are solved: of no more rows than make up the weight
    step = max(1, rows * columns // (2 * groups**2))
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    return torch.cat([
        _refit(weight[:, part], hessian, codes[:, part], scale[:, part], zero_point[:, part], qmax)
        for part in parts
    ], 1)  # fmt: skip


def _refit(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
) -> Tensor:
    B, R, C = weight.shape
    G = scale.shape[2]
    z = dequantize(codes, torch.ones_like(scale), zero_point, qmax).to(weight)

    def per_group(products: Tensor) -> Tensor:
        return products.unflatten(2, (G, -1)).sum(3)

    target = per_group(z * (weight @ hessian))
    normal = weight.new_empty(B, R, G, G)
    width = C // G
    for g in range(G):
        part = slice(g * width, (g + 1) * width)
        normal[:, :, g] = per_group(z * (z[:, :, part] @ hessian[:, part]))
    diagonal = normal.diagonal(dim1=2, dim2=3)
    # a group of zeros has no say, and keeps its scale
    empty = diagonal <= 0
    diagonal += torch.where(empty, 1.0, 1e-6 * diagonal.amax(2, keepdim=True))
    fitted, _ = torch.linalg.solve_ex(normal, target[..., None])
    fitted = torch.where(empty, scale, fitted[..., 0])
    usable = ((fitted > 0) & fitted.isfinite()).all(2, keepdim=True)
    return torch.where(usable, fitted, scale)


def refine(
    weight: Tensor,
    hessian: Tensor,
    curvature: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    columns: Tensor,
    qmax: int | Codebook,
    *,
    rounds: int,
    snap: Callable[[Tensor], Tensor] | None,
    sparse: bool = False,
    precision: Precision,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """`rounds` times a refit of the scales and a sweep; each row keeps the best that it had.

    curvature: of the Hessian in the order of `columns`, see there.
    snap: rounds refitted scales to what a file can hold; None: the grid stays as it is. sparse:
    weights that are zero stay so.
    codes uint8 [B, R, C]  ->  codes, scale. Rows of equal error keep the earlier one.
    """
    kept = codes, scale
    pruned = None
    if sparse:
        pruned = (codes.unflatten(2, (scale.shape[2], -1)) == zero_point[..., None]).flatten(2)
    least = row_errors(weight, hessian, dequantize(codes, scale, zero_point, qmax))
    for _ in range(rounds):
        if snap is not None:
            scale = snap(refit_scales(weight, hessian, codes, scale, zero_point, qmax))
        quantized = dequantize(codes, scale, zero_point, qmax)
        codes = sweep(
            weight, curvature, quantized, scale, zero_point, columns, qmax, precision, backend,
            pruned,
        )  # fmt: skip
        error = row_errors(weight, hessian, dequantize(codes, scale, zero_point, qmax))
        better = (error < least)[..., None]
        least = error.minimum(least)
        kept = torch.where(better, codes, kept[0]), torch.where(better, scale, kept[1])
    return kept
