"""Mixed precision inside one matrix: rows of different bits, columns that stay floating point.

Rows meet only in the order of columns, so any row may take its codes from the solve of any bit
width. Columns E that keep floating point are continuous: for any codes of the others, o, the best
of them is known, and what remains is the same problem on a smaller Hessian,

    S    = H_oo - H_oe H_ee^-1 H_eo                 the others are solved on this
    w_e += (w_o - q_o) H_oe H_ee^-1                 then the error is e_o S e_o^T

by which they take up as much of the rounding error as they can.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from . import knapsack, ops
from .hessian import damped, inverse, permuted, revive
from .result import SolveReport, dequantize, row_errors
from .solver import DAMP_LADDER, SMALLEST_RETRY, solve
from .spec import QuantSpec, check_bits

Criterion = Literal["activation", "sensitivity"]
BITS = (2, 3, 4, 5, 6, 8)
OF_A_SHAPE = ("scale", "zero_point", "window")  # options of `solve` that fit one matrix alone


@dataclass(frozen=True)
class RowBitsResult:
    """codes uint8 [..., R, C]; scale and zero_point float32 [..., R, G] in original column order.

    bits: of each row, int64 [..., R]; its codes are 0 to 2**bits - 1. spec: of all but the bits.
    report: of all rows together; damping and fallback are the worst of any width that was solved.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    spec: QuantSpec
    report: SolveReport

    def dequantize(self) -> Tensor:
        """(codes - zero_point) * scale, or that of the codebook; float32 [..., R, C]"""
        return dequantize(self.codes, self.scale, self.zero_point, self.spec.levels)


def solve_row_bits(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    mean_bits: float,
    bits: Sequence[int] = BITS,
    **options: Any,
) -> RowBitsResult:
    """`solve`, with the bits of each row chosen for the least layer error, `mean_bits` on average.

    weight, hessian, options: as in `solve`; spec: of all rows, but for its bits. mean_bits: of all
    rows, of all problems of a batch, at most. bits: widths that a row may have.

    The whole matrix is solved at each width, and each row is taken from one of the solves: of all
    such choices the one of least error. On ten layers of all-MiniLM-L6-v2, per channel, that lowers
    the held-out layer error by 2 % (`python -m benchmarks.accuracy.layers --model minilm --mixed`).

    ValueError as of `solve`, where `mean_bits` is below the smallest width, and for a share of
    zeros: it is one of the whole matrix, not of its rows.
    """
    if spec.share:
        raise ValueError(
            f"sparsity {spec.sparsity} is a share of the whole matrix; rows of several solves "
            "have none in particular: choose an N:M pattern"
        )
    widths = check_bits(bits)
    limit = knapsack.whole_bits(mean_bits, math.prod(weight.shape[:-1]))
    if mean_bits < widths[0]:
        raise ValueError(f"mean_bits {mean_bits} is too small: {widths[0]} is the least possible")
    options = {**options, "measure": True}
    results = [solve(weight, hessian, replace(spec, bits=b), **options) for b in widths]
    reports = [result.report for result in results]
    row_error = torch.stack([cast(Tensor, report.row_error) for report in reports], -1)
    rows = row_error.flatten(0, -2).cpu().numpy()  # of each row, by width
    costs = [np.array(widths, dtype=np.float64)] * len(rows)
    chosen = knapsack.choose(list(rows), costs, limit)
    index = torch.tensor(chosen, device=weight.device).reshape(weight.shape[:-1])

    def pick(tensors: Sequence[Tensor]) -> Tensor:
        """[..., R, n] each  ->  [..., R, n], rows from the solve that was chosen for them"""
        stacked = torch.stack(list(tensors), -2)  # [..., R, widths, n]
        where = index[..., None, None].expand(*index.shape, 1, stacked.shape[-1])
        return stacked.gather(-2, where).squeeze(-2)

    return RowBitsResult(
        codes=pick([result.codes for result in results]),
        scale=pick([result.scale for result in results]),
        zero_point=pick([result.zero_point for result in results]),
        bits=torch.tensor(widths, device=weight.device)[index],
        spec=spec,
        report=replace(
            reports[0],
            row_error=row_error.gather(-1, index[..., None]).squeeze(-1),
            damp=torch.stack([report.damp for report in reports]).amax(0),
            fallback=torch.stack([report.fallback for report in reports]).any(0),
        ),
    )


