"""Layers of experts that do not wait for one another are solved together, in waves.

The experts of a block get their inputs from what comes before the block, and none from another:
then the first layers of all of them can be solved at once, then the second ones, and so on. For
each wave the block runs once more, to sum the rows of its layers, before it runs to the end.
Whether a block is like that, and may run again, is tried first (`Probe`).
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from . import layers
from .layers import Layer
from .targets import Station, Target

_EXPERT = re.compile(r"((?:.*\.)?experts?\.(?:expert_)?)(\d+)(?:\..+)?")
WAVE = 2**28  # numbers that the sums of a wave hold
LEAST_WAVE = 4  # Hessians that are worth a wave, in the mean


def find_experts(targets: Mapping[str, Target]) -> list[dict[str, list[Target]]]:
    """Of each block with several experts: the layers of each, by its name.

    Names as in transformers: "experts.3", or "experts.expert_3", and behind it that of the layer.
    """
    blocks: dict[str, dict[str, list[Target]]] = {}
    for name, target in targets.items():
        if parts := _EXPERT.fullmatch(name):
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
    their input with a layer elsewhere, with BatchNorms, or other experts, inside, and with few or
    large layers.
    """
    place = {name: number for number, name in enumerate(order)}
    led = [(t.name, t.leader.name) for t in targets.values() if t.leader is not None]
    waves = {}
    blocks = find_experts(targets)
    of_experts = {t.name for block in blocks for each in block.values() for t in each}
    for experts in blocks:
        inside = [t for each in experts.values() for t in each if t.name in place]
        names = {target.name for target in inside}
        own = {target.name for each in experts.values() for target in each}
        heads = {target.name: target.leader or target for target in inside}
        run = next(iter(experts)).rpartition(".")[0]
        while run and type(modules[run]).forward is nn.Module.forward:  # a container of layers
            run = run.rpartition(".")[0]
        within = f"{run}." if run else ""
        if (
            any(t.repeated or len(t.twins) > 1 for t in inside)
            or any((name in names) != (leader in names) for name, leader in led)
            or any(isinstance(module, _BatchNorm) for module in modules[run].modules())
            or any(name.startswith(within) for name in of_experts - own)
        ):
            continue
        level: dict[str, int] = {}
        for each in experts.values():
            ordered = sorted((t for t in each if t.name in place), key=lambda t: place[t.name])
            turns = dict.fromkeys(heads[target.name].name for target in ordered)
            for number, name in enumerate(turns):
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


class _Unknown(Exception):
    """An argument that may remember that it was used."""


def _cloned(value: Any, clones: list[Tensor]) -> Any:
    """What a module is called with, but its tensors as clones, which are listed."""
    if isinstance(value, Tensor):
        clones.append(value.clone())
        return clones[-1]
    if type(value) in (tuple, list):
        return type(value)(_cloned(each, clones) for each in value)
    if type(value) is dict:
        return {key: _cloned(each, clones) for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise _Unknown


class Probe:
    """Which blocks may not run in waves, by a forward pass of each batch while its hooks are there.

    Each block runs again behind itself, with zeros for what its experts put out. Those are unfit
    whose experts then do not get what they got before, which change their arguments, are given
    objects that may keep a state, or run several times in a pass.
    """

    def __init__(self, blocks: Mapping[str, list[Wave]], modules: Mapping[str, nn.Module]) -> None:
        self.unfit: set[str] = set()
        self.hooks: list[RemovableHandle] = []
        self._visits: dict[str, int] = {}
        self._first: dict[str, Tensor] = {}  # input of the first layer of each expert that ran
        self._again = False
        for run, waves in blocks.items():
            module = modules[run]
            self.hooks += [
                module.register_forward_pre_hook(partial(self._before, run)),
                module.register_forward_hook(partial(self._behind, run), with_kwargs=True),
            ]
            for target in (target for wave in waves for target in wave.targets):
                expert = _EXPERT.fullmatch(target.name)
                assert expert is not None
                self.hooks += [
                    target.module.register_forward_pre_hook(
                        partial(self._saw, target.name, expert[1] + expert[2]), with_kwargs=True
                    ),
                    target.module.register_forward_hook(self._emptied),
                ]

    def begin(self) -> None:
        """A forward pass."""
        self._visits.clear()

    def _before(self, run: str, module: nn.Module, args: Any) -> None:
        self._visits[run] = self._visits.get(run, 0) + 1
        self._first = {}

    def _saw(self, name: str, expert: str, module: Layer, args: Any, kwargs: Any) -> None:
        if expert not in self._first:
            self._first[expert] = layers.called_with(name, args, kwargs).clone()

    def _emptied(self, module: nn.Module, args: Any, output: Any) -> Any:
        return torch.zeros_like(output) if self._again else None

    def _behind(self, run: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if run in self.unfit or self._visits[run] > 1:
            self.unfit.add(run)
            return
        clones: list[Tensor] = []
        was, self._first = self._first, {}
        try:
            again = _cloned(args, clones), _cloned(kwargs, clones)
            versions = [clone._version for clone in clones]
            self._again = True
            module.forward(*again[0], **again[1])
        except Exception:  # whatever a block makes of zeros: it is not one that may run again
            self.unfit.add(run)
            return
        finally:
            self._again = False
        same = was.keys() == self._first.keys() and all(
            torch.equal(was[expert], self._first[expert]) for expert in was
        )
        if not same or versions != [clone._version for clone in clones]:
            self.unfit.add(run)


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
            module.forward(*args, **kwargs)  # past the hooks of the block itself
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
