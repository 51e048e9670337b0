"""The processes that work on one model, and what they tell each other: torch.distributed."""

import io
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
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

    def from_rank(self, source: int, value: T | None, device: torch.device) -> T:
        """What one of them has; its tensors on `device`."""
        if self.size == 1:
            assert value is not None
            return value
        said: list[Any] = [None]
        if self.rank == source:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            said = [buffer.getvalue()]
        dist.broadcast_object_list(said, source)
        if self.rank == source:
            assert value is not None
            return value
        found: T = torch.load(io.BytesIO(said[0]), map_location=device, weights_only=False)
        return found

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
