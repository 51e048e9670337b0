"""Run all calibration batches through a model in lockstep, and look at what passes.

To calibrate a layer on the outputs of the already quantized ones before it, the layer must be
solved while every batch stands in front of it. `Lockstep` gives each batch its own forward pass and
stops them all at the same module call: one forward pass per batch, whatever the depth of the model.
The price is memory: the live activations of all batches at once. `Replay` comes to the same with
those of one batch, and runs each batch anew for every layer.
"""

import contextvars
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial, reduce
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import layers
from .finite import check_finite
from .hessian import HessianSum

Action = Callable[[], None]
# the earliest place among those where passes wait here, and whether something is to be done there
Place = tuple[int, bool]
# what passes of all processes come to; None: none waits any more
Agree = Callable[[Place | None], Place | None]


class _Abandoned(BaseException):
    """Unwinds a forward pass that will not be finished; not an Exception, so models let it pass."""


class Lockstep:
    """Forward passes that meet at stations.

    One pass runs at a time, in the order of the batches, so that everything is deterministic.
    actions: of each station, in the order of execution: when all passes wait, what is to be done at
    the earliest station is done, and those that wait there go on first. agree: where other
    processes have passes of their own: of the places in that order where each of them waits, the
    first one.
    """

    def __init__(
        self,
        passes: Sequence[Action],
        actions: Mapping[Hashable, Action],
        agree: Agree = lambda place: place,
    ) -> None:
        self._workers = [_Worker(run) for run in passes]
        self._actions, self._stations, self._agree = actions, [*actions], agree
        self._due: set[Hashable] = set()
        self._rank = {station: rank for rank, station in enumerate(actions)}

    def is_new(self, station: Hashable) -> bool:
        """Whether the pass that asks has not been at this station before."""
        return True

    def meet(self, station: Hashable, acts: bool = True) -> None:
        """Wait here, inside a forward pass, until all are waiting.

        acts: whether what is to be done here has to be; it is where one of the passes says so.
        """
        if acts:
            self._due.add(station)
        _Worker.current().wait_at(station)

    def run(self) -> None:
        """Until all passes are finished. An exception in one of them ends them all."""
        try:
            for worker in self._workers:
                worker.resume()
            while place := self._agree(self._earliest()):
                number, due = place
                station = self._stations[number]
                if due:
                    self._due.discard(station)
                    self._actions[station]()
                for worker in self._workers:
                    if worker.station == station:
                        worker.resume()
        finally:
            for worker in self._workers:
                worker.abandon()

    def _earliest(self) -> Place | None:
        waiting = [self._rank[w.station] for w in self._workers if w.station is not None]
        return (min(waiting), self._stations[min(waiting)] in self._due) if waiting else None


class Replay:
    """`Lockstep` with the activations of one pass at a time.

    Every pass is given up at the first station that is not done, and starts again from the
    beginning when it is: as many passes as stations, up to each of them.
    """

    def __init__(
        self,
        passes: Sequence[Action],
        actions: Mapping[Hashable, Action],
        agree: Agree = lambda place: place,
    ) -> None:
        self._passes, self._actions = passes, actions
        self._stations, self._agree = [*actions], agree
        self._rank = {station: rank for rank, station in enumerate(actions)}
        self._done: set[Hashable] = set()
        self._visits: set[tuple[int, Hashable]] = set()
        self._number = 0  # of the pass that runs
        self._due: set[Hashable] = set()
        self._reached: Hashable | None = None
        self._forgotten: dict[Hashable, Hashable] = {}

    def is_new(self, station: Hashable) -> bool:
        """Whether the pass that asks has not been at this station before."""
        known = (self._number, station) in self._visits or station in self._forgotten
        self._visits.add((self._number, station))
        return not known

    def forget(self, station: Hashable, waits_at: Hashable | None = None) -> None:
        """Every pass comes to this station anew, from the first one on; waits_at: where it then
        waits, by default there.
        """
        self._forgotten[station] = waits_at or station

    def meet(self, station: Hashable, acts: bool = True) -> None:
        """Go on where the station is done; else the pass ends here, for now. acts: as above."""
        if station not in self._done:
            if acts:
                self._due.add(station)
            self._reached = station
            raise _Abandoned

    def run(self) -> None:
        """Until all passes have come to their end."""
        while True:
            reached: set[int] = set()
            self._visits = {visit for visit in self._visits if visit[1] not in self._forgotten}
            self._due, self._forgotten = set(), {}
            for number, run in enumerate(self._passes):
                self._number, self._reached = number, None
                try:
                    run()
                except _Abandoned:
                    reached.add(self._rank[self._reached])
            first = min(reached, default=None)
            own = None if first is None else (first, self._stations[first] in self._due)
            place = self._agree(own)
            if place is None:
                return
            number, due = place
            station = self._stations[number]
            if station in self._forgotten.values():
                continue
            if due:
                self._actions[station]()
            self._done.add(station)


