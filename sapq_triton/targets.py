"""Which layers of a model are to be quantized, and which of them get the same inputs."""

import fnmatch
import itertools
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import layers
from .baseline import Baseline
from .experts import is_fused
from .finite import check_parts
from .hessian import HessianSum, Prior
from .layers import Layer
from .result import SolveResult
from .spec import QuantSpec

Station = tuple[Literal["solve", "norm", "wave"], str]
NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, parametrize.ParametrizationList)
SHARE = 1e-3  # of a model's parameters: a smaller one is not worth a word


@dataclass(frozen=True)
class Solution:
    """Of one layer, which may have been solved together with others.

    others: names of a leader's companions, or of a companion's leader alone: many may share one.
    weight: what was quantized, [B, R, C]. mean: the mean input row, [B, C]. rows: calibration rows.
    drift_correction: the fraction that was taken. seconds: its part of the solve.
    baseline: what rounding `weight` to nearest would have lost.
    """

    result: SolveResult
    weight: Tensor
    mean: Tensor
    rows: int
    drift_correction: float
    seconds: float
    baseline: Baseline
    others: tuple[str, ...]


def split_rows(result: SolveResult, rows: list[int]) -> list[SolveResult]:
    """Results of the layers that were solved as one matrix, [B, sum of rows, C].

    In memory of their own: whoever keeps the codes of one layer keeps no other's.
    """
    report = result.report
    solved: tuple[Any, ...] = (
        result.codes, result.scale, result.zero_point, report.row_error, report.row_energy
    )  # fmt: skip
    return [
        replace(
            result,
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            report=replace(report, row_error=error, row_energy=energy),
        )
        for codes, scale, zero_point, error, energy in zip(
            *([part.clone() for part in tensor.split(rows, 1)] for tensor in solved), strict=True
        )
    ]


class Call(NamedTuple):
    """Of one layer in one batch. original: its input in the full-precision model, if known.
    batch: its number.
    """

    inputs: Tensor
    mask: Tensor | None
    original: Tensor | None
    batch: int


@dataclass(eq=False)
class Target:
    """A layer to be quantized, and what the run has found out about it."""

    name: str
    module: Layer
    kind: str
    spec: QuantSpec
    twins: list[str]  # names of layers that hold the same weight, this one first
    notes: list[str] = field(default_factory=list)
    routed: bool = False  # of an expert: which rows come to it may differ between models
    repeated: bool = False  # runs more than once in a forward pass
    leader: "Target | None" = None  # the first layer that gets the same inputs as this one
    led_by: "Target | None" = None  # the same, also when quantization has parted them
    calls: list[Call] = field(default_factory=list)
    # by whether their batches are held out, and by what is summed apart
    sums: dict[bool, dict[int, HessianSum]] = field(default_factory=lambda: {False: {}, True: {}})
    solution: Solution | None = None
    prior: Prior | None = None  # of an expert that few rows come to
    solved: bool = False
    seconds_hessian: float = 0.0

    def empty_sum(self, dtype: torch.dtype, drift: bool) -> HessianSum:
        groups, _, columns = layers.weight_matrix(self.module).shape
        return HessianSum(groups, columns, self.module.weight.device, dtype, drift)


def find_targets(
    model: nn.Module, spec: QuantSpec, skip: list[str], overrides: dict[str, QuantSpec]
) -> tuple[dict[str, Target], dict[str, str]]:
    """Targets by name, and the reason for each layer, and large parameter, that is left out."""
    found = layers.find_layers(model)
    for pattern in (*skip, *overrides):
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"pattern {pattern!r} matches no layer; layers are {list(found)}")
    holders: dict[Hashable, list[str]] = {}  # names of all modules that hold a parameter
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(_identity(parameter), []).append(name)
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    for name, module in found.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            skipped[name] = "as asked"
        elif reason := layers.obstacle(module):
            skipped[name] = reason
    for name, module in found.items():
        weight = module._parameters.get("weight")
        twins = [name] if weight is None else holders[_identity(weight)]
        if name in skipped or any(twin in targets for twin in twins):
            continue
        others = [twin for twin in twins if twin not in found or twin in skipped]
        if others or len({str(module) for module in map(found.get, twins)}) > 1:
            skipped[name] = f"its weight is shared with {others or twins[1:]}"
            continue
        check_parts(module, name, ("weight", "bias"))
        matching = [s for pattern, s in overrides.items() if fnmatch.fnmatchcase(name, pattern)]
        target = Target(name, module, str(layers.kind(module)), [spec, *matching][-1], twins)
        columns = layers.weight_matrix(module).shape[2]
        if target.spec.group_size > 0 and columns % target.spec.group_size:
            target.notes.append(
                f"group_size {target.spec.group_size} does not divide {columns} columns: "
                "one group per row"
            )
            target.spec = replace(target.spec, group_size=-1)
        channels = columns // layers.window_size(module)
        if target.spec.n_of_m and channels % target.spec.n_of_m[1]:
            target.notes.append(
                f"groups of sparsity {target.spec.sparsity} do not divide {channels} input "
                "channels: not pruned"
            )
            target.spec = replace(target.spec, sparsity=None)
        if len(twins) > 1:
            target.notes.append(f"weight shared with {', '.join(twins[1:])}")
        targets[name] = target
    return targets, skipped | find_unheld(model)


