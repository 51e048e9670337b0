"""What batches do in the untouched model, which the first forward pass of `quantize` looks at."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import layers
from .calibrate import BatchMoments
from .finite import check_finite
from .layers import Layer
from .targets import InputTracker, Station, VersionedRef


class Observed(NamedTuple):
    """What was seen of a batch in the untouched model.

    visits: how often it came to each station, in the order of the first time. inputs: the numbers
    of an InputTracker. follower: name of a layer -> of the BatchNorm that its output goes straight
    into. moments: of what went into each BatchNorm.
    """

    visits: dict[Station, int]
    inputs: dict[str, list[int]]
    follower: dict[str, str]
    moments: dict[Station, list[BatchMoments]]


class Observer:
    """Hooks on layers and BatchNorms, by name, that look at what passes and keep none of it.

    mask: the tokens that count in the batch that runs. hooks: who runs the batches removes them.
    found: of each batch. outputs: how many numbers each layer put out, in all of them.
    ValueError that names the layer in front of, or behind, which a value is not finite.
    """

    def __init__(
        self,
        modules: Mapping[str, Layer],
        norms: Mapping[str, Layer],
        mask: Callable[[], Tensor | None],
    ) -> None:
        self.found: dict[int, Observed] = {}
        self.outputs: dict[str, int] = {}
        self._mask = mask
        # of the batch that runs; the last layer there and its output: an activation in place leaves
        # the same tensor, changed
        self._seen, self._inputs = Observed({}, {}, {}, {}), InputTracker()
        self._latest: tuple[str, VersionedRef | None] = ("", None)
        self.hooks: list[RemovableHandle] = []
        for name, module in modules.items():
            self.hooks += [
                module.register_forward_pre_hook(partial(self._saw_input, name), with_kwargs=True),
                module.register_forward_hook(partial(self._saw_layer, name)),
            ]
        for name, module in norms.items():
            self.hooks.append(
                module.register_forward_pre_hook(partial(self._saw_norm, name), with_kwargs=True)
            )

    def begin(self, batch: int) -> None:
        """A forward pass"""
        self._inputs, self._latest = InputTracker(), ("", None)
        self._seen = self.found[batch] = Observed({}, self._inputs.numbers, {}, {})

    def _visit(self, station: Station) -> None:
        self._seen.visits[station] = self._seen.visits.get(station, 0) + 1

    def _saw_input(self, name: str, module: Layer, args: Any, kwargs: Any) -> None:
        value = layers.called_with(name, args, kwargs)
        self._check_values(name, module, value, "input")
        self._inputs.add(name, value)

    def _saw_layer(self, name: str, module: Layer, args: Any, output: object) -> None:
        self._visit(("solve", name))
        if isinstance(output, Tensor):  # a subclass may return anything
            self._check_values(name, module, output, "output")
            self._latest = (name, VersionedRef(output))
            self.outputs[name] = self.outputs.get(name, 0) + output.numel()

    def _check_values(self, name: str, module: Layer, values: Tensor, which: str) -> None:
        """Of the rows that count: padding tokens may hold anything."""
        rows = layers.counted(module, values, self._mask())
        check_finite(rows, f"the {which} of {name!r}", f" during calibration, in {values.dtype}")

    def _saw_norm(self, name: str, module: Layer, args: Any, kwargs: Any) -> None:
        station: Station = ("norm", name)
        self._visit(station)
        inputs = layers.called_with(name, args, kwargs)
        layer, output = self._latest
        if output is not None and output.matches(inputs):
            self._seen.follower[layer] = name
        if inputs.numel() > 0:
            self._seen.moments.setdefault(station, []).append(BatchMoments.of(inputs))


def merge_visits(
    batches: Iterable[Mapping[Station, int]],
) -> tuple[list[Station], dict[Station, int]]:
    """The order of execution, and the most visits to each station in one forward pass.

    Stations that no batch before this one visited go behind the one visited just before.
    """
    sequence: list[Station] = []
    repeats: dict[Station, int] = {}
    for visits in batches:
        place = 0
        for station, count in visits.items():
            if station in repeats:
                place = sequence.index(station)
            else:
                sequence.insert(place, station)
            place += 1
            repeats[station] = max(count, repeats.get(station, 0))
    return sequence, repeats
