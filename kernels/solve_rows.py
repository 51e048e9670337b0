"""Greedy steps of exact OBQ: each row has an order and an inverse Hessian of its own.

    err_c = (w_c - Q(w_c))**2
    j     = argmax err_c  if some err_c > scale_c**2 / 4 (off the grid), else argmin err_c / A_cc
    v     = A_j / sqrt(A_jj),   A_j = inverse_j - sum_m v_m[j] v_m over the steps of this call
    w    -= (w_j - Q(w_j)) / sqrt(A_jj) * v,    A -= v v^T

With a codebook, half its widest step takes the place of 1/2, whose square is 1/4.

One program per row. Equal to `sapq_triton.reference.solve_rows` up to the order of the sum over m:
the same choices unless two columns are that close.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .rounding import constants, nearest


@triton.jit
def _solve_rows_kernel(
    weight_ptr, stride_wn, stride_wf,  # [N, F] float32, in place
    inverse_ptr, stride_an, stride_ai, stride_aj,  # [N, F, F] float32
    diagonal_ptr, stride_dn, stride_df,  # [N, F] float32, in place
    done_ptr, stride_on, stride_of,  # [N, F] int8, in place, zero at first
    scale_ptr, stride_sn, stride_sg,  # [N, G] float32
    zero_point_ptr, stride_zn, stride_zg,  # [N, G] float32
    group_ptr, stride_gn, stride_gf,  # [N, F] int64
    picked_ptr, stride_pn, stride_ps,  # [N, steps] int64
    codes_ptr, stride_cn, stride_cs,  # [N, steps] uint8
    rows_ptr, stride_vn, stride_vs, stride_vf,  # [N, steps, F] float32
    F,
    steps,
    qmax,
    CODEBOOK: tl.constexpr,
    LIMIT: tl.constexpr,  # of the error on the grid, by scale**2
    BLOCK_F: tl.constexpr,  # at least the number of threads: a column belongs to one thread
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_F).to(tl.int64)  # [BLOCK_F]
    weight_ptr += row * stride_wn
    inverse_ptr += row * stride_an
    diagonal_ptr += row * stride_dn
    done_ptr += row * stride_on
    scale_ptr += row * stride_sn
    zero_point_ptr += row * stride_zn
    group_ptr += row * stride_gn
    rows_ptr += row * stride_vn

    for step in range(0, steps):
        # 1. choose: the smallest cost, or the largest error where one is off the grid
        cheapest = float("inf")
        largest = -1.0
        j_cheapest = tl.zeros([], dtype=tl.int64)
        j_largest = tl.zeros([], dtype=tl.int64)
        outliers = 0
        for start in range(0, F, BLOCK_F):
            c = start + lanes
            inside = c < F
            open_ = inside & (tl.load(done_ptr + c * stride_of, mask=inside, other=1) == 0)
            w = tl.load(weight_ptr + c * stride_wf, mask=inside, other=0.0)
            diagonal = tl.load(diagonal_ptr + c * stride_df, mask=open_, other=1.0)
            group = tl.load(group_ptr + c * stride_gf, mask=inside, other=0)
            scale = tl.load(scale_ptr + group * stride_sg, mask=inside, other=1.0)
            zero_point = tl.load(zero_point_ptr + group * stride_zg, mask=inside, other=0.0)
            _, value = nearest(w, scale, zero_point, qmax, CODEBOOK)
            delta = w - value
            error = tl.where(open_, delta * delta, -1.0)
            cost = tl.where(open_, tl.div_rn(error, diagonal), float("inf"))
            outliers += tl.sum((error > scale * scale * LIMIT).to(tl.int32))
            low, high = tl.min(cost), tl.max(error)
            # ties go to the lowest column
            j_low = tl.min(tl.where(cost == low, c, F))
            j_high = tl.min(tl.where(error == high, c, F))
            j_cheapest = tl.where(low < cheapest, j_low, j_cheapest)
            cheapest = tl.minimum(low, cheapest)
            j_largest = tl.where(high > largest, j_high, j_largest)
            largest = tl.maximum(high, largest)
        j = tl.where(outliers > 0, j_largest, j_cheapest)

        # 2. its code, and the error that the others must take up
        # written by other threads in the previous step
        tl.debug_barrier()
        w_j = tl.load(weight_ptr + j * stride_wf)
        root = tl.sqrt_rn(tl.load(diagonal_ptr + j * stride_df))
        group_j = tl.load(group_ptr + j * stride_gf)
        scale_j = tl.load(scale_ptr + group_j * stride_sg)
        zero_point_j = tl.load(zero_point_ptr + group_j * stride_zg)
        code, value_j = nearest(w_j, scale_j, zero_point_j, qmax, CODEBOOK)
        delta_j = tl.div_rn(w_j - value_j, root)
        tl.store(picked_ptr + row * stride_pn + step * stride_ps, j)
        tl.store(codes_ptr + row * stride_cn + step * stride_cs, code.to(tl.uint8))
        # all have read column j before its owner writes it
        tl.debug_barrier()

        # 3. the row of the inverse, and the updates
        for start in range(0, F, BLOCK_F):
            c = start + lanes
            inside = c < F
            open_ = inside & (tl.load(done_ptr + c * stride_of, mask=inside, other=1) == 0)
            v = tl.load(inverse_ptr + j * stride_ai + c * stride_aj, mask=open_, other=0.0)
            correction = tl.zeros([BLOCK_F], dtype=tl.float32)
            for m in range(0, step):
                v_ptrs = rows_ptr + tl.cast(m, tl.int64) * stride_vs
                earlier = tl.load(v_ptrs + c * stride_vf, mask=open_, other=0.0)
                correction += tl.load(v_ptrs + j * stride_vf) * earlier
            v = tl.div_rn(v - correction, tl.zeros_like(v) + root)
            w = tl.load(weight_ptr + c * stride_wf, mask=inside, other=0.0)
            diagonal = tl.load(diagonal_ptr + c * stride_df, mask=inside, other=0.0)
            v_ptrs = rows_ptr + tl.cast(step, tl.int64) * stride_vs
            tl.store(v_ptrs + c * stride_vf, v, mask=inside)
            tl.store(weight_ptr + c * stride_wf, w - delta_j * v, mask=inside)
            tl.store(diagonal_ptr + c * stride_df, diagonal - v * v, mask=inside)
            tl.store(done_ptr + c * stride_of, (c == j).to(tl.int8), mask=inside & (c == j))


def solve_rows(
    weight: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, F] in place, inverse [N, F, F], scale, zero_point [N, G], group [N, F]
    ->  picked int64 [N, steps], codes uint8 [N, steps], rows float32 [N, steps, F]"""
    N, F = weight.shape
    picked = torch.empty((N, steps), dtype=torch.int64, device=weight.device)
    codes = torch.empty((N, steps), dtype=torch.uint8, device=weight.device)
    rows = torch.empty((N, steps, F), dtype=torch.float32, device=weight.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone(memory_format=torch.contiguous_format)
    done = torch.zeros((N, F), dtype=torch.int8, device=weight.device)
    blocks = parameters("solve_rows", weight.device)
    num_warps = blocks["num_warps"] if F > 256 else 1
    with torch.cuda.device_of(weight):
        _solve_rows_kernel[(N,)](
            weight, *weight.stride(),
            inverse, *inverse.stride(),
            diagonal, *diagonal.stride(),
            done, *done.stride(),
            scale, *scale.stride(),
            zero_point, *zero_point.stride(),
            group, *group.stride(),
            picked, *picked.stride(),
            codes, *codes.stride(),
            rows, *rows.stride(),
            F,
            steps,
            *constants(qmax),
            LIMIT=0.25 if isinstance(qmax, int) else qmax.half_step**2,
            BLOCK_F=max(64 * num_warps, min(blocks["BLOCK_F"], triton.next_power_of_2(F))),
            num_warps=num_warps,
        )  # fmt: skip
    return picked, codes, rows
