"""Sum of outer products of a layer's input rows, patches of a convolution gathered on the way.

    total_g += X_g^T X_g        row (image, position), column (channel of group g, window offset)

Only tiles of the lower triangle are computed and written. 16-bit inputs are multiplied as they are
(their products are exact in float32), float32 inputs in float32; sums are float32, or float64 where
the total is. Equal to `sapq_triton.reference.accumulate_hessian` up to the order of the sum.

The rows are split among SPLITS programs per tile, each with a partial sum of its own: the split
depends on shapes only and nothing is added atomically, so that the sum is always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triangle import even_tiles, triangle_tile

PROGRAMS = 512  # enough to fill a GPU; more only cost memory for partial sums


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
    rows_each,  # rows of one split
    n,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j = triangle_tile(tl.program_id(0), n)
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    C = channels * size_d * size_h * size_w
    # indices are divided as int32: int64 division spills registers; offsets are int64
    i = tile_i * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    j = tile_j * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x_ptr += group * channels * stride_xc
    volume, area = size_d * size_h * size_w, size_h * size_w
    offset_i = (
        (i // volume).to(tl.int64) * stride_xc
        + (i // area % size_d * dilation_d).to(tl.int64) * stride_xd
        + (i // size_w % size_h * dilation_h).to(tl.int64) * stride_xh
        + (i % size_w * dilation_w).to(tl.int64) * stride_xw
    )
    offset_j = (
        (j // volume).to(tl.int64) * stride_xc
        + (j // area % size_d * dilation_d).to(tl.int64) * stride_xd
        + (j // size_w % size_h * dilation_h).to(tl.int64) * stride_xh
        + (j % size_w * dilation_w).to(tl.int64) * stride_xw
    )
    lanes = tl.arange(0, BLOCK_ROWS)
    positions = out_d * out_h * out_w
    total = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
    for start in range(0, rows_each, BLOCK_ROWS):
        row = split * rows_each + start  # of the first lane, int64
        inside = (row + lanes < rows_total) & (start + lanes < rows_each)  # [BLOCK_ROWS]
        position = (row % positions).to(tl.int32) + lanes
        image = row // positions + position // positions
        offset = (
            image * stride_xn
            + (position // (out_h * out_w) % out_d * step_d).to(tl.int64) * stride_xd
            + (position // out_w % out_h * step_h).to(tl.int64) * stride_xh
            + (position % out_w * step_w).to(tl.int64) * stride_xw
        )
        mask_i = (i < C)[:, None] & inside[None, :]
        mask_j = inside[:, None] & (j < C)[None, :]
        x_i = tl.load(x_ptr + offset_i[:, None] + offset[None, :], mask=mask_i, other=0.0)
        x_j = tl.load(x_ptr + offset[:, None] + offset_j[None, :], mask=mask_j, other=0.0)
        total = tl.dot(x_i, x_j, total, input_precision="ieee")
    p_ptrs = partial_ptr + split * stride_ps + group * stride_pg
    p_ptrs += i[:, None].to(tl.int64) * stride_pi + j[None, :].to(tl.int64) * stride_pj
    tl.store(p_ptrs, total, mask=(i < C)[:, None] & (j < C)[None, :])


def accumulate_hessian(total: Tensor, inputs: Tensor, window) -> None:
    """total [groups, C, C] in place, inputs [N, channels, D, H, W]; window: `sapq_triton.Window`"""
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    groups, C, _ = total.shape
    positions = window.positions(inputs.shape[2:])
    rows = len(inputs) * positions[0] * positions[1] * positions[2]
    BLOCK_C, BLOCK_ROWS = 64, 32
    n, tiles = even_tiles(C, BLOCK_C)
    splits = max(1, min(PROGRAMS // (tiles * groups), rows // 1024))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), BLOCK_ROWS) * BLOCK_ROWS
    # the upper triangle is never written, nor read
    partial = torch.zeros((splits, groups, C, C), dtype=torch.float32, device=total.device)
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
            BLOCK_C=BLOCK_C,
            BLOCK_ROWS=BLOCK_ROWS,
        )  # fmt: skip
    total += partial.to(total.dtype).sum(0)