@dataclass(frozen=True)
class FloatColumnsResult:
    """codes uint8 [..., R, C]; scale and zero_point float32 [..., R, G] in original column order.

    columns: int64 [..., K], ascending, that keep floating point; their codes stand for 0.
    kept: their weights, [..., R, K] in the dtype that was asked for. report: of the whole matrix.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: Tensor
    kept: Tensor
    spec: QuantSpec
    report: SolveReport

    @property
    def mean_bits(self) -> float:
        """Of a weight, without scales and zero points; a column that is kept has no codes."""
        columns, kept = self.codes.shape[-1], self.columns.shape[-1]
        width = torch.finfo(self.kept.dtype).bits
        return (self.spec.bits * (columns - kept) + width * kept) / columns

    def dequantize(self) -> Tensor:
        """As of `SolveResult`, kept columns in their places; float32 [..., R, C]"""
        quantized = dequantize(self.codes, self.scale, self.zero_point, self.spec.levels)
        where = self.columns[..., None, :].expand(self.kept.shape)
        return quantized.scatter_(-1, where, self.kept.float())


def solve_float_columns(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    count: int,
    criterion: Criterion = "sensitivity",
    dtype: torch.dtype = torch.float16,
    damp: float = 0.01,
    **options: Any,
) -> FloatColumnsResult:
    """`solve`, but that `count` columns keep floating point and compensate for all the others.

    weight, hessian, spec, damp, options: as in `solve`. count: 1 to C - 1, in each problem.
    criterion: which columns, those of the largest H_cc ("activation", as in OWQ, arXiv 2306.02272)
        or of the largest sensitivity S_c = sum_r (w_rc - Q(w_rc))^2 / (H^-1)_cc ("sensitivity").
    dtype: of the kept weights, torch.float16, bfloat16 or float32.

    Grids are found without the kept columns. For the codes that were found the kept weights are the
    best ones, before they are rounded to `dtype`, for the damped H. ValueError as of `solve`, where
    a kept weight is beyond `dtype`, where H is not positive definite with any damping that `solve`
    tries, and for a sparsity, which the kept columns would take part in.

    On ten layers of all-MiniLM-L6-v2, 3 and 4 bits per channel, 3 % of columns by sensitivity lower
    the held-out layer error by 13 %, by activation by 12 %. The .4 bits per weight that they take
    would lower it by 38 to 40 %, if all columns had them: what is kept is for columns that a file
    or a kernel wants so (`python -m benchmarks.accuracy.layers --model minilm --mixed`).
    """
    if spec.sparsity is not None:
        raise ValueError(f"sparsity must be None beside columns that are kept, got {spec.sparsity}")
    # what `solve` would refuse: the matrices first, then its options, the order among them
    options = {**options, "measure": False}
    solve(weight, hessian, spec, damp=damp, **{**options, "order": "nearest"})
    others = {key: value for key, value in options.items() if key not in OF_A_SHAPE}
    solve(torch.ones(1, 1), torch.ones(1, 1), QuantSpec(), **{**others, "backend": "reference"})
    columns = weight.shape[-1]
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < columns:
        raise ValueError(f"count must be an integer from 1 to {columns - 1}, got {count!r}")
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be one of {get_args(Criterion)}, got {criterion!r}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.float16, bfloat16 or float32, got {dtype}")
    batch = weight.shape[:-2]
    h = hessian.detach()
    h = (h if h.dtype == torch.float64 else h.float()).reshape(-1, columns, columns)
    w = weight.detach().float().reshape(-1, *weight.shape[-2:])
    h = h.expand(len(w), -1, -1)
    revived, dead = revive(h)
    matrix, inverse_, used = _positive_definite(revived, damp)
    if criterion == "activation":
        rank = matrix.diagonal(dim1=1, dim2=2)
    else:
        rank = _sensitivity(w, inverse_, spec, options.get("backend", "auto"))
    kept = rank.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values

    each = torch.arange(len(w), device=w.device)[:, None]
    lower = torch.linalg.cholesky(permuted(matrix, kept))
    answer = torch.cholesky_solve(matrix[each, kept], lower)  # H_ee^-1 H_e: [B, K, C]
    schur = matrix - matrix[each, kept].mT @ answer
    schur = (schur + schur.mT) / 2
    mask = torch.zeros(len(w), columns, dtype=torch.bool, device=w.device)
    mask[each, kept] = True
    # kept columns stay in their places, as zeros that never fire: they round to 0 without error
    schur.masked_fill_(mask[:, :, None] | mask[:, None, :], 0)
    rest = w.masked_fill(mask[:, None, :], 0)
    result = solve(rest, schur, spec, damp=0.0, **options)

    error = (rest - result.dequantize()).to(answer.dtype)  # [B, R, C], 0 in the kept columns
    where = kept[:, None, :].expand(-1, w.shape[1], -1)
    exact = w.gather(2, where) + (error @ answer.mT)
    values = exact.to(dtype)
    if not values.isfinite().all():
        raise ValueError(f"kept weights reach {exact.abs().max().item():.3g}, beyond {dtype}")

    quantized = result.dequantize().scatter_(2, where, values.float())
    return FloatColumnsResult(
        codes=result.codes.reshape(weight.shape),
        scale=result.scale.reshape(*weight.shape[:-1], -1),
        zero_point=result.zero_point.reshape(*weight.shape[:-1], -1),
        columns=kept.reshape(*batch, -1),
        kept=values.reshape(*weight.shape[:-1], -1),
        spec=spec,
        report=replace(
            result.report,
            row_error=row_errors(w, h, quantized).reshape(weight.shape[:-1]),
            row_energy=row_errors(w, h).reshape(weight.shape[:-1]),
            damp=used.maximum(result.report.damp).reshape(batch),
            dead_columns=dead.reshape(batch),
            fallback=result.report.fallback.reshape(batch),
        ),
    )


def _positive_definite(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """The damped H, its inverse, and the damping: the first of the ladder that works for all."""
    for rung in (damp, *(max(damp, SMALLEST_RETRY) * factor for factor in DAMP_LADDER)):
        a, solved = inverse(hessian, rung)
        if solved.all():
            used = torch.full((len(hessian),), rung, dtype=torch.float64, device=hessian.device)
            return damped(hessian, rung), a, used
    raise ValueError(f"hessian is not positive definite, damped by up to {rung:g} of its diagonal")


def _sensitivity(weight: Tensor, inverse: Tensor, spec: QuantSpec, backend: ops.Backend) -> Tensor:
    """What rounding each column would cost if all others compensated for it; [B, C]"""
    B, _, C = weight.shape
    size = spec.columns_per_group(C)
    _, scale, zero_point = ops.quantize_groups(
        weight, size, spec.levels, spec.symmetric, spec.shrink, backend=backend
    )
    group = (torch.arange(C, device=weight.device) // size).expand(B, C)
    diagonal = inverse.diagonal(dim1=1, dim2=2).float()
    return ops.column_sensitivity(weight, scale, zero_point, group, diagonal, spec.levels, backend)
