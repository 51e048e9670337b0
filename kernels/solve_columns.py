"""Quantize columns one after another, all rows in parallel: a tile of them, or a whole layer.

    w'_k    = running_k + sum_{j < k} error_j * feedback_jk
    code_k  = clamp(round(w'_k / scale) + zero_point, 0, qmax), zero_point where pruned
    error_k = weight_k - (code_k - zero_point) * scale

Same arithmetic as `sapq_triton.reference.solve_columns` but for the order of the sum and, where
PRECISION is not "ieee", its products beyond the SUB columns at hand: the codes are the same where
every sum is exact, and otherwise unless w' / scale lies within the error of that sum from a tie.

Rows never meet, so that one launch does SPAN columns: a program owns BLOCK_R rows. The sum over
earlier columns is a matrix product at three distances: of all columns before the span, by PyTorch,
which is faster, and may sum otherwise for another number of rows; of those before the tile; and of
those between the start of the tile and the SUB columns at hand. A product in the kernel spreads its
elements over threads; through `exchange` they come to where a thread owns a whole row, with SUB
columns in registers as a tuple of row vectors and scalar loads of the feedback: no shuffle and no
barrier from one column to the next. `error` holds w' of a column until its error takes that place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .rounding import constants, nearest

SPAN = 512  # columns of a launch
SUB = 16  # more columns in registers cost more compile time than they save


@triton.jit
def _add_feedback(
    total,  # [BLOCK_K, BLOCK_R]
    columns,  # k [BLOCK_K] int64
    column_mask,
    first, last,  # of the columns j, whose errors are known: a multiple of BLOCK_J
    error_rows, stride_ec,  # [BLOCK_R]
    feedback_ptr, stride_fj, stride_fk,
    PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """total_k + sum_{first <= j < last} error_j * feedback_jk"""
    for start in range(first, last, BLOCK_J):
        j = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_J)  # [BLOCK_J]
        f_ptrs = feedback_ptr + j[None, :] * stride_fj + columns[:, None] * stride_fk
        e_ptrs = error_rows[None, :] + j[:, None] * stride_ec
        f = tl.load(f_ptrs, mask=column_mask[:, None], other=0.0)
        e = tl.load(e_ptrs)
        total = tl.dot(f, e, total, input_precision=PRECISION)
    return total


@triton.jit
def _solve_columns_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wc,  # [B, R, C] float32
    running_ptr, stride_nb, stride_nr, stride_nc,  # [B, R, C] float32
    feedback_ptr, stride_fb, stride_fj, stride_fk,  # [B, C, C] float32, above the diagonal
    scale_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    zero_point_ptr, stride_zb, stride_zr, stride_zg,  # [B, R, G] float32
    group_ptr, stride_gb, stride_gc,  # [B, C] int64
    pruned_ptr, stride_pb, stride_pr, stride_pc,  # [B, R, C] uint8, where PRUNED
    codes_ptr, stride_cb, stride_cr, stride_cc,  # [B, R, C] uint8
    error_ptr, stride_eb, stride_er, stride_ec,  # [B, R, C] float32
    exchange_ptr,  # [B, programs, 4, SUB, BLOCK_R] float32, scratch
    R,
    C,
    qmax,
    CODEBOOK: tl.constexpr,
    EVEN: tl.constexpr,  # SUB divides C
    GROUPS: tl.constexpr,  # more than one
    PRUNED: tl.constexpr,
    PRECISION: tl.constexpr,
    SUB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + lanes
    row_mask = rows < R
    rows = tl.minimum(rows, R - 1)  # beyond the last row that row again: only stores have masks
    weight_rows = weight_ptr + batch * stride_wb + rows * stride_wr
    running_rows = running_ptr + batch * stride_nb + rows * stride_nr
    scale_rows = scale_ptr + batch * stride_sb + rows * stride_sr
    zero_point_rows = zero_point_ptr + batch * stride_zb + rows * stride_zr
    pruned_rows = pruned_ptr + batch * stride_pb + rows * stride_pr
    codes_rows = codes_ptr + batch * stride_cb + rows * stride_cr
    error_rows = error_ptr + batch * stride_eb + rows * stride_er
    feedback_ptr += batch * stride_fb
    group_ptr += batch * stride_gb
    exchange_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * (4 * SUB * BLOCK_R)
    exchange_rows = exchange_ptr + lanes  # [BLOCK_R]
    exchange = exchange_rows[None, :] + tl.arange(0, SUB)[:, None] * BLOCK_R  # [SUB, BLOCK_R]
    scale, zero_point = tl.load(scale_rows), tl.load(zero_point_rows)  # where there is one group

    for tile in range(0, C, TILE):
        far = tl.cast(tile, tl.int64) + tl.arange(0, TILE)  # [TILE]
        far_mask = (far < C)[:, None] & row_mask[None, :]
        far_ptrs = running_rows[None, :] + far[:, None] * stride_nc
        total = tl.load(far_ptrs, mask=far_mask, other=0.0)
        total = _add_feedback(
            total, far, far < C, 0, tile, error_rows, stride_ec,
            feedback_ptr, stride_fj, stride_fk, PRECISION, BLOCK_J,
        )  # fmt: skip
        tl.store(error_rows[None, :] + far[:, None] * stride_ec, total, mask=far_mask)
        tl.debug_barrier()  # what one thread has written others read

        for start in range(tile, tl.minimum(tile + TILE, C), SUB):
            near = tl.cast(start, tl.int64) + tl.arange(0, SUB)  # [SUB]
            inside = EVEN | (near < C)
            e_ptrs = error_rows[None, :] + near[:, None] * stride_ec
            sums = _add_feedback(
                tl.load(e_ptrs, mask=inside[:, None], other=0.0),
                near, inside, tile, start, error_rows, stride_ec,
                feedback_ptr, stride_fj, stride_fk, PRECISION, SUB,
            )  # fmt: skip
            near_mask = inside[:, None] & row_mask[None, :]
            wide = weight_rows[None, :] + near[:, None] * stride_wc
            tl.store(exchange, sums)
            tl.store(exchange + SUB * BLOCK_R, tl.load(wide, mask=inside[:, None], other=0.0))
            tl.debug_barrier()  # what one thread has written others read

            # all loads before the steps, all stores behind them: a step waits for nothing but the
            # step before it
            w = ()
            target = ()
            scales = ()
            zero_points = ()
            g_ptrs = group_ptr + tl.cast(start, tl.int64) * stride_gc
            p_ptrs = pruned_rows + tl.cast(start, tl.int64) * stride_pc
            for i in tl.static_range(SUB):
                w = w + (tl.load(exchange_rows + i * BLOCK_R),)
                target = target + (tl.load(exchange_rows + (SUB + i) * BLOCK_R),)
                if GROUPS:
                    known = EVEN | (start + i < C)
                    group = tl.load(g_ptrs + i * stride_gc, mask=known, other=0).to(tl.int32)
                    s_ptrs = scale_rows + tl.cast(group, tl.int64) * stride_sg
                    z_ptrs = zero_point_rows + tl.cast(group, tl.int64) * stride_zg
                    scales = scales + (tl.load(s_ptrs),)
                    zero_points = zero_points + (tl.load(z_ptrs),)
                else:
                    scales = scales + (scale,)
                    zero_points = zero_points + (zero_point,)
            codes = ()
            errors = ()
            f_ptrs = feedback_ptr + tl.cast(start, tl.int64) * (stride_fj + stride_fk)
            for i in tl.static_range(SUB):
                running = w[i]
                for j in tl.static_range(i):
                    f_ptr = f_ptrs + j * stride_fj + i * stride_fk
                    f = tl.load(f_ptr, mask=EVEN | (start + i < C), other=0.0)
                    running += errors[j] * f
                code, value = nearest(running, scales[i], zero_points[i], qmax, CODEBOOK)
                if PRUNED:
                    at = i if EVEN else tl.minimum(i, C - 1 - start)
                    pruned = tl.load(p_ptrs + at * stride_pc)
                    code = tl.where(pruned != 0, zero_points[i], code)
                    value = (code - zero_points[i]) * scales[i]  # of integers: no codebook prunes
                codes = codes + (code,)
                errors = errors + (target[i] - value,)
            for i in tl.static_range(SUB):
                tl.store(exchange_rows + (2 * SUB + i) * BLOCK_R, codes[i])
                tl.store(exchange_rows + (3 * SUB + i) * BLOCK_R, errors[i])
            tl.debug_barrier()
            c_ptrs = codes_rows[None, :] + near[:, None] * stride_cc
            tl.store(c_ptrs, tl.load(exchange + 2 * SUB * BLOCK_R).to(tl.uint8), mask=near_mask)
            tl.store(e_ptrs, tl.load(exchange + 3 * SUB * BLOCK_R), mask=near_mask)
            tl.debug_barrier()


def solve_columns(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax,
    precision: str,
    pruned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """weight, running [B, R, C], feedback [B, C, C], scale, zero_point [B, R, G], group [B, C],
    pruned bool [B, R, C] or None  ->  codes uint8 [B, R, C], error float32 [B, R, C]"""
    B, R, C = weight.shape
    # rows innermost, so that neighbouring threads meet neighbouring addresses
    codes = torch.empty((B, C, R), dtype=torch.uint8, device=weight.device).mT
    error = torch.empty((B, C, R), dtype=torch.float32, device=weight.device).mT
    for start in range(0, C, SPAN):
        before, span = slice(0, start), slice(start, start + SPAN)
        now = running[:, :, span]
        if start:
            known = feedback[:, before, span].mT, error[:, :, before].mT
            now = now.mT.baddbmm(*known).mT
        _solve_span(
            weight[:, :, span], now, feedback[:, span, span],
            scale, zero_point, group[:, span], qmax, precision,
            None if pruned is None else pruned[:, :, span],
            codes[:, :, span], error[:, :, span],
        )  # fmt: skip
    return codes, error


def _solve_span(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax,
    precision: str,
    pruned: Tensor | None,
    codes: Tensor,
    error: Tensor,
) -> None:
    """One launch: the arguments of `solve_columns`, and codes [B, R, C] and error [B, R, C], which
    it fills"""
    B, R, C = weight.shape
    zeros = codes if pruned is None else pruned.view(torch.uint8)
    blocks = parameters("solve_columns", weight.device, precision)
    programs = triton.cdiv(R, blocks["BLOCK_R"])
    size = (B, programs, 4, SUB, blocks["BLOCK_R"])
    exchange = torch.empty(size, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _solve_columns_kernel[(programs, B)](
            weight, *weight.stride(),
            running, *running.stride(),
            feedback, *feedback.stride(),
            scale, *scale.stride(),
            zero_point, *zero_point.stride(),
            group, *group.stride(),
            zeros, *zeros.stride(),
            codes, *codes.stride(),
            error, *error.stride(),
            exchange,
            R,
            C,
            *constants(qmax),
            EVEN=C % SUB == 0,
            GROUPS=scale.shape[2] > 1,
            PRUNED=pruned is not None,
            PRECISION=precision,
            SUB=SUB,
            **blocks,
        )  # fmt: skip
