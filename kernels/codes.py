"""Codes of a bit stream in int32 words, as `sapq_triton.packing` lays them."""

import triton
import triton.language as tl


@triton.jit
def code_at(rows, stride, index, mask, BITS: tl.constexpr):
    """Codes number `index`, int64 [..., n], of the streams at `rows` [..., 1]; float32"""
    bit = index * BITS
    shift = (bit % 32).to(tl.uint32)
    ptrs = rows + bit // 32 * stride
    code = tl.load(ptrs, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        following = tl.load(ptrs + stride, mask=mask & (shift + BITS > 32), other=0)
        code |= following.to(tl.uint32, bitcast=True) << ((32 - shift) % 32)
    return (code & (2**BITS - 1)).to(tl.float32)
