"""The solver: a weight and a Hessian in, codes on a grid out. Tensors only.

    A = H^-1                                           shared by all rows
    while columns F remain:
        S_c  = sum_r (w_rc - Q(w_rc))^2 / A_cc         sensitivity of column c, on current weights
        T    = the `block` most sensitive columns
        Q_T  = error-feedback loop over T, rows in parallel, the column with the largest
               curvature (A_TT^-1)_cc first; then coordinate descent on (w - q) A_TT^-1 (w - q)^T
        W_F -= (W_T - Q_T) A_TT^-1 A_TF
        A_FF -= A_FT A_TT^-1 A_TF

Both updates are exact for any choice of Q_T (Hassibi & Stork 1993; Frantar & Alistarh 2022,
arXiv 2208.11580). Orders that are known in advance need no inverse: one Cholesky factorization of
the reversed Hessian gives the feedback matrix of the same loop (LDLQ, arXiv 2307.13304).

Where weights have to be zero, those of T are chosen in its loop, a few columns at a time
(`sparsity`), and get no other code in the descent: their error is one with that of rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from . import ops, reference
from .codebook import Codebook
from .grids import given_grid, search_grids
from .hessian import damped, inverse, ldl, permuted, revive
from .memory import LEAST, Rows, ran_out
from .obq import solve_obq
from .ops import Backend, Precision
from .order import static_order
from .refine import curvature, refine
from .result import SolveReport, SolveResult, dequantize, moved, row_errors
from .scales import snapped
from .sparsity import Sparsity, prune_and_solve
from .spec import Order, QuantSpec, Starts
from .tile import bring_both_forward, bring_forward, rows_innermost, to_front
from .tile_solver import by_curvature, solve_tile, starting_points

# factors of the damping, tried one after another while the Hessian is not positive definite
DAMP_LADDER = (10.0, 100.0, 1000.0, 10000.0)
SMALLEST_RETRY = 1e-4  # what a retry multiplies where `damp` is smaller
MAX_CANDIDATES = 12
MODERATE = 40  # the exponent of the largest H_cc: beyond it, products may leave float32


def solve(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    order: Order = "sensitivity",
    block: int = 128,
    starts: Starts = 1,
    sweeps: int = 2,
    candidates: int = 1,
    rounds: int = 0,
    damp: float = 0.01,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    window: int = 1,
    precision: Precision = "tf32x3",
    measure: bool = True,
    backend: Backend = "auto",
    rows: Rows | None = None,
) -> SolveResult:
    """Quantize one weight matrix, or a batch of them, with the least output error the order allows.

    weight: [R, C] or [B, R, C], any floating dtype (computed in float32).
    hessian: 2/n X^T X of the layer's inputs, [C, C], or [B, C, C] for one per problem; [C, C] with
        a batched weight is shared by all rows of all problems, which are then solved as one.
        float64 Hessians are factored in float64.
    order: which columns go first, so that the later ones can compensate for them.
        "sensitivity" (re-ranked for each tile), "sensitivity-static" (ranked once),
        "activation" (largest H_cc first: GPTQ's act-order), "min-pivot" (smallest pivot of the
        LDL factorization last, arXiv 2507.18553), "natural" (first to last: GPTQ), "obq" (each row
        greedy by itself: exact OBQ), "nearest" (no compensation: the baseline).
    block: columns that are solved between two updates of the rest, in orders "sensitivity" and
        "obq"; the other orders do not depend on it.
    starts: orders of the columns of a tile that are tried, each with its sweeps: by curvature, then
        random ones, the same in every call. Each row keeps the codes that cost it least, given that
        the rest compensates. "obq": one order for each row, that of OBQ; its many inverses make it
        slow. Only in order "sensitivity".
    sweeps: passes of coordinate descent over each tile before the rest takes up its error; only in
        order "sensitivity".
    candidates: grids that are solved for each row, which keeps the one of least error: that of
        `spec`, then that of the search "hessian", then this one with zero points one higher and one
        lower, unless symmetric, and stretched by .94, 1.06, .88, 1.12, and so on up to
        MAX_CANDIDATES. One for scale_search "absmax", which is no search, a given
        grid, order "nearest", and a share of zeros, which rows compete for.
    rounds: of refinement after the loop, over whole rows: a least-squares refit of the scales (not
        of a given grid) to the codes, and a sweep of coordinate descent over all columns; each row
        keeps the best codes and scales that it had. Not in order "nearest".
    damp: added to the diagonal, as a fraction of its mean over live columns. Where the Hessian is
        not positive definite it is raised tenfold, up to four times; at the end of that ladder the
        weight is rounded to nearest. Either is in the report.
    scale, zero_point: an external grid [R, G] or [B, R, G], G = C / group_size. Without a
        zero_point a symmetric spec takes the middle code, one with a codebook 0.
    window: columns of one input channel, the positions of a convolution's window: the groups of an
        N:M sparsity are M channels at one position. Nothing else depends on it.
    precision: of the kernels' matrix products: "ieee" (float32), "tf32x3" (three products on tensor
        cores, of leading and trailing bits), "tf32" (one, of ten bits of mantissa). On the layers
        of all-MiniLM-L6-v2 at 4 bits tf32x3 changed 1 code in 100,000 and no layer error by more
        than 1e-4, tf32 1 in 300, and layer errors by -0.3 to +0.4 %, 0 on average
        (`python -m benchmarks.accuracy.precision`, which imitates the arithmetic on a CPU). What
        PyTorch multiplies is float32, unless `torch.set_float32_matmul_precision` says otherwise.
    measure: also compute the errors of the report, which takes two products of R x C by C x C.
    rows: who works on which rows: `ranks.SharedRows` where several processes make this call with
        the same arguments, and get the same result. Here on all of them by default.

    With `spec.sparsity` the weights that become zero are chosen on the way. A share of them goes in
    every few columns, over all rows: exactly round(share * R * C) of each problem, beside those
    that are rounded to zero. Groups of an N:M pattern stay together in every order: the summed
    sensitivities of their columns place them, or in a static order the mean place of their columns.
    "nearest" prunes by magnitude; "obq" does not prune.

    Peak memory beyond the arguments is (k C^2 + m R C) numbers of float32, for a float32 Hessian
    and beside panels of 512 columns. k: 1, with `rounds` 2; one more where columns never fired, and
    where the Hessian is not contiguous; inverses on a GPU hold 2 while they are made. For C =
    53,248 each is 11.3 GB, as is the Hessian. m: about 1.25 candidates in order "sensitivity",
    beside tiles, of which several starts hold five more, and 2.5 candidates in static orders;
    later, in `rounds`, 7, or 9 in groups of fewer than 16 columns.
    Where memory runs out, what is done row by row is done for half of the rows at a time, and so
    on: in tests on a CPU to the same bits, on a GPU but for the products of PyTorch, which may sum
    otherwise for fewer rows. Of m that leaves 1.25 candidates in order "sensitivity", and .25
    candidates in static ones; a share of zeros is chosen among all rows, and leaves them together.
    Where this does not help, a GPU hands over to the CPU. All of it is told in `report.notes`.

    Columns whose inputs were always zero (H_cc = 0) are rounded to nearest, and pruned as if their
    inputs were of average size. The same inputs on the same device give the same codes. ValueError
    for wrong shapes, dtypes, devices, or values.
    """
    sparsity = _check(weight, hessian, spec, order, damp, window)
    for name, value, least in (
        ("block", block, 1), ("starts", starts, 1), ("sweeps", sweeps, 0),
        ("candidates", candidates, 1), ("rounds", rounds, 0),
    ):  # fmt: skip
        if name == "starts" and value == "obq":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            other = ", or 'obq'" if name == "starts" else ""
            raise ValueError(f"{name} must be an integer of at least {least}{other}, got {value!r}")
    if starts == "obq" and order == "sensitivity" and sparsity is not None:
        raise ValueError("starts 'obq' does not prune, as the sparsity of the spec asks for")
    if candidates > MAX_CANDIDATES:
        raise ValueError(f"candidates must be at most {MAX_CANDIDATES}, got {candidates}")
    ops.uses_triton(weight, backend)  # refuses a backend, or a precision, before any work is done
    ops.dot_precision(precision)
    options: dict[str, Any] = dict(
        order=order, block=block, starts=starts, sweeps=sweeps, candidates=candidates,
        rounds=rounds, damp=damp, precision=precision, measure=measure, sparsity=sparsity,
    )  # fmt: skip
    tensors = weight.detach(), hessian.detach(), scale, zero_point
    rows = rows or Rows(least=1 if order == "obq" else LEAST)
    try:
        return _solve(*tensors, spec, **options, backend=backend, rows=rows)
    except Exception as error:
        if weight.device.type == "cpu" or rows.shared or not ran_out(error):
            raise
    return _solve_on_cpu(*tensors, spec, options, rows)


def _solve_on_cpu(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    spec: QuantSpec,
    options: dict[str, Any],
    tried: Rows,
) -> SolveResult:
    """The last resort where a device has too little memory; the result is on that device."""
    device = weight.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows = Rows(tried.least)
    result = _solve(
        weight.cpu(), hessian.cpu(),
        None if scale is None else scale.cpu(), None if zero_point is None else zero_point.cpu(),
        spec, **options, backend="reference", rows=rows,
    )  # fmt: skip
    note = f"out of memory on {device}"
    if tried.failed:
        note += f", with {', '.join(map(str, tried.failed))} rows at a time"
    report = replace(result.report, notes=(f"{note}: solved on the CPU", *rows.notes))
    return moved(replace(result, report=report), device)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    spec: QuantSpec,
    *,
    order: Order,
    block: int,
    starts: Starts,
    sweeps: int,
    candidates: int,
    rounds: int,
    damp: float,
    precision: Precision,
    measure: bool,
    sparsity: Sparsity | None,
    backend: Backend,
    rows: Rows,
) -> SolveResult:
    """`solve`, its arguments checked, on one device."""
    batch, columns = weight.shape[:-2], weight.shape[-1]
    h = hessian if hessian.dtype == torch.float64 else hessian.float()
    # contiguous: products of matrices may sum in another order for other strides
    h = h.reshape(-1, columns, columns).contiguous()
    # problems that share a Hessian are one problem with more rows
    w = weight.float().reshape(len(h), -1, columns).contiguous()
    revived, dead = revive(_moderate(h))
    given = scale is not None
    if spec.scale_search == "absmax" or order == "nearest" or given or spec.share:
        candidates = 1
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point was given without a scale")
        scale, zero_point = search_grids(w, revived, spec, order, candidates, damp, backend, rows)
    else:
        scale, zero_point = given_grid(w, spec, scale, zero_point)

    # a share of zeros is of all rows together
    parts = rows if sparsity is None or sparsity.group > 1 else Rows(least=w.shape[1])
    solver = _solver(order, block, starts, sweeps, precision, backend, sparsity, parts)
    nearest = partial(_solve_nearest, sparsity=sparsity)
    codes, ranked, used_damp, fallback = _climb(
        solver, nearest, w, revived, damp, scale, zero_point, spec.levels
    )
    if order != "nearest" and candidates + rounds > 1:
        snap = None if given else partial(snapped, spec=spec)
        codes, scale, zero_point = _improve(
            w, damped(revived, used_damp).float(), codes, scale, zero_point, ranked, spec.levels,
            fallback, rounds=rounds, snap=snap, sparse=sparsity is not None,
            precision=precision, backend=backend, rows=rows,
        )  # fmt: skip
    errors, energies = None, None
    if measure:

        def quantized(part: Any) -> Tensor:
            return dequantize(codes[part], scale[part], zero_point[part], spec.levels)

        errors = row_errors(w, h, quantized).reshape(weight.shape[:-1])
        energies = row_errors(w, h).reshape(weight.shape[:-1])

    def per_problem(value: Tensor) -> Tensor:
        return value.expand(batch) if batch else value.reshape(())

    report = SolveReport(
        row_error=errors,
        row_energy=energies,
        damp=per_problem(used_damp),
        dead_columns=per_problem(dead),
        fallback=per_problem(fallback),
        order=order,
        block=block,
        notes=rows.notes,
    )
    return SolveResult(
        codes=codes.reshape(weight.shape),
        scale=scale.reshape(*weight.shape[:-1], -1),
        zero_point=zero_point.reshape(*weight.shape[:-1], -1),
        columns=None if order == "obq" else ranked.expand(*batch or (1,), -1).reshape(*batch, -1),
        spec=spec,
        report=report,
    )


def _check(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    order: Order,
    damp: float,
    window: int,
) -> Sparsity | None:
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        raise ValueError(
            f"weight must be [R, C] or [B, R, C], none empty, got {list(weight.shape)}"
        )
    columns = weight.shape[-1]
    legal = [(columns, columns), (*weight.shape[:-2], columns, columns)]
    if tuple(hessian.shape) not in legal:
        raise ValueError(
            f"hessian must be {' or '.join(str(list(s)) for s in dict.fromkeys(legal))} for a "
            f"weight of {list(weight.shape)}, got {list(hessian.shape)}"
        )
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if hessian.device != weight.device:
        raise ValueError(f"hessian is on {hessian.device}, weight on {weight.device}")
    for name, tensor, dtype in (
        ("weight", weight, torch.float32), ("hessian", hessian, hessian.dtype),
    ):  # fmt: skip
        if tensor.sum(dtype=dtype).isfinite():
            continue
        if not (finite := tensor.to(dtype).isfinite()).all():
            where = (~finite).nonzero()[0].tolist()
            value = tensor[tuple(where)].item()
            raise ValueError(f"{name} must be finite in {dtype}, got {value} at {where}")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if (diagonal < 0).any():
        raise ValueError(f"hessian has a negative diagonal ({diagonal.min().item()}): not X^T X")
    skew = _skew(hessian)
    if skew > 1e-3 * diagonal.amax():
        raise ValueError(f"hessian must be symmetric, but H - H^T reaches {skew.item():.3g}")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < float("inf"):
        raise ValueError(f"damp must be a finite number, not negative, got {damp!r}")
    spec.columns_per_group(columns)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or columns % window:
        raise ValueError(f"window must be a divisor of {columns} columns, got {window!r}")
    sparsity = Sparsity.of(spec, columns, window)
    if sparsity is not None and order == "obq":
        raise ValueError(
            "order 'obq' does not prune, as the sparsity of the spec asks for: choose another one, "
            "or prune by dropin.TrueOBS, whose quantize(keep_zeros=True) is exact OBQ on the others"
        )
    return sparsity


def _skew(matrix: Tensor) -> Tensor:
    """max |H - H^T|, a pair of blocks at a time: a transposed block stays in a CPU's cache."""
    C = matrix.shape[-1]
    step = 256 if matrix.device.type == "cpu" else 4096
    blocks = [slice(start, start + step) for start in range(0, C, step)]
    return torch.stack([
        (matrix[..., i, j] - matrix[..., j, i].mT).abs_().amax()
        for number, i in enumerate(blocks)
        for j in blocks[: number + 1]
    ]).amax()  # fmt: skip


