"""Move the columns of the next tile to the front, touching no more than two tiles of columns.

The solver's matrices have rows innermost in memory: a kernel reads all rows of a column at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """What was at position `source` comes to position `target`: int64 [B, 2 T] each.

    each: int64 [B, 1], the numbers of the problems.
    """

    target: Tensor
    source: Tensor
    each: Tensor


def rows_innermost(matrix: Tensor) -> Tensor:
    """Equal to a matrix [B, R, N], laid out so."""
    return matrix.mT.contiguous().mT


def to_front(picked: Tensor, length: int) -> Move:
    """The exchange that brings positions `picked` (int64 [B, T], distinct) of `length` to 0..T-1.

    Positions that are evicted from the front go, in ascending order, to those that became free.
    """
    B, T = picked.shape
    front = torch.arange(T, device=picked.device).expand(B, T)
    stays = torch.zeros(B, length, dtype=torch.bool, device=picked.device)
    stays.scatter_(1, picked, True)
    evicted = front.gather(1, stays[:, :T].int().argsort(dim=1, stable=True))
    freed = picked.gather(1, (picked < T).int().argsort(dim=1, stable=True))
    # as many are freed as are evicted; the pairs beyond that lie in the front and are overwritten
    source = torch.arange(length, device=picked.device).repeat(B, 1)
    source.scatter_(1, freed, evicted).scatter_(1, front, picked)
    target = torch.cat((front, freed), 1)
    each = torch.arange(B, device=picked.device)[:, None]
    return Move(target, source.gather(1, target), each)


def bring_forward(tensor: Tensor, move: Move, dim: int) -> None:
    """Apply the exchange along `dim`, in place; dimension 0 is the batch."""
    lines = tensor.transpose(1, dim)
    lines[move.each, move.target] = lines[move.each, move.source]


def bring_both_forward(matrix: Tensor, move: Move) -> None:
    """Apply the exchange to rows and columns of a symmetric matrix [B, F, F], in place.

    Only rows are read, which lie better in memory than columns.
    """
    rows = matrix[move.each, move.source]
    bring_forward(rows, move, 2)
    matrix[move.each, move.target] = rows
    matrix.mT[move.each, move.target] = rows
