"""Experts that few rows come to run on the rows of all: the inputs that their layers have then."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import layers
from .layers import Layer
from .targets import Target
from .waves import find_experts


class Pool(NamedTuple):
    """sums: a target in whose sums the rows of all `members` experts of the block come."""

    target: Target
    sums: Target
    members: int


class Pooling:
    """Of layers that fewer rows come to than they have columns, while its hooks are there.

    outputs: how many numbers each layer put out in all batches, by its name, of each process.
    add_call: adds the inputs of a call to a target's sums.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        modules: Mapping[str, nn.Module],
        outputs: Sequence[Mapping[str, int]],
        add_call: Callable[[Target, str, Layer, Any, Any], None],
    ) -> None:
        self.pools: list[Pool] = []
        self.hooks: list[RemovableHandle] = []
        self._add_call = add_call
        self._running = False  # an expert, on rows of others
        for experts in find_experts(targets):
            starved = {}
            for name, inside in experts.items():
                alone = any(target.repeated or len(target.twins) > 1 for target in inside)
                few = [target for target in inside if _is_starved(target, outputs)]
                if alone or type(modules[name]).forward is nn.Module.forward:
                    for target in few:  # a container of layers cannot be run
                        target.notes.append("fewer rows than columns, and no prior")
                elif few:
                    starved[name] = few
            for name in experts if starved else ():
                run = partial(self._run, [modules[each] for each in starved])
                self.hooks.append(modules[name].register_forward_pre_hook(run, with_kwargs=True))
            for target in (target for few in starved.values() for target in few):
                sums = replace(target, notes=[], sums={False: {}, True: {}}, repeated=True)
                self.pools.append(Pool(target, sums, len(experts)))
                add = partial(self._add, sums)
                self.hooks.append(target.module.register_forward_pre_hook(add, with_kwargs=True))

    def _run(self, starved: list[nn.Module], module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._running:
            self._running = True
            for expert in starved:  # which may change what it is given
                expert(*map(_cloned, args), **{k: _cloned(v) for k, v in kwargs.items()})
            self._running = False

    def _add(self, sums: Target, module: Layer, args: Any, kwargs: Any) -> None:
        if self._running:
            self._add_call(sums, sums.name, module, args, kwargs)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_starved(target: Target, outputs: Sequence[Mapping[str, int]]) -> bool:
    groups, rows, columns = layers.matrix_shape(target.module)
    seen = sum(part.get(target.name, 0) for part in outputs) // (groups * rows)
    return seen < columns and target.leader is None
