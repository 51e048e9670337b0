"""Number the tiles of a lower triangle, so that no program is launched for the upper one."""

import triton
import triton.language as tl


@triton.jit
def triangle_tile(index, n):
    """0 <= index < n (n + 1) / 2 for even n  ->  tile row, tile column (column <= row < n)

    Rows n - 1 - r and r together have n + 1 tiles: n / 2 such pairs.
    """
    pair = index // (n + 1)
    place = index % (n + 1)
    long = place < n - pair
    row = tl.where(long, n - 1 - pair, pair)
    column = tl.where(long, place, place - (n - pair))
    return row, column


def even_tiles(size: int, block: int) -> tuple[int, int]:
    """Tiles along one side, rounded up to even, and the number of tiles of the triangle."""
    n = triton.cdiv(size, 2 * block) * 2
    return n, n * (n + 1) // 2
