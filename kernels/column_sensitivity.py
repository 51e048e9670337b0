"""What rounding each column now would cost.

    S_c = sum_r (w_rc - Q(w_rc))**2 / A_cc

Equal to `sapq_triton.reference.column_sensitivity` up to the order of the sum over rows
(float32: 1e-5 relative). One program sums all rows of its columns: no atomics, always the same sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .rounding import constants, nearest


@triton.jit
def _column_sensitivity_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wf,  # [B, R, F] float32
    scale_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    zero_point_ptr, stride_zb, stride_zr, stride_zg,  # [B, R, G] float32
    group_ptr, stride_gb, stride_gf,  # [B, F] int64
    diagonal_ptr, stride_db, stride_df,  # [B, F] float32
    cost_ptr, stride_cb, stride_cf,  # [B, F] float32
    R,
    F,
    qmax,
    CODEBOOK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    col_mask = cols < F
    group = tl.load(group_ptr + batch * stride_gb + cols * stride_gf, mask=col_mask, other=0)
    total = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask = col_mask[:, None] & (rows < R)[None, :]  # [BLOCK_F, BLOCK_R]
        r, c, g = rows[None, :], cols[:, None], group[:, None]
        w_ptrs = weight_ptr + batch * stride_wb + r * stride_wr + c * stride_wf
        s_ptrs = scale_ptr + batch * stride_sb + r * stride_sr + g * stride_sg
        z_ptrs = zero_point_ptr + batch * stride_zb + r * stride_zr + g * stride_zg
        w = tl.load(w_ptrs, mask=mask, other=0.0)
        scale = tl.load(s_ptrs, mask=mask, other=1.0)
        zero_point = tl.load(z_ptrs, mask=mask, other=0.0)
        _, value = nearest(w, scale, zero_point, qmax, CODEBOOK)
        delta = value - w
        total += delta * delta
    diagonal = tl.load(
        diagonal_ptr + batch * stride_db + cols * stride_df, mask=col_mask, other=1.0
    )
    cost = tl.div_rn(tl.sum(total, axis=1), diagonal)
    tl.store(cost_ptr + batch * stride_cb + cols * stride_cf, cost, mask=col_mask)


def column_sensitivity(
    weight: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, diagonal: Tensor, qmax
) -> Tensor:
    """weight [B, R, F], scale, zero_point [B, R, G], group, diagonal [B, F]  ->  float32 [B, F]"""
    B, R, F = weight.shape
    cost = torch.empty((B, F), dtype=torch.float32, device=weight.device)
    blocks = parameters("column_sensitivity", weight.device)
    with torch.cuda.device_of(weight):
        _column_sensitivity_kernel[(triton.cdiv(F, blocks["BLOCK_F"]), B)](
            weight, *weight.stride(),
            scale, *scale.stride(),
            zero_point, *zero_point.stride(),
            group, *group.stride(),
            diagonal, *diagonal.stride(),
            cost, *cost.stride(),
            R,
            F,
            *constants(qmax),
            **blocks,
        )  # fmt: skip
    return cost
