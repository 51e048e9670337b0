"""Round each group of columns to a grid of its own, with a search for the scale.

    symmetric:   full = max|w| / half_range              zero_point = (qmax + 1) / 2
    asymmetric:  low, high = min(w, 0), max(w, 0)
                 full = (high - low) / qmax              zero_point = round(-low / full)
    codebook:    full = max|w| / half_range              zero_point = 0, symmetric only
    scale = full * fraction of least sum importance (Q(w) - w)**2, the first of equals
    codes = clamp(round(w / scale) + zero_point, 0, qmax)

full = 0 becomes 1. Bit for bit `sapq_triton.reference.quantize_groups`, except that where two
fractions have the same squared error up to float32 rounding either may win.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .rounding import constants, nearest, round_half_even


@triton.jit
def _quantize_groups_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wc,  # [B, R, C] float
    shrink_ptr,  # [N_SHRINK] float32
    importance_ptr, stride_ib, stride_ic,  # [B, C] float32
    codes_ptr, stride_cb, stride_cr, stride_cc,  # [B, R, C] uint8
    scale_ptr, zero_point_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    R,
    group_size,
    half_range,
    qmax,
    CODEBOOK: tl.constexpr,
    N_SHRINK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WEIGHTED: tl.constexpr,  # by importance; else it counts as 1
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_R rows of one group, BLOCK_C columns at a time
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    lanes = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    row_mask = rows < R
    first = group * group_size
    weight_rows = weight_ptr + batch * stride_wb + rows[:, None] * stride_wr  # [BLOCK_R, 1]

    # reduced after the loop, not in it: triton 3.6 fails to compile the latter
    lows = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    highs = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, group_size, BLOCK_C):
        mask = row_mask[:, None] & (start + lanes < group_size)[None, :]
        cols = first + start + lanes
        w = tl.load(weight_rows + cols[None, :] * stride_wc, mask=mask, other=0.0).to(tl.float32)
        lows, highs = tl.minimum(lows, w), tl.maximum(highs, w)
    low, high = tl.min(lows, axis=1), tl.max(highs, axis=1)  # [BLOCK_R]
    top = tl.zeros([BLOCK_R], dtype=tl.float32) + qmax
    if SYMMETRIC:
        full = tl.div_rn(tl.maximum(high, -low), tl.zeros_like(top) + half_range)
        full = tl.where(full == 0.0, 1.0, full)
        zero_point = (top + 1.0) * 0.5 if CODEBOOK is None else tl.zeros_like(top)
    else:
        full = tl.div_rn(high - low, top)
        full = tl.where(full == 0.0, 1.0, full)
        zero_point = round_half_even(tl.div_rn(-low, full))

    scale = full
    if N_SHRINK == 1:
        scale = full * tl.load(shrink_ptr)
    else:
        best = tl.full([BLOCK_R], float("inf"), dtype=tl.float32)
        for step in range(0, N_SHRINK):
            trial = full * tl.load(shrink_ptr + step)
            error = tl.zeros([BLOCK_R], dtype=tl.float32)
            for start in range(0, group_size, BLOCK_C):
                mask = row_mask[:, None] & (start + lanes < group_size)[None, :]
                cols = first + start + lanes
                w = tl.load(weight_rows + cols[None, :] * stride_wc, mask=mask, other=0.0)
                w = w.to(tl.float32)
                s = tl.broadcast_to(trial[:, None], w.shape)
                z = tl.broadcast_to(zero_point[:, None], w.shape)
                _, value = nearest(w, s, z, qmax, CODEBOOK)
                delta = value - w
                cost = delta * delta
                if WEIGHTED:
                    i_ptrs = importance_ptr + batch * stride_ib + cols * stride_ic
                    i = tl.load(i_ptrs, mask=start + lanes < group_size, other=0.0)
                    cost = cost * i[None, :]
                error += tl.sum(cost, axis=1)
            better = error < best
            best = tl.where(better, error, best)
            scale = tl.where(better, trial, scale)

    for start in range(0, group_size, BLOCK_C):
        mask = row_mask[:, None] & (start + lanes < group_size)[None, :]
        cols = first + start + lanes
        w = tl.load(weight_rows + cols[None, :] * stride_wc, mask=mask, other=0.0).to(tl.float32)
        s = tl.broadcast_to(scale[:, None], w.shape)
        z = tl.broadcast_to(zero_point[:, None], w.shape)
        codes = (
            codes_ptr + batch * stride_cb + rows[:, None] * stride_cr + cols[None, :] * stride_cc
        )
        code, _ = nearest(w, s, z, qmax, CODEBOOK)
        tl.store(codes, code.to(tl.uint8), mask=mask)
    offsets = batch * stride_sb + rows * stride_sr + group * stride_sg
    tl.store(scale_ptr + offsets, scale, mask=row_mask)
    tl.store(zero_point_ptr + offsets, zero_point, mask=row_mask)


def quantize_groups(
    weight: Tensor,
    group_size: int,
    qmax,
    symmetric: bool,
    shrink: tuple[float, ...],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [B, R, C], importance float32 [B, C]  ->  codes uint8 [B, R, C] and float32 scale,
    zero_point [B, R, G]"""
    B, R, C = weight.shape
    G = C // group_size
    codes = torch.empty((B, R, C), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((B, R, G), dtype=torch.float32, device=weight.device)
    zero_point = torch.empty_like(scale)
    blocks = parameters("quantize_groups", weight.device)
    BLOCK_C = min(triton.next_power_of_2(group_size), blocks["BLOCK_C"])
    BLOCK_R = max(1, blocks["ELEMENTS"] // BLOCK_C)
    cost = weight if importance is None else importance  # not read where there is none
    with torch.cuda.device_of(weight):
        _quantize_groups_kernel[(triton.cdiv(R, BLOCK_R), G, B)](
            weight, *weight.stride(),
            torch.tensor(shrink, dtype=torch.float32, device=weight.device),
            cost, *cost.stride()[:2],
            codes, *codes.stride(),
            scale, zero_point, *scale.stride(),
            R,
            group_size,
            qmax / 2 if isinstance(qmax, int) else qmax.half_range,
            *constants(qmax),
            N_SHRINK=len(shrink),
            SYMMETRIC=symmetric,
            WEIGHTED=importance is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_C=BLOCK_C,
            num_warps=blocks["num_warps"],
        )  # fmt: skip
    return codes, scale, zero_point
