"""Sum of outer products of a layer's input rows, patches of a convolution gathered on the way.

    total_g += X_g^T X_g        row (image, position), column (channel of group g, window offset)

Only tiles of the lower triangle are computed and written. 16-bit inputs are multiplied as they are
(their products are exact in float32), float32 as PRECISION says; sums are float32, or float64 where
the total is. Equal to `sapq_triton.reference.accumulate_hessian` up to the order of the sum and,
where PRECISION is not "ieee", the products of float32.

Where there are too few tiles to fill a GPU, the rows are split among SPLITS programs per tile, each
with a partial sum of its own: the split depends on shapes only and nothing is added atomically, so
that the sum is always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .triangle import even_tiles, triangle_tile

PROGRAMS = 512  # enough to fill a GPU; more only cost memory for partial sums


@triton.jit
def _offset(
    index,  # ((outer * size_d + d) * size_h + h) * size_w + w
    size_d, size_h, size_w,
    step_d, step_h, step_w,
    stride_outer, stride_d, stride_h, stride_w,
):  # fmt: skip
    """int32 index  ->  int64; divisions of int64 take so many registers that they spill"""
    line, w = index // size_w, index % size_w
    plane, h = line // size_h, line % size_h
    outer, d = plane // size_d, plane % size_d
    return (
        outer.to(tl.int64) * stride_outer
        + (d * step_d).to(tl.int64) * stride_d
        + (h * step_h).to(tl.int64) * stride_h
        + (w * step_w).to(tl.int64) * stride_w
    )


@triton.jit
def _accumulate_hessian_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,  # [N, channels, D, H, W] float
    partial_ptr, stride_ps, stride_pg, stride_pi, stride_pj,  # [SPLITS, groups, C, C] float32
    out_d, out_h, out_w,  # positions of the window
    size_d, size_h, size_w,
    step_d, step_h, step_w,  # stride of the window
    dilation_d, dilation_h, dilation_w,
    channels,  # per group
    rows_total,  # N * out_d * out_h * out_w
    rows_each,  # rows of one split, a multiple of BLOCK_ROWS
    n,
    ADD: tl.constexpr,  # to what is there
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j = triangle_tile(tl.program_id(0), n)
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    C = channels * size_d * size_h * size_w
    i = tile_i * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    j = tile_j * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x_ptr += group * channels * stride_xc
    offset_i = _offset(
        i,
        size_d, size_h, size_w,
        dilation_d, dilation_h, dilation_w,
        stride_xc, stride_xd, stride_xh, stride_xw,
    )  # fmt: skip
    offset_j = _offset(
        j,
        size_d, size_h, size_w,
        dilation_d, dilation_h, dilation_w,
        stride_xc, stride_xd, stride_xh, stride_xw,
    )  # fmt: skip
    lanes = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    positions = out_d * out_h * out_w
    total = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
    for start in range(0, rows_each, BLOCK_ROWS):
        row = split * rows_each + start  # of the first lane
        inside = row + lanes < rows_total  # [BLOCK_ROWS]
        offset = row // positions * stride_xn + _offset(
            (row % positions).to(tl.int32) + lanes,
            out_d, out_h, out_w,
            step_d, step_h, step_w,
            stride_xn, stride_xd, stride_xh, stride_xw,
        )  # fmt: skip
        mask_i = inside[:, None] & (i < C)[None, :]
        mask_j = inside[:, None] & (j < C)[None, :]
        # both in one layout: the other way round each thread would need the offsets of more rows
        x_i = tl.load(x_ptr + offset[:, None] + offset_i[None, :], mask=mask_i, other=0.0)
        x_j = tl.load(x_ptr + offset[:, None] + offset_j[None, :], mask=mask_j, other=0.0)
        total = tl.dot(tl.trans(x_i), x_j, total, input_precision=PRECISION)
    p_ptrs = partial_ptr + split * stride_ps + group * stride_pg
    p_ptrs += i[:, None].to(tl.int64) * stride_pi + j[None, :].to(tl.int64) * stride_pj
    mask = (i < C)[:, None] & (j < C)[None, :]
    if ADD:
        total += tl.load(p_ptrs, mask=mask, other=0.0)
    tl.store(p_ptrs, total, mask=mask)


def accumulate_hessian(total: Tensor, inputs: Tensor, window, precision: str) -> None:
    """total [groups, C, C] in place, inputs [N, channels, D, H, W]; window: `sapq_triton.Window`"""
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    groups, C, _ = total.shape
    positions = window.positions(inputs.shape[2:])
    rows = len(inputs) * positions[0] * positions[1] * positions[2]
    precision = precision if inputs.dtype == torch.float32 else "16-bit"
    blocks = dict(parameters("accumulate_hessian", inputs.device, precision))
    if blocks["BLOCK_C"] > C:
        blocks |= {"BLOCK_C": max(16, triton.next_power_of_2(C)), "num_warps": 4}
    n, tiles = even_tiles(C, blocks["BLOCK_C"])
    splits = max(1, min(PROGRAMS // (tiles * groups), rows // 1024))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), blocks["BLOCK_ROWS"]) * blocks["BLOCK_ROWS"]
    into = splits == 1 and total.dtype == torch.float32
    # the upper triangle is never written, nor read
    shape = (splits, groups, C, C)
    partial = total[None] if into else torch.zeros(shape, dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(inputs):
        _accumulate_hessian_kernel[(tiles, groups, splits)](
            inputs, *inputs.stride(),
            partial, *partial.stride(),
            *positions,
            *window.size,
            *window.stride,
            *window.dilation,
            inputs.shape[1] // groups,
            rows,
            rows_each,
            n,
            ADD=into,
            PRECISION="ieee" if precision == "16-bit" else precision,  # which 16 bits do not need
            **blocks,
        )  # fmt: skip
    if not into:
        total += partial.to(total.dtype).sum(0)
