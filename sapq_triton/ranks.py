"""The processes that work on one model, and what they tell each other: torch.distributed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .hessian import HessianSum

T = TypeVar("T")


class Ranks:
    """This process among those of the default group of torch.distributed, or all alone.

    Every process makes the same calls in the same order. One that has ended, or does not come for
    the time-out of the group, is a RuntimeError in all others.
    """

    def __init__(self, distributed: bool = False) -> None:
        """ValueError where there is no group to be distributed among."""
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed needs torch.distributed.init_process_group in every process: torchrun"
            )
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    def own(self, count: int) -> range:
        """Of so many batches, the numbers of those that are this process's."""
        return range(self.rank, count, self.size)

    def gather(self, value: T) -> list[T]:
        """What all have said, by rank. Small: it is pickled."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    @contextmanager
    def led(
        self,
        begin: Callable[[], AbstractContextManager[T]],
        said: Callable[[T], Any],
        heard: Callable[[Any], T],
    ) -> Iterator[T]:
        """What the first process opens, and closes after all have come to the end.

        said: what of it the others are told; heard: what they make of that. A ValueError at the
        beginning is raised in all of them.
        """
        if self.rank > 0:
            error, content = self.gather(None)[0] or ("", None)
            if error:
                raise ValueError(error)
            yield heard(content)
            self.gather(None)  # all are done
            self.gather(None)  # and it is closed
            return
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(begin())
            except ValueError as error:
                self.gather((str(error), None))
                raise
            self.gather(("", said(opened)))
            yield opened
            self.gather(None)
        self.gather(None)

    def broadcast(self, tensors: Iterable[Tensor | None], source: int) -> None:
        """The values of one process, in place."""
        if self.size > 1:
            for tensor in tensors:
                if tensor is not None:
                    dist.broadcast(tensor, source)

    def sum(self, sums: Mapping[int, HessianSum], empty: HessianSum) -> HessianSum:
        """What all processes have summed, added to an empty sum in the order of the keys.

        Each key is held by one process: the result does not depend on which.
        """
        rows = self.gather({key: part.rows for key, part in sums.items()})
        held = sorted((key, rank) for rank, mine in enumerate(rows) for key in mine)
        if self.size == 1 and len(held) == 1:
            return sums[held[0][0]]
        for key, rank in held:
            part = sums[key] if rank == self.rank else empty.like()
            part.rows = rows[rank][key]
            self.broadcast((part.total, part.sums, part.drifts), rank)
            empty.merge(part)
        return empty
