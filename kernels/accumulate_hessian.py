"""Sum of outer products of a layer's input rows, patches of a convolution gathered on the way.

    total_g += X_g^T X_g        row (image, position), column (channel of group g, window offset)

Only tiles of the lower triangle are computed and written. 16-bit inputs are multiplied as they are
(their products are exact in float32), float32 as PRECISION says; sums are float32, or float64 where
the total is. Equal to `sapq_triton.reference.accumulate_hessian` up to the order of the sum and,
where PRECISION is not "ieee", the products of float32.

Where there are too few tiles to fill a GPU, the rows are split among SPLITS programs per tile, each
with a partial sum of its own: the split depends on shapes only and nothing is added atomically, so
that the sum is always the same.

Tensor cores cut sums off instead of rounding them, so that squares come out too small the more of
them there are: 65,536 rows of bfloat16 lost 2e-4 of the diagonal on an H100. A program therefore
sums no more than about CHUNK rows before they are added, rounded, to what is in memory.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .triangle import even_tiles, triangle_tile

CHUNK = 8192  # rows that a program sums in one launch
PROGRAMS = 512  # enough to fill a GPU; more only cost memory for partial sums


@triton.jit
def _accumulate_hessian_kernel(
    x_ptr, stride_xn, stride_xc,  # [N, channels, D, H, W] float
    position_ptr,  # [positions] int: offset of a window position in an image
    column_ptr,  # [C] int: offset of a column's element in a window
    partial_ptr, stride_ps, stride_pg, stride_pi, stride_pj,  # [SPLITS, groups, C, C] float32
    C,
    channels,  # per group
    positions,
    rows_total,  # N * positions
    rows_each,  # rows of one split, a multiple of BLOCK_ROWS
    n,
    PATCHES: tl.constexpr,  # else a row is a row of x, contiguous or not
    ADD: tl.constexpr,  # to what is there
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j = triangle_tile(tl.program_id(0), n)
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    i = tile_i * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    j = tile_j * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x_ptr += group * channels * stride_xc
    if PATCHES:
        offset_i = tl.load(column_ptr + i, mask=i < C, other=0)
        offset_j = tl.load(column_ptr + j, mask=j < C, other=0)
    lanes = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    total = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
    for start in range(0, rows_each, BLOCK_ROWS):
        row = split * rows_each + start  # of the first lane
        inside = row + lanes < rows_total  # [BLOCK_ROWS]
        if PATCHES:
            # neighbouring lanes are neighbouring positions, and mostly neighbours in memory
            place = (row % positions).to(tl.int32) + lanes  # int32: int64 divisions spill
            image = row // positions + place // positions
            offset = image * stride_xn + tl.load(position_ptr + place % positions)
            mask_i = (i < C)[:, None] & inside[None, :]
            mask_j = (j < C)[:, None] & inside[None, :]
            x_i = tl.load(x_ptr + offset[None, :] + offset_i[:, None], mask=mask_i, other=0.0)
            x_j = tl.load(x_ptr + offset[None, :] + offset_j[:, None], mask=mask_j, other=0.0)
            total = tl.dot(x_i, tl.trans(x_j), total, input_precision=PRECISION)
        else:
            x_rows = x_ptr + (row + lanes)[:, None] * stride_xn
            mask_i = inside[:, None] & (i < C)[None, :]
            mask_j = inside[:, None] & (j < C)[None, :]
            x_i = tl.load(x_rows + i.to(tl.int64)[None, :] * stride_xc, mask=mask_i, other=0.0)
            x_j = tl.load(x_rows + j.to(tl.int64)[None, :] * stride_xc, mask=mask_j, other=0.0)
            total = tl.dot(tl.trans(x_i), x_j, total, input_precision=PRECISION)
    p_ptrs = partial_ptr + split * stride_ps + group * stride_pg
    p_ptrs += i[:, None].to(tl.int64) * stride_pi + j[None, :].to(tl.int64) * stride_pj
    mask = (i < C)[:, None] & (j < C)[None, :]
    if ADD:
        total += tl.load(p_ptrs, mask=mask, other=0.0)
    tl.store(p_ptrs, total, mask=mask)


@lru_cache(maxsize=256)  # one launch for each batch of a layer, not a dozen
def _offsets(sizes: tuple[int, ...], steps: tuple[int, ...], device: torch.device) -> Tensor:
    """sum_a index_a * step_a of every index, row-major: int [product of sizes]"""
    reach = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for size, step in zip(sizes, steps, strict=True):
        total = total[:, None] + torch.arange(size, device=device) * step
        total = total.flatten()
    return total.int() if reach < 2**31 else total


def accumulate_hessian(total: Tensor, inputs: Tensor, window, precision: str) -> None:
    """total [groups, C, C] in place, inputs [N, channels, D, H, W]; window: `sapq_triton.Window`"""
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    groups, C, _ = total.shape
    positions = window.positions(inputs.shape[2:])
    count = positions[0] * positions[1] * positions[2]
    rows, channels = len(inputs) * count, inputs.shape[1] // groups
    stride_n, stride_c, *space = inputs.stride()
    moves = tuple(step * stride for step, stride in zip(window.stride, space, strict=True))
    reaches = tuple(step * stride for step, stride in zip(window.dilation, space, strict=True))
    precision = precision if inputs.dtype == torch.float32 else "16-bit"
    blocks = dict(parameters("accumulate_hessian", inputs.device, precision))
    if blocks["BLOCK_C"] > C:
        blocks |= {"BLOCK_C": max(16, triton.next_power_of_2(C)), "num_warps": 4}
    n, tiles = even_tiles(C, blocks["BLOCK_C"])
    splits = max(1, min(PROGRAMS // (tiles * groups), rows // 1024))
    into = splits == 1 and total.dtype == torch.float32
    # the upper triangle is never written, nor read
    shape = (splits, groups, C, C)
    partial = total[None] if into else torch.zeros(shape, dtype=torch.float32, device=total.device)
    for images in inputs.split(max(1, splits * CHUNK // count)):
        rows = len(images) * count
        rows_each = triton.cdiv(triton.cdiv(rows, splits), blocks["BLOCK_ROWS"])
        with torch.cuda.device_of(inputs):
            _accumulate_hessian_kernel[(tiles, groups, splits)](
                images, stride_n, stride_c,
                _offsets(positions, moves, inputs.device),
                _offsets((channels, *window.size), (stride_c, *reaches), inputs.device),
                partial, *partial.stride(),
                C,
                channels,
                count,
                rows,
                rows_each * blocks["BLOCK_ROWS"],
                n,
                PATCHES=channels < C or count > 1,
                ADD=into or len(images) < len(inputs),
                PRECISION="ieee" if precision == "16-bit" else precision,  # 16 bits do not need it
                **blocks,
            )  # fmt: skip
    if not into:
        total += partial.to(total.dtype).sum(0)
