"""Models that are chains of blocks, one block at a time.

What one block of a language model puts out is what the next one gets; its other arguments, such as
positions and masks, depend on the batch alone. So each can be quantized by itself, as a copy, on
the activations that the one before it has left: `quantize` of the whole model comes to the same.
"""

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Forward, to_device


@dataclass(frozen=True)
class Arguments:
    """Of one call of a block, and at which place or under which name its activations go in."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    def call(self, block: nn.Module, activations: Tensor) -> Tensor:
        """What goes into the next block."""
        args = list(to_device(self.args, activations.device))
        kwargs = dict(to_device(self.kwargs, activations.device))
        if isinstance(self.place, int):
            args[self.place] = activations
        else:
            kwargs[self.place] = activations
        output = block(*args, **kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


@dataclass(frozen=True)
class Chain:
    """names: of the blocks, in the order of execution. arguments: by block, then by the number of
    the batch. first: the activations that go into the first block, by batch. in_tuples: whether
    blocks return theirs so.
    """

    names: tuple[str, ...]
    arguments: Sequence[Mapping[int, Arguments]]
    first: Mapping[int, Tensor]
    in_tuples: bool

    def holds(self, layer: str) -> bool:
        """Whether a layer of this name is in one of the blocks."""
        return layer.startswith(tuple(f"{name}." for name in self.names))


class _Done(BaseException):
    """Ends a forward pass of which enough was seen; not an Exception, so models let it pass."""


@torch.no_grad()
def find_chain(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    dtype: torch.dtype,
    numbers: Iterable[int] | None = None,
) -> Chain | str:
    """The blocks of a model, or the reason why it is no chain of them.

    The blocks are those of the nn.ModuleList with the most parameters. Each must be called once, in
    order, get what the one before it returned, and share no parameter with the rest of the model.
    But for a copy of the first one, on the first batch, none runs, and no weight of theirs is read.

    dtype: that of the blocks when they are to run; what is outside of them is converted, in place.
    numbers: of the batches that the chain is to know; all by default.
    """
    lists = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    if not lists:
        return "it has no list of blocks"
    where = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    names = tuple(f"{where}.{number}".strip(".") for number in range(len(lists[where])))
    blocks = [*lists[where]]
    if _shares_parameters(model, blocks):
        return f"a block of {where!r} shares a parameter with another part"
    inside = {id(p) for block in blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    in_tuples = _returns_tuple(model, blocks[0], batches[0], forward, dtype)
    if in_tuples is None:
        return f"{names[0]} does not run, or returns something else than activations"
    first: dict[int, Tensor] = {}
    calls: list[dict[int, Arguments]] = [{} for _ in blocks]
    for number in range(len(batches)) if numbers is None else numbers:
        start, found = _record(model, blocks, batches[number], forward, in_tuples)
        if start is None or len(found) != len(blocks):
            return f"the blocks of {where!r} do not run one after the other"
        first[number] = start
        for of_block, each in zip(calls, found, strict=True):
            of_block[number] = each
    return Chain(names, calls, first, in_tuples)


def _shares_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    holders: dict[int, set[int]] = {}  # of each parameter, the modules
    inside = [{id(module) for module in block.modules()} for block in blocks]
    for module in model.modules():
        part = next((n for n, ids in enumerate(inside) if id(module) in ids), -1)
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(part)
    return any(len(parts) > 1 for parts in holders.values())


def _returns_tuple(
    model: nn.Module, block: nn.Module, batch: Any, forward: Forward, dtype: torch.dtype
) -> bool | None:
    """Whether a block returns its activations in a tuple; None: it does not return them."""
    outputs: list[Any] = []
    twin = copy.deepcopy(block).to(dtype)

    def instead(*args: Any, **kwargs: Any) -> None:
        outputs.append(twin(*args, **kwargs))
        raise _Done

    try:
        block.forward = instead
        forward(model, batch)
    except _Done:
        pass
    finally:
        del block.forward
    for output in outputs:
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return True
        if isinstance(output, Tensor):
            return False
    return None


def _record(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Forward, in_tuples: bool
) -> tuple[Tensor | None, list[Arguments]]:
    """What goes into the first block, and the calls of all, which only pass on what they get.

    Fewer calls than blocks where these are not called in order, or not with what was passed on.
    """
    calls: list[Arguments] = []
    passed: list[Tensor] = []

    def instead(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = [
            place
            for place, value in [*enumerate(args), *kwargs.items()]
            if isinstance(value, Tensor) and (value is passed[-1] if passed else not calls)
        ]
        # the first tensor of the first block is taken for its activations: the next block tells
        if number != len(calls) or not places or (passed and len(places) > 1):
            raise _Done
        place: Any = places[0]
        activations = args[place] if isinstance(place, int) else kwargs[place]
        calls.append(
            Arguments(
                tuple(None if n == place else value for n, value in enumerate(args)),
                {name: value for name, value in kwargs.items() if name != place},
                place,
            )
        )
        passed.append(activations.view_as(activations))  # an object of its own, to know it again
        return (passed[-1],) if in_tuples else passed[-1]

    try:
        for number, block in enumerate(blocks):
            block.forward = lambda *args, n=number, **kwargs: instead(n, args, kwargs)
        forward(model, batch)
    except _Done:
        calls.clear()
    finally:
        for block in blocks:
            del block.forward
    return (passed[0] if passed else None), calls


def isolated(model: nn.Module, name: str) -> nn.Module:
    """A copy of a part of a model, alone, under its full name."""
    part = copy.deepcopy(model.get_submodule(name))
    for key in reversed(name.split(".") if name else []):
        holder = nn.Module()
        holder.add_module(key, part)
        part = holder
    return part


class Gap(nn.Module):
    """Stands where a block was, and returns the activations of `run_behind`.

    It has the plain attributes of the block: models look at those.
    """

    _now = threading.local()

    def __init__(self, block: nn.Module, in_tuples: bool) -> None:
        super().__init__()
        plain = {k: v for k, v in vars(block).items() if isinstance(v, str | int | float)}
        self.__dict__ |= {k: v for k, v in plain.items() if k not in vars(self)}
        self.in_tuples = in_tuples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._now.activations,) if self.in_tuples else self._now.activations


def leave_gaps(model: nn.Module, chain: Chain) -> None:
    """Give up the blocks of a model: what is left of it, in place, has the memory of the rest."""
    for name in chain.names:
        where, _, number = name.rpartition(".")
        blocks: Any = model.get_submodule(where)
        blocks[int(number)] = Gap(blocks[int(number)], chain.in_tuples)


def run_behind(model: nn.Module, batch: Any, activations: Tensor, forward: Forward) -> object:
    """What a model with gaps does with what the last of its blocks put out."""
    Gap._now.activations = activations
    return forward(model, batch)