def _moderate(hessian: Tensor) -> Tensor:
    """H times a power of two, where H^-1 or products with it would leave the range of float32.

    No bit of the codes depends on such a factor. [B, C, C]  ->  itself or a copy
    """
    exponent = torch.frexp(hessian.diagonal(dim1=1, dim2=2).amax(1)).exponent
    extreme = exponent.abs() > MODERATE
    if not extreme.any():
        return hessian
    factor = torch.where(extreme, -exponent.double(), 0).clamp(-1000, 1000).exp2()
    return (hessian.double() * factor[:, None, None]).to(hessian)


def _finite(matrix: Tensor) -> Tensor:
    """Whether all elements are: [B, ...]  ->  bool [B], without a copy"""
    low, high = matrix.flatten(1).aminmax(dim=1)
    return low - low == high - high  # 0, but NaN of what is infinite or NaN


def _improve(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    columns: Tensor,
    levels: int | Codebook,
    fallback: Tensor,
    *,
    rounds: int,
    snap: Callable[..., Tensor] | None,
    sparse: bool,
    precision: Precision,
    backend: Backend,
    rows: Rows,
) -> tuple[Tensor, ...]:
    """The best candidate of each row, refined; but for problems that were rounded to nearest.

    weight [B, R, C], codes and grids [B, candidates R, ...]  ->  codes, scale, zero_point
    """
    R = weight.shape[1]
    best = _least(weight, hessian, codes, scale, zero_point, levels, fallback, rows)
    if not rounds:
        return best
    steps = curvature(hessian, columns)

    def refined(part: slice) -> tuple[Tensor, ...]:
        w, code, s, z = (t[:, part] for t in (weight, *best))
        new = refine(
            w, hessian, steps, code, s, z, columns, levels,
            rounds=rounds, snap=snap and partial(snap, weight=w, zero_point=z), sparse=sparse,
            precision=precision, backend=backend,
        )  # fmt: skip
        return tuple(
            torch.where(fallback[:, None, None], *pair) for pair in zip((code, s), new, strict=True)
        )

    return *rows.map(R, refined), best[2]


