"""Quantize the columns of a tile one after another, all rows in parallel.

    w'_k    = running_k + sum_{j < k} error_j * feedback_jk
    code_k  = clamp(round(w'_k / scale) + zero_point, 0, qmax)
    error_k = weight_k - (code_k - zero_point) * scale

Same arithmetic as `sapq_triton.reference.solve_tile` but for the order of the sum: the codes are
the same wherever every sum is exact in float32, and otherwise unless w' / scale lies within the
rounding of that sum from a tie.

A thread owns whole rows. SUB columns live in registers at a time, as a tuple of row vectors with
scalar loads of the feedback: no shuffle and no barrier. The errors of earlier columns come back
from memory, where the same thread has put them; therefore BLOCK_R must not be smaller than the
number of threads (a row held by two threads would be written by only one of them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feedback import add_feedback
from .rounding import to_code, to_value

SUB = 16  # more columns in registers cost more compile time than they save
WARP = 64 if torch.version.hip else 32


@triton.jit
def _solve_tile_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wt,  # [B, R, T] float32
    running_ptr, stride_nb, stride_nr, stride_nt,  # [B, R, T] float32
    feedback_ptr, stride_fb, stride_fj, stride_fk,  # [B, T, T] float32, above the diagonal
    scale_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    zero_point_ptr, stride_zb, stride_zr, stride_zg,  # [B, R, G] float32
    group_ptr, stride_gb, stride_gt,  # [B, T] int64
    codes_ptr, stride_cb, stride_cr, stride_ct,  # [B, R, T] uint8
    error_ptr, stride_eb, stride_er, stride_et,  # [B, R, T] float32
    R,
    T,
    qmax,
    EVEN: tl.constexpr,  # SUB divides T
    SUB: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    row_mask = rows < R
    weight_rows = weight_ptr + batch * stride_wb + rows * stride_wr
    running_rows = running_ptr + batch * stride_nb + rows * stride_nr
    scale_rows = scale_ptr + batch * stride_sb + rows * stride_sr
    zero_point_rows = zero_point_ptr + batch * stride_zb + rows * stride_zr
    codes_rows = codes_ptr + batch * stride_cb + rows * stride_cr
    error_rows = error_ptr + batch * stride_eb + rows * stride_er
    feedback_ptr += batch * stride_fb
    group_ptr += batch * stride_gb

    for start in range(0, T, SUB):
        w = ()
        for i in tl.static_range(SUB):
            k = tl.cast(start + i, tl.int64)
            w = w + (
                tl.load(running_rows + k * stride_nt, mask=row_mask & (EVEN | (k < T)), other=0.0),
            )
        for j in range(0, start):
            w = add_feedback(
                w, error_rows + tl.cast(j, tl.int64) * stride_et, row_mask,
                feedback_ptr + j * stride_fj, stride_fk, start, T, EVEN, SUB,
            )  # fmt: skip

        errors = ()
        for i in tl.static_range(SUB):
            k = tl.cast(start + i, tl.int64)
            inside = EVEN | (k < T)
            mask = row_mask & inside
            running = w[i]
            for j in tl.static_range(i):
                f_ptr = feedback_ptr + (start + j) * stride_fj + k * stride_fk
                running += errors[j] * tl.load(f_ptr, mask=inside, other=0.0)
            group = tl.load(group_ptr + k * stride_gt, mask=inside, other=0)
            scale = tl.load(scale_rows + group * stride_sg, mask=row_mask, other=1.0)
            zero_point = tl.load(zero_point_rows + group * stride_zg, mask=row_mask, other=0.0)
            code = to_code(running, scale, zero_point, qmax)
            weight = tl.load(weight_rows + k * stride_wt, mask=mask, other=0.0)
            error = weight - to_value(code, scale, zero_point)
            tl.store(codes_rows + k * stride_ct, code.to(tl.uint8), mask=mask)
            tl.store(error_rows + k * stride_et, error, mask=mask)
            errors = errors + (error,)


def solve_tile(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """weight, running [B, R, T], feedback [B, T, T], scale, zero_point [B, R, G], group [B, T]
    ->  codes uint8 [B, R, T], error float32 [B, R, T]"""
    B, R, T = weight.shape
    # rows innermost, so that neighbouring threads meet neighbouring addresses
    codes = torch.empty((B, T, R), dtype=torch.uint8, device=weight.device).mT
    error = torch.empty((B, T, R), dtype=torch.float32, device=weight.device).mT
    with torch.cuda.device_of(weight):
        _solve_tile_kernel[(triton.cdiv(R, WARP), B)](
            weight, *weight.stride(),
            running, *running.stride(),
            feedback, *feedback.stride(),
            scale, *scale.stride(),
            zero_point, *zero_point.stride(),
            group, *group.stride(),
            codes, *codes.stride(),
            error, *error.stride(),
            R,
            T,
            float(qmax),
            EVEN=T % SUB == 0,
            SUB=SUB,
            BLOCK_R=WARP,
            num_warps=1,
        )  # fmt: skip
    return codes, error
