"""Coordinate descent on a tile: each column in turn takes its best code given all the others.

    w'_k    = running_k + sum_{j != k} error_j * feedback_jk
    code_k  = clamp(round(w'_k / scale) + zero_point, 0, qmax)
    error_k = weight_k - (code_k - zero_point) * scale

`sweeps` times over all columns, codes and errors in place. Same arithmetic as
`sapq_triton.reference.refine_tile` but for the order of the sum: the codes are the same wherever
every sum is exact in float32, and otherwise unless w' / scale lies within the rounding of that sum
from a tie.

Rows, registers and memory as in `solve_tile`: a thread owns whole rows, SUB columns at a time, and
BLOCK_R must not be smaller than the number of threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feedback import add_feedback
from .rounding import to_code, to_value

SUB = 16
WARP = 64 if torch.version.hip else 32


@triton.jit
def _refine_tile_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wt,  # [B, R, T] float32
    running_ptr, stride_nb, stride_nr, stride_nt,  # [B, R, T] float32
    feedback_ptr, stride_fb, stride_fj, stride_fk,  # [B, T, T] float32, off the diagonal
    scale_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    zero_point_ptr, stride_zb, stride_zr, stride_zg,  # [B, R, G] float32
    group_ptr, stride_gb, stride_gt,  # [B, T] int64
    codes_ptr, stride_cb, stride_cr, stride_ct,  # [B, R, T] uint8, out
    error_ptr, stride_eb, stride_er, stride_et,  # [B, R, T] float32, in place
    R,
    T,
    qmax,
    sweeps,
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

    for visit in range(0, sweeps * tl.cdiv(T, SUB)):
        start = visit % tl.cdiv(T, SUB) * SUB
        w = ()
        errors = ()
        for i in tl.static_range(SUB):
            k = tl.cast(start + i, tl.int64)
            mask = row_mask & (EVEN | (k < T))
            w = w + (tl.load(running_rows + k * stride_nt, mask=mask, other=0.0),)
            errors = errors + (tl.load(error_rows + k * stride_et, mask=mask, other=0.0),)
        for j in range(0, start):
            w = add_feedback(
                w, error_rows + tl.cast(j, tl.int64) * stride_et, row_mask,
                feedback_ptr + j * stride_fj, stride_fk, start, T, EVEN, SUB,
            )  # fmt: skip
        for j in range(start + SUB, T):
            w = add_feedback(
                w, error_rows + tl.cast(j, tl.int64) * stride_et, row_mask,
                feedback_ptr + j * stride_fj, stride_fk, start, T, EVEN, SUB,
            )  # fmt: skip

        fresh = ()
        for i in tl.static_range(SUB):
            k = tl.cast(start + i, tl.int64)
            inside = EVEN | (k < T)
            mask = row_mask & inside
            running = w[i]
            for j in tl.static_range(SUB):
                if j != i:
                    f_ptr = feedback_ptr + (start + j) * stride_fj + k * stride_fk
                    f = tl.load(f_ptr, mask=inside & (EVEN | (start + j < T)), other=0.0)
                    if j < i:
                        running += fresh[j] * f
                    else:
                        running += errors[j] * f
            group = tl.load(group_ptr + k * stride_gt, mask=inside, other=0)
            scale = tl.load(scale_rows + group * stride_sg, mask=row_mask, other=1.0)
            zero_point = tl.load(zero_point_rows + group * stride_zg, mask=row_mask, other=0.0)
            code = to_code(running, scale, zero_point, qmax)
            weight = tl.load(weight_rows + k * stride_wt, mask=mask, other=0.0)
            error = weight - to_value(code, scale, zero_point)
            tl.store(codes_rows + k * stride_ct, code.to(tl.uint8), mask=mask)
            tl.store(error_rows + k * stride_et, error, mask=mask)
            fresh = fresh + (error,)


def refine_tile(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int,
    codes: Tensor,
    error: Tensor,
    sweeps: int,
) -> None:
    """weight, running [B, R, T], feedback [B, T, T], scale, zero_point [B, R, G], group [B, T];
    codes uint8, error float32 [B, R, T] in place"""
    B, R, T = weight.shape
    with torch.cuda.device_of(weight):
        _refine_tile_kernel[(triton.cdiv(R, WARP), B)](
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
            sweeps,
            EVEN=T % SUB == 0,
            SUB=SUB,
            BLOCK_R=WARP,
            num_warps=1,
        )  # fmt: skip
