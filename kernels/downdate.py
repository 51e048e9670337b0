"""The inverse Hessian of the remaining columns after a tile, in place.

    A_FF -= V^T V        V = U_TT^-T A_TF [T, F]

Only tiles of the lower triangle are computed; each is also written transposed, so that A stays
exactly symmetric. Equal to `sapq_triton.reference.downdate` up to the order of the sum and, where
PRECISION is not "ieee", its products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .triangle import even_tiles, triangle_tile


@triton.jit
def _downdate_kernel(
    inverse_ptr, stride_ab, stride_ai, stride_aj,  # [B, F, F] float32, in place
    rows_ptr, stride_vb, stride_vt, stride_vf,  # [B, T, F] float32
    F,
    T,
    n,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j = triangle_tile(tl.program_id(0), n)
    batch = tl.program_id(1).to(tl.int64)
    i = tile_i.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    j = tile_j.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    rows_ptr += batch * stride_vb
    inverse_ptr += batch * stride_ab
    update = tl.zeros([BLOCK_F, BLOCK_F], dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        t = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        i_ptrs = rows_ptr + t[None, :] * stride_vt + i[:, None] * stride_vf
        j_ptrs = rows_ptr + t[:, None] * stride_vt + j[None, :] * stride_vf
        v_i = tl.load(i_ptrs, mask=(i < F)[:, None] & (t < T)[None, :], other=0.0)
        v_j = tl.load(j_ptrs, mask=(t < T)[:, None] & (j < F)[None, :], other=0.0)
        update = tl.dot(v_i, v_j, update, input_precision=PRECISION)
    mask = (i < F)[:, None] & (i[:, None] >= j[None, :])  # each element once, by one thread
    lower = inverse_ptr + i[:, None] * stride_ai + j[None, :] * stride_aj
    upper = inverse_ptr + j[None, :] * stride_ai + i[:, None] * stride_aj
    a = tl.load(lower, mask=mask, other=0.0) - update
    tl.store(lower, a, mask=mask)
    tl.store(upper, a, mask=mask & (i[:, None] > j[None, :]))


def downdate(inverse: Tensor, rows: Tensor, precision: str) -> None:
    """inverse [B, F, F] in place, rows [B, T, F]"""
    B, F, _ = inverse.shape
    blocks = parameters("downdate", inverse.device)
    n, tiles = even_tiles(F, blocks["BLOCK_F"])
    with torch.cuda.device_of(inverse):
        _downdate_kernel[(tiles, B)](
            inverse, *inverse.stride(),
            rows, *rows.stride(),
            F,
            rows.shape[1],
            n,
            PRECISION=precision,
            **blocks,
        )  # fmt: skip
