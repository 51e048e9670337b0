"""The error of one column, fed back into the columns that are being quantized."""

import triton
import triton.language as tl


@triton.jit
def add_feedback(
    w,  # tuple of SUB row vectors [BLOCK_R]: the columns from `start`
    error_ptrs, row_mask,  # [BLOCK_R]: error of column j
    feedback_ptr, stride_fk,  # row j of the feedback [T]
    start,
    T,
    EVEN: tl.constexpr,  # SUB divides T
    SUB: tl.constexpr,
):  # fmt: skip
    """w_k + error_j * feedback_jk of one column j"""
    error = tl.load(error_ptrs, mask=row_mask, other=0.0)
    grown = ()
    for i in tl.static_range(SUB):
        k = tl.cast(start + i, tl.int64)
        f = tl.load(feedback_ptr + k * stride_fk, mask=EVEN | (k < T), other=0.0)
        grown = grown + (w[i] + error * f,)
    return grown
