"""The numbering of the tiles of a lower triangle."""

import pytest
import torch
import triton
import triton.language as tl

from sapq_triton.kernels.triangle import even_tiles, triangle_tile


@triton.jit
def _enumerate_kernel(row_ptr, column_ptr, n):
    index = tl.program_id(0)
    row, column = triangle_tile(index, n)
    tl.store(row_ptr + index, row)
    tl.store(column_ptr + index, column)


@pytest.mark.parametrize("n", range(1, 13))
def test_each_lower_tile_comes_once(n: int, device: torch.device) -> None:
    tiles = n * (n + 1) // 2
    row = torch.empty(tiles, dtype=torch.int32, device=device)
    column = torch.empty_like(row)
    _enumerate_kernel[(tiles,)](row, column, n)
    expected = {(i, j) for i in range(n) for j in range(i + 1)}
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [1, 64, 65, 128, 129, 256, 257])
def test_tiles_cover_the_matrix(size: int) -> None:
    n, tiles = even_tiles(size, 64)
    assert size <= n * 64 < size + 2 * 64
    assert tiles == n * (n + 1) // 2