def _least(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    levels: int | Codebook,
    fallback: Tensor,
    rows: Rows,
) -> tuple[Tensor, ...]:
    """Of the candidates of each row the one of least error, the first of equals.

    weight [B, R, C], hessian [B, C, C], codes and grids [B, candidates R, ...], fallback bool [B]
    """
    R = weight.shape[1]
    stacked = [t.unflatten(1, (-1, R)) for t in (codes, scale, zero_point)]

    def picked(part: slice) -> tuple[Tensor, ...]:
        candidates = [t[:, :, part] for t in stacked]
        errors = [
            row_errors(weight[:, part], hessian, dequantize(c, s, z, levels))
            for c, s, z in zip(*(t.unbind(1) for t in candidates), strict=True)
        ]
        best = torch.stack(errors, 1).argmin(1).masked_fill(fallback[:, None], 0)
        index = best[:, None, :, None]
        return tuple(
            t.take_along_dim(index.expand(-1, 1, -1, t.shape[3]), 1)[:, 0] for t in candidates
        )

    return rows.map(R, picked)


# weight [B, R, C], hessian [B, C, C], damp, scale, zero_point [B, N, G], qmax
# -> codes uint8 [B, N, C], order of columns int64 [B, C], solved bool [B]
# N = candidates R: those of a row are rows of one problem, which share its factors and its order
Solved = tuple[Tensor, Tensor, Tensor]
Solver = Callable[[Tensor, Tensor, float, Tensor, Tensor, int | Codebook], Solved]


