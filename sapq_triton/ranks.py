"""The processes that work on one model, and what they tell each other: torch.distributed.

What a layer is calibrated on comes from the quantized layers before it: few of them can be solved
at the same time. So batches are shared, and the rows of each large solve, in equal parts; a small
one takes longer to tell of than to solve, and each process solves it by itself. The experts of a
block do not wait for one another: those are dealt out by their cost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .hessian import HessianSum
from .memory import Rows, joined

T = TypeVar("T")


SHARED = 2**26  # R C^2 of a solve that is worth telling each other of


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

    def shared_rows(self, hessian: Tensor, weight: Tensor) -> Rows | None:
        """For a solve that all make: None where each is to work on all rows by itself.

        weight [B, R, C], hessian [B, C, C]: a small one takes longer to tell of than to solve.
        """
        large = weight.shape[1] * hessian.numel() >= SHARED
        return SharedRows(self, weight.device) if self.size > 1 and large else None

    def broadcast(self, tensors: Iterable[Tensor | None], source: int) -> None:
        """The values of one process, in place."""
        if self.size > 1:
            for tensor in tensors:
                if tensor is not None:  # gloo knows no bool
                    plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                    dist.broadcast(plain, source)

    def sum(self, sums: Mapping[int, HessianSum], empty: HessianSum) -> HessianSum:
        """What all processes have summed, added to an empty sum in the order of the keys.

        Each key is held by one process: the result does not depend on which.
        """
        rows = self.gather({key: (part.rows, part.unmatched) for key, part in sums.items()})
        held = sorted((key, rank) for rank, mine in enumerate(rows) for key in mine)
        if self.size == 1 and len(held) == 1:
            return sums[held[0][0]]
        for key, rank in held:
            part = sums[key] if rank == self.rank else empty.like()
            part.rows, part.unmatched = rows[rank][key]
            self.broadcast((part.total, part.sums, part.drifts), rank)
            empty.merge(part)
        return empty


def deal(costs: Iterable[float], hands: int) -> list[int]:
    """To whom each piece of work goes: the dearest first, each to who has least so far."""
    costs = [*costs]
    owners, loads = [0] * len(costs), [0.0] * hands
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


class SharedRows(Rows):
    """Each process works on its part of the rows, and tells the others what it has made of them.

    What is summed over rows is made of the same numbers by all.
    """

    shared = True

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        super().__init__()
        self._ranks, self._device = ranks, device

    def map(
        self, total: int, work: Callable[[slice], tuple[Tensor, ...]], most: int | None = None
    ) -> tuple[Tensor, ...]:
        """As `Rows.map`; parts end at multiples of `least`, which the bits do not depend on."""
        rank, size = self._ranks.rank, self._ranks.size
        units = -(-total // self.least)
        ends = [min(total, units * n // size * self.least) for n in range(size + 1)]
        start, count = ends[rank], ends[rank + 1] - ends[rank]
        own: tuple[Tensor, ...] = ()
        if count:
            shifted = lambda part: work(slice(start + part.start, start + part.stop))
            own = super().map(count, shifted, most)
        # transposed tensors stay so: what is computed of them depends on it
        kinds = self._ranks.gather([(t.shape, t.dtype, t.is_contiguous()) for t in own])
        parts = []
        for source, kind in enumerate(kinds):
            if not kind:
                continue
            tensors = []
            for number, (shape, dtype, in_rows) in enumerate(kind):
                if source == rank:
                    plain = own[number] if in_rows else own[number].mT.contiguous()
                else:
                    form = shape if in_rows else (*shape[:-2], shape[-1], shape[-2])
                    plain = torch.empty(form, dtype=dtype, device=self._device)
                self._ranks.broadcast([plain], source)
                tensors.append(plain if in_rows else plain.mT)
            parts.append(tuple(tensors))
        return parts[0] if len(parts) == 1 else tuple(map(joined, zip(*parts, strict=True)))
