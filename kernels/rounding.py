"""Rounding to the grid, as `torch.round` and `torch.div` do it.

code  = clamp(round(w / scale) + zero_point, 0, qmax)
value = (code - zero_point) * scale

In place of `qmax` a launcher may get a `sapq_triton.codebook.Codebook`, which says what code and
value then are. A kernel has it as a constant: fifteen comparisons and selections, all exact.
"""

import triton
import triton.language as tl

MAGIC: tl.constexpr = tl.constexpr(1.5 * 2**23)


def constants(qmax):
    """A kernel's arguments `qmax` and CODEBOOK, of which it looks at one."""
    return (0.0, qmax) if isinstance(qmax, tuple) else (float(qmax), None)


@triton.jit
def round_half_even(x):
    """Nearest integer of float32 |x| < 2**22, ties to even; larger values stay far off the grid.

    The sum with 1.5 * 2**23 has no fraction bits, so the addition rounds. libdevice.rint would do
    it on a GPU, but neither in the interpreter nor on ROCm.
    """
    return (x + MAGIC) - MAGIC


@triton.jit
def nearest(w, scale, zero_point, qmax, CODEBOOK: tl.constexpr):
    """code, value: all float32 of one shape but `qmax`; div_rn because `/` is only approximate."""
    x = tl.div_rn(w, scale)
    if CODEBOOK is None:
        code = tl.minimum(tl.maximum(round_half_even(x) + zero_point, 0.0), qmax)
        value = (code - zero_point) * scale
    else:
        levels: tl.constexpr = CODEBOOK[0]
        ascending: tl.constexpr = CODEBOOK[1]
        bounds: tl.constexpr = CODEBOOK[2]
        code = tl.zeros_like(x).to(tl.int32) + ascending[0]
        level = tl.zeros_like(x) + levels[ascending[0]]
        for k in tl.static_range(len(bounds)):
            code = tl.where(x > bounds[k], ascending[k + 1], code)
            level = tl.where(x > bounds[k], levels[ascending[k + 1]], level)
        code, value = code.to(tl.float32), level * scale
    return code, value
