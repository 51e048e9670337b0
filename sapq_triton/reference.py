"""The mathematics in PyTorch and NumPy: ground truth of the tests, and the path on a CPU.

Shapes: B problems of one shape (groups of a convolution, experts), R rows (out features), C columns
(in features), G groups of columns, T columns of a tile, F columns still unquantized. Floating point
arguments may be float32 or float64; nothing here checks its arguments (`ops` does).

A grid is scale, zero_point and qmax, the largest code; where a codebook stands in place of qmax,
code and value are those of `Codebook`, and the zero point counts for nothing.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .codebook import Codebook
from .packing import unpack
from .window import Window

LEAF = 16  # columns that `solve_columns` does not halve again
COST_ELEMENTS = 2**16  # weights whose rounding is tried at a time
PATCH_ELEMENTS = 2**20  # unfolded inputs of a convolution held at a time


def to_code(w: Tensor, scale: Tensor, zero_point: Tensor, qmax: int | Codebook) -> Tensor:
    """clamp(round(w / scale) + zero_point, 0, qmax), ties to even; as floating point."""
    x = w / scale
    if isinstance(qmax, Codebook):
        # one comparison after another, in memory that is reused: faster than a binary search
        rank, above = torch.zeros_like(x), torch.empty_like(x)
        for bound in qmax.bounds:
            rank += torch.gt(x, bound, out=above)
        return _look_up(qmax.ascending, rank)
    return x.round_().add_(zero_point).clamp_(0, qmax)


def to_value(code: Tensor, scale: Tensor, zero_point: Tensor, qmax: int | Codebook) -> Tensor:
    if isinstance(qmax, Codebook):
        return _look_up(qmax.levels, code).mul_(scale)
    return (code - zero_point) * scale


def _look_up(table: tuple[float, ...], index: Tensor) -> Tensor:
    """table[index], in the shape and dtype of index, which is floating point"""
    values = torch.tensor(table, dtype=index.dtype, device=index.device)
    return values.index_select(0, index.int().flatten()).view(index.shape)


def per_column(grid: Tensor, group: Tensor) -> Tensor:
    """grid [B, R, G], group int64 [B, F]  ->  [B, R, F], or [B, R, 1] where G is 1"""
    if grid.shape[2] == 1:
        return grid
    return grid.gather(2, group[:, None, :].expand(-1, grid.shape[1], -1))


def quantize_groups(
    weight: Tensor,
    group_size: int,
    qmax: int | Codebook,
    symmetric: bool,
    shrink: tuple[float, ...],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group to its own grid; the range is shrunk to the fraction of least squared error.

        sum_c importance_c (Q(w_c) - w_c)**2, importance 1 where none is given

        symmetric:   scale = max|w| / (qmax / 2)           zero_point = (qmax + 1) / 2
        asymmetric:  low, high = min(w, 0), max(w, 0)
                     scale = (high - low) / qmax           zero_point = round(-low / scale)
        codebook:    scale = max|w| / max|level|           zero_point = 0, symmetric only

    weight [B, R, C], importance [B, C]  ->  codes uint8 [B, R, C], scale, zero_point
    [B, R, C / group_size]. A group whose scale is zero (all weights zero) gets scale 1.
    """
    B, R, C = weight.shape
    G = C // group_size
    groups = weight.reshape(B * R * G, group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    scale, zero_point = groups.new_empty(2, len(groups))
    costs = None if importance is None else importance.reshape(B * G, group_size)
    step = max(1, 2**18 // group_size)  # as many groups as stay in cache during the search
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        w = groups[part].T.contiguous()  # groups innermost: their grids then need no broadcast
        cost = None
        if costs is not None:
            group = torch.arange(start, min(start + step, len(groups)), device=weight.device)
            cost = costs[group // (R * G) * G + group % G].T.contiguous()
        scale[part], zero_point[part] = _search_grid(w, qmax, symmetric, shrink, cost)
        codes[part] = to_code(w, scale[part], zero_point[part], qmax).T
    return codes.view(B, R, C), scale.view(B, R, G), zero_point.view(B, R, G)


def _search_grid(
    w: Tensor,
    qmax: int | Codebook,
    symmetric: bool,
    shrink: tuple[float, ...],
    cost: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """w, cost [group_size, N]  ->  scale, zero_point [N]"""
    if isinstance(qmax, Codebook):
        half_range, middle, top = qmax.half_range, 0, 0
    else:
        half_range, middle, top = qmax / 2, (qmax + 1) // 2, qmax
    if symmetric:
        full = w.abs().amax(0) / w.new_full((), half_range)  # a GPU multiplies by 1 / a number
        full = torch.where(full == 0, 1.0, full)
        zero_point = torch.full_like(full, middle)
    else:
        low = w.amin(0).clamp_(max=0)
        full = (w.amax(0).clamp_(min=0) - low) / w.new_full((), top)
        full = torch.where(full == 0, 1.0, full)
        zero_point = (-low / full).round_()
    if len(shrink) == 1:
        return full * shrink[0], zero_point
    best, value = torch.full_like(full, torch.inf), torch.empty_like(w)
    scale, low, high = full, -zero_point, top - zero_point
    for fraction in torch.tensor(shrink, dtype=w.dtype, device=w.device).unbind():
        trial = full * fraction
        if isinstance(qmax, Codebook):
            value = _look_up(qmax.levels, to_code(w, trial, zero_point, qmax))
        else:
            torch.div(w, trial, out=value).round_().clamp_(low, high)
        torch.addcmul(w, value, trial, value=-1, out=value).square_()
        error = (value if cost is None else value.mul_(cost)).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial, scale)
    return scale, zero_point


def column_sensitivity(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    diagonal: Tensor,
    qmax: int | Codebook,
) -> Tensor:
    """S_c = sum_r (w_rc - Q(w_rc))**2 / A_cc: what rounding column c now would cost.

    weight [B, R, F], scale, zero_point [B, R, G], group int64 [B, F] (the group of each column),
    diagonal [B, F] of the inverse Hessian A  ->  [B, F]
    """
    return _rounding_cost(weight, scale, zero_point, group, qmax) / diagonal


def _rounding_cost(
    weight: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, qmax: int | Codebook
) -> Tensor:
    B, R, _ = weight.shape
    step = max(1, COST_ELEMENTS // (B * R))
    parts = []
    for w, g in zip(weight.split(step, 2), group.split(step, 1), strict=True):
        s, z = per_column(scale, g), per_column(zero_point, g)
        value = to_code(w, s, z, qmax)
        if isinstance(qmax, Codebook):
            value = to_value(value, s, z, qmax)
        else:
            value.sub_(z).mul_(s)
        parts.append(value.sub_(w).square_().sum(1))
    return torch.cat(parts, 1)


def solve_columns(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
    pruned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize columns one after another, all rows in parallel.

        w'_k    = running_k + sum_{j < k} error_j * feedback_jk
        code_k  = clamp(round(w'_k / scale) + zero_point, 0, qmax), zero_point where pruned
        error_k = weight_k - (code_k - zero_point) * scale

    weight, running [B, R, C], feedback [B, C, C] unit upper triangular (only the part above the
    diagonal is read), scale, zero_point [B, R, G], group int64 [B, C], pruned bool [B, R, C] or
    None  ->  codes uint8 [B, R, C], error [B, R, C]

    With H = M D M^T, M unit upper triangular, feedback M, and running = weight this is the
    error-feedback form of GPTQ (LDLQ; Chee et al. 2023, arXiv 2307.13304, theorem 6).
    """
    B, R, C = weight.shape
    error = _columns(running)  # w' of a column until its error takes that place
    if error.data_ptr() == running.data_ptr():
        error = error.clone()
    codes = torch.empty(error.shape, dtype=torch.uint8)
    # a column at a time in NumPy, whose calls cost a fraction of PyTorch's; a batch of one without
    # its axis, which would cost a third of the time
    tensors = (_columns(feedback), codes, error, _columns(weight), error.new_empty(B, LEAF, R))
    f, code, e, w, steps = (t[0].numpy() if B == 1 else t.numpy() for t in tensors)
    errors, targets, step_of = (t if B == 1 else t.swapaxes(0, 1) for t in (e, w, steps))
    s, z = _columns(scale).numpy(), _columns(zero_point).numpy()  # [B, G, R]
    grids = s, z, -z, (0 if isinstance(qmax, Codebook) else qmax) - z
    tables = _tables(qmax, e.dtype) if isinstance(qmax, Codebook) else None
    g = group.cpu().numpy()
    zeros = None
    if pruned is not None:
        zeros = _columns(pruned)[0].numpy() if B == 1 else _columns(pruned).numpy().swapaxes(0, 1)
    one_grid = [grid[0, 0] if B == 1 else grid[:, 0] for grid in grids]
    each = np.arange(B)
    value = np.empty_like(errors[0])
    # NumPy's threads and PyTorch's would wait for each other: its products only where both have one
    one_thread = torch.get_num_threads() == 1

    with np.errstate(all="ignore"):  # what overflows is seen in the error
        for start, middle, end in _halves(0, C):
            left, right = slice(start, middle), slice(middle, end)
            if middle > start:
                if one_thread:
                    e[..., right, :] += f[..., right, left] @ e[..., left, :]
                else:
                    error[:, right].baddbmm_(tensors[0][:, right, left], error[:, left])
                continue
            for k in range(start, end):
                error_k, step = errors[k], step_of[k - start]
                if B == 1:
                    error_k += f[k, start:k] @ e[start:k]
                else:
                    error_k += (f[:, k : k + 1, start:k] @ e[:, start:k])[:, 0]
                if s.shape[1] == 1:
                    scale_k, zero_k, low, high = one_grid
                elif B == 1:
                    scale_k, zero_k, low, high = (grid[0, g[0, k]] for grid in grids)
                else:
                    scale_k, zero_k, low, high = (grid[each, g[:, k]] for grid in grids)
                np.divide(error_k, scale_k, step)
                if tables is None:
                    np.rint(step, step)
                    np.maximum(step, low, out=step)
                    np.minimum(step, high, out=step)  # code - zero_point
                    if zeros is not None:
                        np.copyto(step, 0, where=zeros[k])
                    np.multiply(step, scale_k, value)
                    np.add(step, zero_k, step)
                else:
                    bounds, code_of, level_of = tables
                    rank = bounds.searchsorted(step)
                    np.multiply(level_of[rank], scale_k, value)
                    step[...] = code_of[rank]
                np.subtract(targets[k], value, error_k)
            code[..., start:end, :] = steps[..., : end - start, :]
    return codes.mT.to(weight.device), error.mT.to(weight.device)


def _tables(book: Codebook, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds of ranks, and code and level of each. NaN ranks behind infinity: its level is NaN."""
    levels = [*(book.levels[code] for code in book.ascending), np.nan]
    tables = (*book.bounds, np.inf), (*book.ascending, 0), levels
    bounds, code_of, level_of = (np.array(table, dtype) for table in tables)
    return bounds, code_of, level_of


def _halves(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """How to go through columns: (start, start, end) are few enough to be taken one by one, and
    before the right half (start, middle, end) hands the left half's errors on, as one product."""
    if end - start <= LEAF:
        yield start, start, end
        return
    middle = start + (end - start) // 2
    yield from _halves(start, middle)
    yield start, middle, end
    yield from _halves(middle, end)


def _columns(matrix: Tensor) -> Tensor:
    """[B, R, C]  ->  [B, C, R], a column of all rows contiguous, on the CPU"""
    return matrix.mT.contiguous().cpu()


def compensate(
    weight: Tensor,
    error: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
) -> Tensor:
    """W_F -= E V, in place: the remaining weights take up the error of a tile.

    Returns sum_r (w_rc - Q(w_rc))**2 of the new weights: with A_cc it gives the sensitivity of the
    columns, as in `column_sensitivity`.

    weight [B, R, F], error [B, R, T] normalized (E = (W_T - Q_T) U_TT^-1), rows V [B, T, F],
    scale, zero_point [B, R, G], group int64 [B, F]  ->  [B, F]
    """
    weight.baddbmm_(error, rows, alpha=-1)
    return _rounding_cost(weight, scale, zero_point, group, qmax)


def downdate(inverse: Tensor, rows: Tensor) -> None:
    """A_FF -= V^T V, in place: the inverse Hessian of the remaining columns after a tile.

    inverse [B, F, F] symmetric, rows V = U_TT^-T A_TF [B, T, F]
    """
    inverse.baddbmm_(rows.mT, rows, alpha=-1)


def accumulate_hessian(total: Tensor, inputs: Tensor, window: Window) -> None:
    """total += X^T X, in place; only the lower triangle is defined.

    total [G, C, C], inputs [N, channels, D, H, W]; the rows of X are the patches of `window`.
    """
    columns = total.shape[1]
    per_image = math.prod(window.positions(inputs.shape[2:])) * columns * window.groups
    for images in inputs.split(max(1, PATCH_ELEMENTS // per_image)):
        x = window.patches(images).to(total.dtype)
        total.baddbmm_(x, x.mT)


def solve_rows(
    weight: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`steps` greedy steps of exact OBQ, each row with an order and an inverse of its own.

        err_c = (w_c - Q(w_c))**2
        j     = argmax err_c  if any err_c > scale_c**2 / 4 (off the grid), else argmin err_c / A_cc
        v     = A_j / sqrt(A_jj)
        w    -= (w_j - Q(w_j)) / sqrt(A_jj) * v,    A -= v v^T

    (Frantar & Alistarh 2022, arXiv 2208.11580, algorithm 3 and its outlier rule, whose limit is the
    square of half a step: with a codebook, of its widest). The downdates of A are not written:
    A_j = inverse_j - sum_m v_m[j] v_m over the steps of this call, and the diagonal is kept.

    weight [N, F] (in place), inverse [N, F, F] of each row, scale, zero_point [N, G],
    group int64 [N, F]  ->  picked int64 [N, steps], codes uint8 [N, steps], rows v [N, steps, F]
    """
    N, F = weight.shape
    s, z = (t.expand(N, F) if t.shape[1] == 1 else t.gather(1, group) for t in (scale, zero_point))
    limit = s.square() * (qmax.half_step**2 if isinstance(qmax, Codebook) else 0.25)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    rows = weight.new_zeros(N, steps, F)
    picked = torch.empty(N, steps, dtype=torch.int64, device=weight.device)
    codes = torch.empty(N, steps, dtype=torch.uint8, device=weight.device)
    each = torch.arange(N, device=weight.device)
    done = torch.zeros(N, F, dtype=torch.bool, device=weight.device)
    for step in range(steps):
        code = to_code(weight, s, z, qmax)
        error = (weight - to_value(code, s, z, qmax)).square_().masked_fill_(done, -1)
        outlier = (error > limit).any(1)
        score = (error / diagonal).masked_fill_(done, torch.inf)
        j = torch.where(outlier, error.argmax(1), score.argmin(1))
        v = inverse[each, j] - torch.einsum("nm,nmf->nf", rows[each, :step, j], rows[:, :step])
        v.masked_fill_(done, 0)
        root = diagonal[each, j].sqrt()
        v /= root[:, None]
        picked[:, step], codes[:, step] = j, code[each, j]
        value = to_value(code[each, j], s[each, j], z[each, j], qmax)
        delta = (weight[each, j] - value) / root
        weight -= delta[:, None] * v
        diagonal -= v.square()
        rows[:, step] = v
        done[each, j] = True
    return picked, codes, rows


def dequantize_packed(
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """w_rc = (code_rc - zero_point_rg) scale_rg, g = c // group_size; codes lie as in `packing`.

    qweight int32 [R, words(C)], scale [R, G], qzeros int32 [R, words(G)], None where all zero
    points are the middle code; columns: C  ->  [R, C], rounded to float32 and then to `dtype`
    """
    G = scale.shape[1]
    if qzeros is None:
        zero_point = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.float32)
    else:
        zero_point = unpack(qzeros, bits, G).float()
    codes = unpack(qweight, bits, columns).float().unflatten(1, (G, -1))
    grid = scale.float()[..., None], zero_point[..., None], 2**bits - 1
    return to_value(codes, *grid).flatten(1).to(dtype)


def matmul_packed(
    x: Tensor, qweight: Tensor, scale: Tensor, qzeros: Tensor | None, bits: int
) -> Tensor:
    """y_mn = sum_k x_mk w_nk, w as in `dequantize_packed`

    x [M, K]  ->  [M, N] in the dtype of x; the weight and the sum are at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize_packed(qweight, scale, qzeros, bits, x.shape[1], dtype)
    return (x.to(dtype) @ weight.T).to(x.dtype)