def _identity(parameter: Tensor) -> Hashable:
    """Equal for two that are the same numbers in memory, tied through `.data` if not as objects"""
    if nn.parameter.is_lazy(parameter) or parameter.device.type == "meta" or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr(), tuple(parameter.shape), parameter.stride(), parameter.device


def find_unheld(model: nn.Module) -> dict[str, str]:
    """Matrices that no layer of a known kind holds: name and reason.

    Of at least SHARE of the model's parameters; but for embeddings, which are read row by row, and
    weights of layers that are parametrized or packed.
    """
    least = SHARE * sum(p.numel() for p in model.parameters() if p.is_floating_point())
    unheld = {}
    for name, module in model.named_modules():
        if layers.kind(module) or isinstance(module, NO_MATRICES):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            long = sum(side > 1 for side in parameter.shape)
            if parameter.is_floating_point() and long > 1 and parameter.numel() >= least:
                shape = "x".join(map(str, parameter.shape))
                reason = f"a {shape} parameter of {type(module).__name__}, no known kind of layer"
                if is_fused(module):
                    reason += "; sapq_triton.experts.unfuse makes layers of it"
                unheld[f"{name}.{own}".lstrip(".")] = reason
    return unheld


class VersionedRef:
    """A tensor as it was at one moment, by a weak reference: its memory is not kept.

    The version of a tensor counts its changes in place, also those of its views, but not those
    through `.data` or NumPy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = None if tensor.is_inference() else tensor._version

    def matches(self, tensor: Tensor) -> bool:
        """Whether this is the same tensor, alive and unchanged ever since."""
        counted = self._version is not None  # an inference tensor does not count its changes
        return counted and self._tensor() is tensor and self._version == tensor._version


class InputTracker:
    """Numbers the inputs of layers: equal numbers for the same tensor, unchanged, in one batch.

    numbers: of each layer by name, in the order of execution, those of all its inputs of the batch.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}
        self._fresh = itertools.count()
        self._batch: dict[int, tuple[VersionedRef, int]] = {}

    def add(self, name: str, inputs: Tensor) -> None:
        known = self._batch.get(id(inputs))
        # an id may be that of a tensor that is gone; a subclass may be more than its elements
        if known is None or not known[0].matches(inputs) or type(inputs) is not Tensor:
            known = self._batch[id(inputs)] = VersionedRef(inputs), next(self._fresh)
        self.numbers.setdefault(name, []).append(known[1])


def find_leaders(targets: Mapping[str, Target], batches: Sequence[Mapping[str, list[int]]]) -> None:
    """Set the leader of each layer that gets all its inputs, and no others, after another layer.

    batches: the numbers of an InputTracker of each. Both layers make the same rows of their inputs,
    have the same spec and device, and run once in a forward pass.
    """
    numbers: dict[str, list[tuple[int, int]]] = {}
    for batch, seen_there in enumerate(batches):
        for name, each in seen_there.items():
            numbers.setdefault(name, []).extend((batch, number) for number in each)
    first: dict[Hashable, Target] = {}
    for name, seen in numbers.items():
        target = targets.get(name)
        if target is None or target.repeated or len(target.twins) > 1:
            continue
        geometry = layers.row_geometry(target.module)
        key = (*seen,), geometry, target.spec, target.module.weight.device
        leader = first.setdefault(key, target)
        target.leader = target.led_by = None if leader is target else leader
