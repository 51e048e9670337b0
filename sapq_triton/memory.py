"""Work on the rows of a weight in smaller parts where memory runs out.

Rows meet only in what is summed over them: the order of columns, a share of zeros. All else is done
row by row, and a part of the rows gives what all of them would: to the bit in Triton's kernels,
whose sums for a row do not know the other rows. Products by PyTorch and NumPy are up to their
libraries: on a CPU the tests hold them to the bit, as vector loops end at the same rows where parts
are multiples of LEAST.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 64  # rows that are not halved again

# of RuntimeErrors: PyTorch's allocator on a CPU, the drivers and libraries of GPUs
MESSAGES = ("out of memory", "can't allocate memory", "alloc_failed", "bad_alloc")


def ran_out(error: BaseException) -> bool:
    """Whether memory was asked for and not given."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in MESSAGES)


class Rows:
    """How many rows are worked on at a time: all of them, until memory runs out.

    least: rows that are not halved again. failed: numbers of rows that were too many. shared: with
    other processes, which would not come to the CPU.
    """

    shared = False

    def __init__(self, least: int = LEAST) -> None:
        self.failed: list[int] = []
        self.least = least
        self._size: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried, and what worked; empty where memory sufficed."""
        if not self.failed:
            return ()
        tried = ", ".join(map(str, self.failed))
        return (f"out of memory with {tried} rows at a time, not with {self._size}",)

    def map(
        self, total: int, work: Callable[[slice], tuple[Tensor, ...]], most: int | None = None
    ) -> tuple[Tensor, ...]:
        """What `work` makes of all rows, [B, total, ...] each, from parts of them.

        work: called with the rows of a part, and again with fewer where it ran out of memory; what
        else it changes must bear that. most: rows at a time. The error itself is raised where the
        least number of rows is too many.
        """
        parts, start = [], 0
        while start < total:
            size = min(self._size or total, most or total, total - start)
            try:
                parts.append(work(slice(start, start + size)))
            except Exception as error:
                if size <= self.least or not ran_out(error):
                    raise
                self.failed.append(size)
                self._size = -(-size // (2 * self.least)) * self.least
            else:
                start += size
            # behind the handler nothing keeps the tensors of a failed call alive
        return parts[0] if len(parts) == 1 else tuple(map(joined, zip(*parts, strict=True)))


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """All rows, in memory as the parts are: with rows or columns innermost. Sums depend on it."""
    if parts[0].is_contiguous():
        return torch.cat(parts, 1)
    return torch.cat([part.mT for part in parts], 2).mT