def _solver(
    order: Order,
    block: int,
    starts: Starts,
    sweeps: int,
    precision: Precision,
    backend: Backend,
    sparsity: Sparsity | None,
    rows: Rows,
) -> Solver:
    if order == "nearest":
        return partial(_solve_nearest, sparsity=sparsity)
    if order == "obq":
        return partial(_solve_greedy, block=block, precision=precision, backend=backend, rows=rows)
    if order == "sensitivity":
        return partial(
            _solve_reranked, block=block, starts=starts, sweeps=sweeps, precision=precision,
            backend=backend, sparsity=sparsity, rows=rows,
        )  # fmt: skip
    return partial(
        _solve_static, order=order, precision=precision, backend=backend, sparsity=sparsity,
        rows=rows,
    )  # fmt: skip


def _repeated(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [B, R, C] for each candidate among the grids [B, N, G]: [B, N, C]"""
    candidates = scale.shape[1] // weight.shape[1]
    return weight if candidates == 1 else weight.repeat(1, candidates, 1)


def _climb(
    solver: Solver,
    nearest: Solver,
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve with the first damping of the ladder that works for each problem, else round.

    ->  codes uint8 [B, R, C], order of columns int64 [B, C], damping [B], fallback bool [B]
    """
    codes, columns, solved = solver(weight, hessian, damp, scale, zero_point, qmax)
    used = torch.full((len(weight),), damp, dtype=torch.float64, device=weight.device)
    fallback = torch.zeros_like(solved)
    left = (~solved).nonzero()[:, 0]
    if len(left):
        columns = columns.clone()

    def again(solver: Solver, damp: float) -> Solved:
        """What is left; no copies are made where that is all."""
        w, h, s, z = (
            t if len(left) == len(t) else t[left] for t in (weight, hessian, scale, zero_point)
        )
        return solver(w, h, damp, s, z, qmax)

    for factor in DAMP_LADDER:
        if len(left) == 0:
            break
        rung = max(damp, SMALLEST_RETRY) * factor
        codes[left], columns[left], solved = again(solver, rung)
        used[left] = rung
        left = left[~solved]
    if len(left):
        fallback[left] = True
        codes[left], columns[left], _ = again(nearest, damp)
    return codes, columns, used, fallback


def _solve_nearest(
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
    *,
    sparsity: Sparsity | None,
) -> Solved:
    """Round to nearest, blind to the Hessian: the baseline, and the last resort."""
    weight = _repeated(weight, scale)
    natural = torch.arange(weight.shape[2], device=weight.device).expand(len(weight), -1)
    if sparsity is not None:  # by magnitude
        weight = weight.masked_fill(sparsity.cheapest(weight.abs(), natural, 0), 0)
    grouped = weight.unflatten(2, (scale.shape[2], -1))
    code = reference.to_code(grouped, scale[..., None], zero_point[..., None], qmax)
    solved = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    return code.flatten(2).to(torch.uint8), natural, solved


def _solve_static(
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
    *,
    order: Order,
    precision: Precision,
    backend: Backend,
    sparsity: Sparsity | None,
    rows: Rows,
) -> Solved:
    """One factorization, then the error-feedback loop over all columns in a fixed order."""
    B, R, C = weight.shape
    scale, zero_point = rows_innermost(scale), rows_innermost(zero_point)
    columns, ranked = static_order(
        order, _repeated(weight, scale) if order == "sensitivity-static" else weight,
        hessian, damp, scale, zero_point, qmax, backend,
    )  # fmt: skip
    if sparsity is not None:
        columns = columns.gather(1, sparsity.in_steps(columns))
    as_it_is = order == "natural" and sparsity is None
    factor, pivots, solved = ldl(hessian, damp, None if as_it_is else columns)
    feedback, solved = factor.float(), solved & ranked
    del factor
    each = torch.arange(B, device=weight.device)[:, None]

    def part_of(part: slice) -> tuple[Tensor, ...]:
        now = weight
        if (part.start, part.stop) != (0, R):  # of some rows, or of several candidates
            now = weight[:, torch.arange(part.start, part.stop, device=weight.device) % R]
        w = now.mT[each, columns].mT  # rows innermost: a column of all rows is contiguous
        del now
        grid = (scale[:, part], zero_point[:, part], columns // (C // scale.shape[2]), qmax)
        if sparsity is None:
            codes, error = ops.solve_columns(w, w, feedback, *grid, precision, backend)
        else:
            codes, error, _ = prune_and_solve(
                w, feedback, pivots.float(), *grid, precision, backend, sparsity, columns, 0
            )
        original = torch.empty_like(codes.mT)
        original[each, columns] = codes.mT
        finite = _finite(error.mT)[:, None, None].expand(-1, codes.shape[1], 1)
        return original.mT, finite.contiguous()

    codes, finite = rows.map(scale.shape[1], part_of)
    return codes, columns, solved & finite.all(1)[:, 0]


def _solve_reranked(
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
    *,
    block: int,
    starts: Starts,
    sweeps: int,
    precision: Precision,
    backend: Backend,
    sparsity: Sparsity | None,
    rows: Rows,
) -> Solved:
    """Tile after tile: rank the remaining columns, quantize the most sensitive, update the rest."""
    B, R, C = weight.shape
    group_size = C // scale.shape[2]
    if sparsity is not None:
        block = sparsity.whole(block)
    scale, zero_point = rows_innermost(scale), rows_innermost(zero_point)
    a, solved = inverse(hessian, damp)
    a = a.float()
    # what is quantized lies in front of `start`, in order; what remains, behind it
    w = weight.mT.repeat(1, 1, scale.shape[1] // R)  # [B, C, N]
    columns = torch.arange(C, device=w.device).repeat(B, 1)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)  # in the original order
    each = torch.arange(B, device=w.device)[:, None]
    sensitivity = ops.column_sensitivity(
        w.mT, scale, zero_point, columns // group_size, a.diagonal(dim1=1, dim2=2), qmax, backend
    )
    for start in range(0, C, block):
        rest, end = slice(start, C), min(start + block, C)
        tile, behind = slice(start, end), slice(end, C)
        if sparsity is None:
            picked = sensitivity.argsort(dim=1, descending=True, stable=True)[:, : end - start]
        else:
            picked = sparsity.largest(sensitivity, columns[:, rest], end - start)
        picked = picked.gather(1, by_curvature(permuted(a[:, rest, rest], picked)))
        if sparsity is not None:
            picked = picked.gather(1, sparsity.in_steps(columns[:, rest].gather(1, picked)))
        move = to_front(picked, C - start)
        bring_forward(w[:, rest], move, 1)
        bring_forward(columns[:, rest], move, 1)
        bring_both_forward(a[:, rest, rest], move)

        begun, positive = starting_points(a[:, tile, tile], 1 if starts == "obq" else starts)
        code, error = rows.map(
            w.shape[2],
            partial(
                solve_tile, w[:, tile].mT, begun, scale, zero_point,
                columns[:, tile] // group_size, qmax, columns=columns[:, tile],
                greedy=a[:, tile, tile] if starts == "obq" else None,
                sweeps=sweeps if end - start > 1 else 0, before=start,
                precision=precision, backend=backend, sparsity=sparsity,
            ),
        )  # fmt: skip
        codes[each, columns[:, tile]] = code.mT
        solved = solved & positive & _finite(error.mT)
        if end < C:
            root = begun[0].root
            v = root.mT @ a[:, tile, behind]
            cost = ops.compensate(
                w[:, behind].mT, error @ root, v,
                scale, zero_point, columns[:, behind] // group_size, qmax, precision, backend,
            )  # fmt: skip
            ops.downdate(a[:, behind, behind], v, precision, backend)
            sensitivity = cost / a[:, behind, behind].diagonal(dim1=1, dim2=2)
        del code, error  # else they stay until the next tile is done
    return codes.mT, columns, solved


def _solve_greedy(
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int | Codebook,
    *,
    block: int,
    precision: Precision,
    backend: Backend,
    rows: Rows,
) -> Solved:
    """Exact OBQ; it has no order of columns, so the natural one stands in its place."""
    B, _, C = weight.shape
    a, solved = inverse(hessian, damp)
    natural = torch.arange(C, device=weight.device).expand(B, C)
    codes, finite = solve_obq(
        _repeated(weight, scale), a.float(), scale, zero_point, natural // (C // scale.shape[2]),
        qmax, block, precision, backend, rows,
    )  # fmt: skip
    return codes, natural, solved & finite
