"""The remaining weights take up the error of a tile, in place.

    W_F -= E V        E [R, T] normalized errors, V = U_TT^-T A_TF [T, F]

Float32 throughout; equal to `sapq_triton.reference.compensate` up to the order of the sum over T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compensate_kernel(
    weight_ptr, stride_wb, stride_wr, stride_wf,  # [B, R, F] float32, in place
    error_ptr, stride_eb, stride_er, stride_et,  # [B, R, T] float32
    rows_ptr, stride_vb, stride_vt, stride_vf,  # [B, T, F] float32
    R,
    F,
    T,
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
        update = tl.dot(v, e, update, input_precision="ieee")
    mask = (f < F)[:, None] & (r < R)[None, :]
    w_ptrs = weight_ptr + batch * stride_wb + r[None, :] * stride_wr + f[:, None] * stride_wf
    tl.store(w_ptrs, tl.load(w_ptrs, mask=mask, other=0.0) - update, mask=mask)


def compensate(weight: Tensor, error: Tensor, rows: Tensor) -> None:
    """weight [B, R, F] in place, error [B, R, T], rows [B, T, F]"""
    B, R, F = weight.shape
    BLOCK = 64
    with torch.cuda.device_of(weight):
        _compensate_kernel[(triton.cdiv(F, BLOCK), triton.cdiv(R, BLOCK), B)](
            weight, *weight.stride(),
            error, *error.stride(),
            rows, *rows.stride(),
            R,
            F,
            error.shape[2],
            BLOCK_F=BLOCK,
            BLOCK_R=BLOCK,
            BLOCK_T=16,
        )  # fmt: skip
