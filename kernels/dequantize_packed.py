"""The weight that packed codes stand for.

    w_rc = (code_rc - zero_point_rg) scale_rg        g = c // group_size

The product is rounded to float32, and then to `dtype`: bit for bit
`sapq_triton.reference.dequantize_packed`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import code_at
from .launch import parameters


@triton.jit
def _dequantize_packed_kernel(
    qweight_ptr, stride_qr, stride_qw,  # [R, words of C codes] int32
    scale_ptr, stride_sr, stride_sg,  # [R, G] float
    qzeros_ptr, stride_zr, stride_zw,  # [R, words of G codes] int32, unless SYMMETRIC
    weight_ptr, stride_wr, stride_wc,  # [R, C] float
    R,
    C,
    group_size,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BLOCK_R, 1]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    mask = (r < R) & (c < C)
    g = (c // group_size).to(tl.int64)
    c = c.to(tl.int64)
    code = code_at(qweight_ptr + r * stride_qr, stride_qw, c, mask, BITS)
    scale = tl.load(scale_ptr + r * stride_sr + g * stride_sg, mask=mask, other=0.0)
    if SYMMETRIC:
        zero_point = 2.0 ** (BITS - 1)
    else:
        zero_point = code_at(qzeros_ptr + r * stride_zr, stride_zw, g, mask, BITS)
    weight = (code - zero_point) * scale.to(tl.float32)
    tl.store(weight_ptr + r * stride_wr + c * stride_wc, weight, mask=mask)


def dequantize_packed(
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """qweight int32 [R, words], scale [R, G], qzeros int32 [R, words of G codes], or None where all
    zero points are the middle code  ->  `dtype` [R, columns]"""
    R, G = scale.shape
    weight = torch.empty((R, columns), dtype=dtype, device=qweight.device)
    blocks = parameters("dequantize_packed", qweight.device)
    zeros = qweight if qzeros is None else qzeros
    grid = triton.cdiv(R, blocks["BLOCK_R"]), triton.cdiv(columns, blocks["BLOCK_C"])
    with torch.cuda.device_of(qweight):
        _dequantize_packed_kernel[grid](
            qweight, *qweight.stride(),
            scale, *scale.stride(),
            zeros, *zeros.stride(),
            weight, *weight.stride(),
            R,
            columns,
            columns // G,
            BITS=bits,
            SYMMETRIC=qzeros is None,
            **blocks,
        )  # fmt: skip
    return weight
