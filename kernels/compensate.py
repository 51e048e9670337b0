"""The remaining weights take up the error of a tile, in place, and what rounding them then costs.

    W_F   -= E V        E [R, T] normalized errors, V = U_TT^-T A_TF [T, F]
    cost_c = sum_r (w_rc - Q(w_rc))**2

Equal to `sapq_triton.reference.compensate` up to the order of the sums and, where PRECISION is not
"ieee", its products. Each program sums the cost over its own rows; these partial sums are added in
one order: the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .rounding import constants, nearest


@triton.jit
def _compensate_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wf,  # [B, R, F] float32, in place
    error_ptr, stride_eb, stride_er, stride_et,  # [B, R, T] float32
    rows_ptr, stride_vb, stride_vt, stride_vf,  # [B, T, F] float32
    scale_ptr, stride_sb, stride_sr, stride_sg,  # [B, R, G] float32
    zero_point_ptr, stride_zb, stride_zr, stride_zg,  # [B, R, G] float32
    group_ptr, stride_gb, stride_gf,  # [B, F] int64
    cost_ptr, stride_cb, stride_cp, stride_cf,  # [B, programs, F] float32
    R,
    F,
    T,
    qmax,
    CODEBOOK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    # rows innermost, as the solver stores its weights
    update = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        t = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        v_ptrs = rows_ptr + batch * stride_vb + t[None, :] * stride_vt + f[:, None] * stride_vf
        e_ptrs = error_ptr + batch * stride_eb + t[:, None] * stride_et + r[None, :] * stride_er
        v = tl.load(v_ptrs, mask=(f < F)[:, None] & (t < T)[None, :], other=0.0)
        e = tl.load(e_ptrs, mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
        update = tl.dot(v, e, update, input_precision=PRECISION)
    mask = (f < F)[:, None] & (r < R)[None, :]
    w_ptrs = weight_ptr + batch * stride_wb + r[None, :] * stride_wr + f[:, None] * stride_wf
    w = tl.load(w_ptrs, mask=mask, other=0.0) - update
    tl.store(w_ptrs, w, mask=mask)

    group = tl.load(group_ptr + batch * stride_gb + f * stride_gf, mask=f < F, other=0)[:, None]
    s_ptrs = scale_ptr + batch * stride_sb + r[None, :] * stride_sr + group * stride_sg
    z_ptrs = zero_point_ptr + batch * stride_zb + r[None, :] * stride_zr + group * stride_zg
    scale = tl.load(s_ptrs, mask=mask, other=1.0)
    zero_point = tl.load(z_ptrs, mask=mask, other=0.0)
    _, value = nearest(w, scale, zero_point, qmax, CODEBOOK)
    delta = value - w
    cost = tl.sum(tl.where(mask, delta * delta, 0.0), axis=1)
    c_ptrs = cost_ptr + batch * stride_cb + tl.program_id(1).to(tl.int64) * stride_cp
    tl.store(c_ptrs + f * stride_cf, cost, mask=f < F)


def compensate(
    weight: Tensor,
    error: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax,
    precision: str,
) -> Tensor:
    """weight [B, R, F] in place, error [B, R, T], rows [B, T, F], scale, zero_point [B, R, G],
    group [B, F]  ->  float32 [B, F]"""
    B, R, F = weight.shape
    blocks = parameters("compensate", weight.device)
    programs = triton.cdiv(R, blocks["BLOCK_R"])
    cost = torch.empty((B, programs, F), dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _compensate_kernel[(triton.cdiv(F, blocks["BLOCK_F"]), programs, B)](
            weight, *weight.stride(),
            error, *error.stride(),
            rows, *rows.stride(),
            scale, *scale.stride(),
            zero_point, *zero_point.stride(),
            group, *group.stride(),
            cost, *cost.stride(),
            R,
            F,
            error.shape[2],
            *constants(qmax),
            PRECISION=precision,
            **blocks,
        )  # fmt: skip
    return cost.sum(1)
