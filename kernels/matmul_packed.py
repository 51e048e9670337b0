"""Product of a few rows with a weight of packed codes, unpacked on their way to the matrix cores.

    y_mn = sum_k x_mk w_nk        w_nk = (code_nk - zero_point_ng) scale_ng, g = k // group_size
         = sum_k x_mk (code_nk - middle) scale_ng + sum_g (middle - zero_point_ng) scale_ng X_mg

middle = 2**(BITS - 1), X_mg the sum of x over the columns of g. Equal to
`sapq_triton.reference.matmul_packed` up to the order of the sums, which are float32, and

- products of float32, as PRECISION says: all where x is float32, elsewhere those of X
- where x has 16 bits and a block of columns reaches into several groups (SCALES is not "block"),
  (code - middle) scale is rounded to the dtype of x, once
- y is rounded to the dtype of x, once

code - middle is an integer of at most 2**7 in size, which 16 bits hold: where a block of columns
lies in one group, integers are multiplied and the sum is scaled, so that no weight is rounded.

The pattern of a stream repeats after a period of LANES codes in SPAN words. A block holds words of
BLOCK_P periods, each loaded once; lane l of all of them are the codes of columns l, LANES + l, ...,
which meet these columns of x in one product. No code moves between threads, and for that nothing
but a word and a scale goes into a weight: hence the second sum.

x is finite: elsewhere its row of y is not finite either, but may hold NaN for Inf.

Where there are too few tiles to fill a GPU, the columns are split among programs with a partial sum
each: by shapes only, and nothing is added atomically, so that the sum is always the same.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import code_at
from .launch import parameters

PROGRAMS = 512  # enough to fill a GPU; more only cost memory for partial sums
LEAST_BLOCKS = 4  # of columns for one program
BLOCK_G = tl.constexpr(16)
ONE = tl.constexpr(0x4B000000)  # the bits of 2.0**23


@triton.jit
def _steps(word, following, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """code - middle, exact, float32, of the code at bit SHIFT of uint32 words

    The bits of an integer i < 2**23, put below the exponent of 2**23, are the number 2**23 + i. A
    code that stays at its place in the word counts 2**SHIFT times, which the product takes back.
    """
    # of the upper half of a word one shift serves all lanes
    UPPER: tl.constexpr = SHIFT - 16 if SHIFT >= 16 and SHIFT + BITS <= 32 else 0
    PLACE: tl.constexpr = SHIFT if SHIFT + BITS <= 23 else UPPER
    bits = word >> (SHIFT - PLACE)
    if SHIFT + BITS > 32:
        bits |= following << (32 - SHIFT)
    number = ((bits & ((2**BITS - 1) << PLACE)) | ONE).to(tl.float32, bitcast=True)
    return number * (2.0**-PLACE) - (2.0 ** (23 - PLACE) + 2.0 ** (BITS - 1))


@triton.jit
def _matmul_packed_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, periods * LANES] 16-bit or float32
    sums_ptr, stride_um, stride_ug,  # [M, G] float32, unless SYMMETRIC
    qweight_ptr, stride_qn, stride_qw,  # [N, words] int32
    scale_ptr, stride_sn, stride_sg,  # [N, G] float
    qzeros_ptr, stride_zn, stride_zw,  # [N, words of G codes] int32, unless SYMMETRIC
    y_ptr, stride_ys, stride_ym, stride_yn,  # [splits, M, N] float
    M,
    N,
    G,
    words,
    periods,
    group_size,
    blocks,  # of BLOCK_P periods
    blocks_each,  # of one split
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    SPAN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALES: tl.constexpr,  # what certainly lies in one group: a "block", a "period", or a "lane"
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    split = tl.program_id(2)
    in_n, in_m = (n < N)[:, None], (m < M)[None, :]
    s_rows = scale_ptr + n[:, None] * stride_sn
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if not SYMMETRIC:
        for start in range(split * BLOCK_G, G, tl.num_programs(2) * BLOCK_G):
            g = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_G)  # [BLOCK_G]
            mask = in_n & (g < G)[None, :]
            scale = tl.load(s_rows + g[None, :] * stride_sg, mask=mask, other=0.0).to(tl.float32)
            z_rows = qzeros_ptr + n[:, None] * stride_zn
            zero_point = code_at(z_rows, stride_zw, g[None, :], mask, BITS)
            u_ptrs = sums_ptr + m[None, :] * stride_um + g[:, None] * stride_ug
            sums = tl.load(u_ptrs, mask=in_m & (g < G)[:, None], other=0.0)
            lifted = (2.0 ** (BITS - 1) - zero_point) * scale
            total = tl.dot(lifted, sums, total, input_precision=PRECISION)
    first = split * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        held = ()
        for i in tl.static_range(SPAN):
            w = (p * SPAN + i).to(tl.int64)
            q_ptrs = qweight_ptr + n[:, None] * stride_qn + w[None, :] * stride_qw
            word = tl.load(q_ptrs, mask=in_n & (w < words)[None, :], other=0)
            held = held + (word.to(tl.uint32, bitcast=True),)
        if SCALES == "block":
            g = (block * BLOCK_P * LANES // group_size).to(tl.int64)
            scale = tl.load(s_rows + g * stride_sg, mask=in_n, other=0.0).to(tl.float32)
        elif SCALES == "period":
            g = (p * LANES // group_size).to(tl.int64)[None, :]
            scale = tl.load(s_rows + g * stride_sg, mask=in_n & (g < G), other=0.0).to(tl.float32)
        part = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32) if SCALES == "block" else total
        for lane in tl.static_range(LANES):
            k = (p * LANES + lane).to(tl.int64)[:, None]
            x_ptrs = x_ptr + m[None, :] * stride_xm + k * stride_xk
            x = tl.load(x_ptrs, mask=in_m & (p < periods)[:, None], other=0.0)
            word, following = held[lane * BITS // 32], held[(lane + 1) * BITS // 32 % SPAN]
            weight = _steps(word, following, lane * BITS % 32, BITS)
            if SCALES == "lane":
                g = ((p * LANES + lane) // group_size).to(tl.int64)[None, :]
                scale = tl.load(s_rows + g * stride_sg, mask=in_n & (g < G), other=0.0)
                scale = scale.to(tl.float32)
            if SCALES != "block":
                weight *= scale
            part = tl.dot(weight.to(x.dtype), x, part, input_precision=PRECISION)
        total = total + part * scale if SCALES == "block" else part
    y_ptrs = y_ptr + split.to(tl.int64) * stride_ys + m[None, :] * stride_ym
    tl.store(y_ptrs + n[:, None] * stride_yn, total, mask=in_n & in_m)


def matmul_packed(
    x: Tensor, qweight: Tensor, scale: Tensor, qzeros: Tensor | None, bits: int, precision: str
) -> Tensor:
    """x [M, K], qweight int32 [N, words], scale [N, G], qzeros int32 [N, words of G codes], or None
    where all zero points are the middle code  ->  [M, N] in the dtype of x"""
    M, K = x.shape
    N, G = scale.shape
    group_size = K // G
    lanes = 32 // math.gcd(bits, 32)
    periods = triton.cdiv(K, lanes)
    blocks = dict(parameters("matmul_packed", x.device, precision))
    sizes = [size for size in (16, 32, 64) if size <= blocks["BLOCK_P"]]
    whole = [size for size in sizes if G == 1 or group_size % (size * lanes) == 0]
    blocks["BLOCK_P"] = max(whole, default=sizes[0])
    count = triton.cdiv(periods, blocks["BLOCK_P"])
    tiles = triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(M, blocks["BLOCK_M"])
    splits = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), count // LEAST_BLOCKS))
    blocks_each = triton.cdiv(count, splits)
    splits = triton.cdiv(count, blocks_each)

    sums = scale if qzeros is None else x.unflatten(1, (G, -1)).sum(2, dtype=torch.float32)
    zeros = qweight if qzeros is None else qzeros
    if K % lanes:
        x = torch.constant_pad_nd(x, (0, -K % lanes))
    dtype = x.dtype if splits == 1 else torch.float32
    y = torch.empty((splits, M, N), dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _matmul_packed_kernel[(*tiles, splits)](
            x, *x.stride(),
            sums, *sums.stride(),
            qweight, *qweight.stride(),
            scale, *scale.stride(),
            zeros, *zeros.stride(),
            y, *y.stride(),
            M,
            N,
            G,
            qweight.shape[1],
            periods,
            group_size,
            count,
            blocks_each,
            BITS=bits,
            LANES=lanes,
            SPAN=lanes * bits // 32,
            SYMMETRIC=qzeros is None,
            SCALES="block" if whole else "period" if group_size % lanes == 0 else "lane",
            PRECISION=precision,
            **blocks,
        )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)