class _Worker:
    """A thread that only runs while its owner waits for it."""

    _local = threading.local()

    def __init__(self, run: Action) -> None:
        self.station: Hashable | None = None
        self._run = run
        # unlike semaphores these cannot be interrupted half-way
        self._go: SimpleQueue[None] = SimpleQueue()
        self._back: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self._abandoned = False
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._default = torch.get_default_device()
        target = partial(contextvars.copy_context().run, self._main)
        self._thread = threading.Thread(target=target, daemon=True)

    @classmethod
    def current(cls) -> "_Worker":
        return cls._local.worker

    def _main(self) -> None:
        _Worker._local.worker = self
        self._go.get()
        if self._abandoned:  # its owner was interrupted while it started
            return
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            if self._default.type != "cpu":
                torch.set_default_device(self._default)
            with torch.no_grad():  # gradient mode belongs to a thread, as the default device does
                self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        self.station = None
        self._back.put(None)

    def wait_at(self, station: Hashable) -> None:
        if not self._abandoned:  # else a model cleans up on its way out, and nobody waits
            self.station = station
            self._back.put(None)
            self._go.get()
        if self._abandoned:
            raise _Abandoned

    def resume(self) -> None:
        self.station = None
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(None)
        self._back.get()
        if self._error is not None:
            try:
                raise self._error
            finally:  # its traceback holds this worker: the activations would wait for a collector
                self._error = None

    def abandon(self) -> None:
        self._abandoned = True
        self._go.put(None)
        if self._thread.ident is not None:
            self._thread.join()


class BatchMoments(NamedTuple):
    """Of a number of values per channel: mean, and sum of the squared distances from it.

    float64, on the CPU.
    """

    number: int
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        return self.squares / self.number

    @classmethod
    def of(cls, values: Tensor) -> "BatchMoments":
        """values: [N, channels, *space], none empty"""
        count = values.numel() // values.shape[1]
        rest = [0, *range(2, values.ndim)]
        var, mean = torch.var_mean(values.float(), rest, correction=0)
        return cls(count, mean.double().cpu(), var.double().cpu() * count)

    def with_others(self, other: "BatchMoments") -> "BatchMoments":
        total = self.number + other.number
        delta = other.mean - self.mean
        return BatchMoments(
            total,
            self.mean + delta * (other.number / total),
            self.squares + other.squares + delta.square() * (self.number * other.number / total),
        )


class ChannelMoments:
    """Mean and variance per channel over many tensors, in float64.

    They are put together in the order of their batches, whenever, and in whatever process, each of
    them was added.
    """

    def __init__(self) -> None:
        self.parts: dict[int, list[BatchMoments]] = {}  # by batch

    def add(self, values: Tensor, batch: int = 0) -> None:
        """values: [N, channels, *space]"""
        if values.numel() > 0:
            self.parts.setdefault(batch, []).append(BatchMoments.of(values))

    @property
    def total(self) -> BatchMoments | None:
        """None where no values were added."""
        parts = [part for batch in sorted(self.parts) for part in self.parts[batch]]
        return reduce(BatchMoments.with_others, parts) if parts else None


@torch.no_grad()
def collect_hessians(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """H = 2/n X^T X of every layer on the inputs of the model as it is: name -> [groups, C, C].

    forward: called as forward(model, batch); model(batch) by default. Layers that no batch reaches
    are left out.
    """
    sums: dict[str, HessianSum] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = layers.called_with(name, args, kwargs)
        groups, _, columns = layers.weight_matrix(module).shape
        if name not in sums:
            sums[name] = HessianSum(groups, columns, inputs.device, dtype)
        rows, window = layers.input_rows(module, inputs)
        check_finite(rows, f"the input of {name!r}")
        sums[name].add(rows, window)

    found = layers.find_layers(model)
    hooks = [
        module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name, module in found.items()
    ]
    try:
        for batch in batches:
            model(batch) if forward is None else forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        total.check(name)
    return {name: total.take()[0] for name, total in sums.items()}
