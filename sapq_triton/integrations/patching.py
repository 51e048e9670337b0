"""Which functions of other packages stand in for ours, and for how long."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, get_args

import torch

from ..ops import Backend, Precision
from ..solver import solve
from ..spec import Order, QuantSpec, Starts

NAMES = (
    "auto_round",
    "gptqmodel",
    "llmcompressor",
    "modelopt",
    "neural_compressor",
    "optimum",
    "torchao",
)


@dataclass(frozen=True)
class Options:
    """As `solve`, on the pipeline's grid. damp: None is the pipeline's own."""

    order: Order = "sensitivity"
    block: int = 128
    starts: Starts = 1
    sweeps: int = 2
    rounds: int = 0
    damp: float | None = None
    precision: Precision = "tf32x3"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {get_args(Backend)}, got {self.backend!r}")
        # a problem of one weight: the solver says what it thinks of the others
        one, damp = torch.ones(1, 1), 0.01 if self.damp is None else self.damp
        solve(one, one, QuantSpec(), **{**self.for_solver(damp), "backend": "reference"})

    def for_solver(self, damp: float) -> dict[str, Any]:
        """Keywords of `solve`; damp: the pipeline's, for where none was chosen here."""
        return {
            "order": self.order,
            "block": self.block,
            "starts": self.starts,
            "sweeps": self.sweeps,
            "rounds": self.rounds,
            "damp": damp if self.damp is None else self.damp,
            "precision": self.precision,
            "backend": self.backend,
        }


@dataclass(frozen=True)
class Swap:
    """owner: a class or module whose attribute `name` becomes `ours`."""

    owner: Any
    name: str
    ours: object

    @property
    def current(self) -> Any:
        return vars(self.owner)[self.name]


class Patch:
    """What `patch` did; leaving it as a context manager takes it back."""

    def __init__(self, name: str, options: Options, swaps: Sequence[Swap]) -> None:
        self.name, self.options = name, options
        self._swaps = tuple(swaps)
        self._theirs = [swap.current for swap in swaps]

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, {self.options})"

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _active.get(self.name) is self:  # else it was taken back inside
            unpatch(self.name)

    def _apply(self) -> None:
        for swap in self._swaps:
            setattr(swap.owner, swap.name, swap.ours)

    def _undo(self) -> None:
        for swap, theirs in zip(self._swaps, self._theirs, strict=True):
            if swap.current is not swap.ours:
                raise ValueError(
                    f"{swap.owner.__name__}.{swap.name} was replaced by someone else after "
                    f"patch({self.name!r}); take that back first"
                )
            setattr(swap.owner, swap.name, theirs)


_active: dict[str, Patch] = {}


def patch(name: str, *, any_version: bool = False, **options: Any) -> Patch:
    """Let a package quantize with our solver until `unpatch(name)`, or the end of a with block.

    name: one of NAMES, the package's import name. any_version: also where its version is none of
    those that were tried; its functions must still have the signatures that we know.
    order, block, starts, sweeps, rounds, precision, backend: of `solve`, for speed by default:
    starts=8 and rounds=3, as "best" of `quantize` has, take 5 % off the layer errors, and 4.5 times
    as long (MiniLM's layers, groups of 64, 4 and 3 bits). damp: in place of the pipeline's own.
    "llmcompressor" also takes `level`, "gptqmodel" and "optimum" `scale_search`; see their modules.

    ValueError where the package is missing, its version or a signature is not one that we know, the
    name is patched already ("optimum" quantizes with GPTQModel's class: one of the two), or an
    option is not legal; nothing is changed then. TypeError for unknown options.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    if name in _active:
        raise ValueError(f"{name!r} is patched already, as {_active[name]}; unpatch it first")
    integration = import_module(f".{name}", __package__)
    kind: type[Options] = integration.Options
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in options if key not in known]:
        raise TypeError(f"patch({name!r}) got unknown options {unknown}; legal are {known}")
    chosen = kind(**options)
    _check_version(integration.DISTRIBUTION, integration.KNOWN_VERSIONS, any_version)
    try:
        swaps = integration.swaps(chosen)
    except ImportError as missing:
        raise ValueError(f"{name!r} cannot be imported: {missing}") from missing
    for swap in swaps:
        for other in _active.values():
            if any(swap.current is theirs.ours for theirs in other._swaps):
                raise ValueError(
                    f"patch({name!r}) and patch({other.name!r}) replace the same function; "
                    f"unpatch({other.name!r}) first"
                )
    _active[name] = Patch(name, chosen, swaps)
    _active[name]._apply()
    return _active[name]


def unpatch(name: str) -> None:
    """Give a package its own solver back. ValueError where `name` is not patched."""
    if name not in _active:
        raise ValueError(f"{name!r} is not patched; patched are {sorted(_active)}")
    _active[name]._undo()
    del _active[name]


def _check_version(distribution: str, known: Sequence[str], any_version: bool) -> None:
    """ValueError unless the installed release is of a known series, such as "0.14"."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise ValueError(f"{distribution} is not installed; known to work: {known}") from None
    if not any_version and ".".join(found.split(".")[:2]) not in known:
        raise ValueError(
            f"{distribution} {found} was not tried with this version of ours; known to work: "
            f"{known}. any_version=True tries it, if its functions look the same"
        )


def check_signature(function: Any, parameters: Sequence[str], known: Sequence[str]) -> None:
    """ValueError where a function that is to be replaced does not take what we know."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(parameters):
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} takes {found}, not "
            f"{tuple(parameters)}: this version is not known to work; those are {tuple(known)}"
        )
