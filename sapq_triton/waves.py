"""Layers of experts that do not wait for one another are solved together, in waves.

The experts of a block get their inputs from what comes before the block, and none from another: the
first layers of all of them can be solved at once, then the second ones, and so on. For each wave
the block runs once more, to sum the rows of its layers, before it runs to the end.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import layers
from .targets import Station, Target

WAVE = 2**28  # numbers that the sums of a wave hold
LEAST_WAVE = 4  # Hessians that are worth a wave, in the mean


def find_experts(targets: Mapping[str, Target]) -> list[dict[str, list[Target]]]:
    """Of each block with several experts: the layers of each, by its name.

    Names as in transformers: "experts.3", or "experts.expert_3", and behind it that of the layer.
    """
    blocks: dict[str, dict[str, list[Target]]] = {}
    for name, target in targets.items():
        if parts := re.fullmatch(r"((?:.*\.)?experts?\.(?:expert_)?)(\d+)(?:\..+)?", name):
            experts = blocks.setdefault(parts[1], {})
            experts.setdefault(parts[1] + parts[2], []).append(target)
    return [experts for experts in blocks.values() if len(experts) > 1]


@dataclass(eq=False)
class Wave:
    """Layers of the experts of a block that do not wait for one another: leaders and companions.

    done: solved, but for those that no row has reached.
    """

    targets: list[Target]
    done: bool = False

    @property
    def station(self) -> Station:
        return "wave", self.targets[0].name


def find_waves(
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, Target],
    order: Sequence[str],
    copies: int,
) -> dict[str, list[Wave]]:
    """By the name of each module that runs several experts: what is solved together, in order.

    The first layers of all experts, then the second ones, and so on; in several waves where their
    sums would hold more than WAVE numbers, `copies` of each Hessian. order: names of layers in that
    of execution. Left out are blocks with layers that run more than once, share a weight, or share
    their input with a layer elsewhere, with BatchNorms, and with few or large layers.
    """
    place = {name: number for number, name in enumerate(order)}
    waves = {}
    for experts in find_experts(targets):
        inside = [t for each in experts.values() for t in each if t.name in place]
        names = {target.name for target in inside}
        heads = {target.name: target.leader or target for target in inside}
        run = next(iter(experts)).rpartition(".")[0]
        while run and type(modules[run]).forward is nn.Module.forward:  # a container of layers
            run = run.rpartition(".")[0]
        if (
            any(t.repeated or len(t.twins) > 1 or heads[t.name].name not in names for t in inside)
            or any(isinstance(module, _BatchNorm) for module in modules[run].modules())
            or run in waves
        ):
            continue
        level: dict[str, int] = {}
        for each in experts.values():
            ordered = sorted((t for t in each if t.name in place), key=lambda t: place[t.name])
            own = dict.fromkeys(heads[target.name].name for target in ordered)
            for number, name in enumerate(own):
                level.setdefault(name, number)
        parts: list[list[str]] = []
        for number in range(max(level.values(), default=-1) + 1):
            numbers = WAVE
            for name in (name for name in level if level[name] == number):
                groups, _, columns = layers.matrix_shape(targets[name].module)
                if numbers + copies * groups * columns**2 > WAVE:
                    parts.append([])
                    numbers = 0
                parts[-1].append(name)
                numbers += copies * groups * columns**2
        if sum(map(len, parts)) < LEAST_WAVE * len(parts):
            continue
        waves[run] = [
            Wave([t for name in part for t in inside if heads[t.name].name == name])
            for part in parts
        ]
    return waves


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Waves:
    """The waves of a model, and where the pass of this thread stands among them.

    blocks: those of `find_waves`.
    """

    def __init__(self, blocks: dict[str, list[Wave]]) -> None:
        self.blocks = blocks
        self._block_of = {t.name: n for n, ws in blocks.items() for w in ws for t in w.targets}
        self._pass = threading.local()

    def __iter__(self) -> Iterator[Wave]:
        return (wave for waves in self.blocks.values() for wave in waves)

    def order(self, sequence: Iterable[Station]) -> Iterator[Station]:
        """That of execution, with the waves of a block before its first layer."""
        begun = set()
        for station in sequence:
            block = self._block_of.get(station[1])
            if block is not None and block not in begun:
                begun.add(block)
                yield from (wave.station for wave in self.blocks[block])
            yield station

    def begin(self) -> None:
        """A forward pass of this thread."""
        self._pass.wave, self._pass.among_experts = None, False

    def run(
        self,
        waves: Sequence[Wave],
        meet: Callable[[Wave], None],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> None:
        """A hook before a block runs: it runs for each wave that is not done, which then meets."""
        if self._pass.wave is not None:
            return
        for wave in waves:
            if wave.done:
                continue
            self._pass.wave, self._pass.among_experts = {t.name for t in wave.targets}, False
            # what runs may change its inputs in place
            again = {name: _cloned(value) for name, value in kwargs.items()}
            module.forward(*map(_cloned, args), **again)
            self._pass.wave = None
            meet(wave)

    def collects(self, name: str) -> bool:
        """Whether the pass is that of a wave with this layer, which does not wait by itself."""
        return self._pass.wave is not None and name in self._pass.wave

    def passes_by(self, name: str) -> bool:
        """Whether the pass is that of a wave without this layer: an expert's, or behind them."""
        if self._pass.wave is None:
            return False
        self._pass.among_experts |= name in self._block_of
        return bool(self._pass.among_experts) and name not in self._pass.wave
