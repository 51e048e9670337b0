"""Rounding to the grid, as `torch.round` and `torch.div` do it.

code  = clamp(round(w / scale) + zero_point, 0, qmax)
value = (code - zero_point) * scale
"""

import triton
import triton.language as tl

MAGIC: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def round_half_even(x):
    """Nearest integer of float32 |x| < 2**22, ties to even; larger values stay far off the grid.

    The sum with 1.5 * 2**23 has no fraction bits, so the addition rounds. libdevice.rint would do
    it on a GPU, but neither in the interpreter nor on ROCm.
    """
    return (x + MAGIC) - MAGIC


@triton.jit
def to_code(w, scale, zero_point, qmax):
    """All arguments float32 of one shape but `qmax`; div_rn because `/` is only approximate."""
    code = round_half_even(tl.div_rn(w, scale)) + zero_point
    return tl.minimum(tl.maximum(code, 0.0), qmax)


@triton.jit
def to_value(code, scale, zero_point):
    return (code - zero_point) * scale
