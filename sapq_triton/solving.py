"""From what was summed of layers to their solutions: the Hessian, how far to trust it, the solve.

Layers that share a Hessian are one problem with the rows of all. Problems of the same form that do
not wait for one another, those of the experts of a block, are solved in one batch; where several
processes work, each solves some of the batches.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import layers
from .baseline import against_nearest
from .hessian import HessianSum, drifted
from .machine import Stopwatch
from .ranks import Ranks, deal
from .regularize import Moments, Trust, choose
from .result import SolveResult, moved
from .solver import solve
from .targets import Solution, Target, split_rows

# where nothing is held out to choose them on
DAMP, DRIFT_CORRECTION = 0.01, 0.5

OTHER_WAYS = "once quantized, not called as in full precision: drift of some inputs is unknown"

BATCH = 2**25  # numbers of the Hessians that are solved in one batch


@dataclass
class _Problem:
    """A Hessian [B, C, C] and the layers on it: a leader and its companions.

    weights: what they aim at, [B, R, C] each. seconds: that it has taken so far.
    """

    targets: list[Target]
    weights: list[Tensor]
    hessian: Tensor
    mean: Tensor
    rows: int
    trust: Trust
    fraction: float  # of the drift correction that was taken
    seconds: float

    @property
    def form(self) -> Hashable:
        """Problems of one form can be solved in one batch."""
        leader = self.targets[0]
        shapes = tuple(weight.shape for weight in self.weights)
        window = layers.window_size(leader.module)
        return shapes, self.hessian.device, leader.spec, window, self.trust.damp

    @property
    def cost(self) -> float:
        """Of the solve, in proportion"""
        B, C, _ = self.hessian.shape
        return B * C * C * (C + sum(weight.shape[1] for weight in self.weights))


class Solving:
    """How the layers of one run are solved.

    drift_correction: None to choose it, as `damp` of options, those of `solve`.
    """

    def __init__(
        self,
        options: dict[str, Any],
        drift_correction: float | None,
        hessian_dtype: torch.dtype,
        ranks: Ranks,
        stopwatch: Stopwatch,
    ) -> None:
        self.options, self.drift_correction = options, drift_correction
        self.hessian_dtype, self.ranks, self.stopwatch = hessian_dtype, ranks, stopwatch

    @property
    def drifts(self) -> bool:
        """Whether sums have to tell the drift of inputs."""
        return self.drift_correction is None or self.drift_correction > 0

    @property
    def chooses(self) -> bool:
        """Whether something is chosen on rows held out."""
        return self.options["damp"] is None or self.drift_correction is None

    def solve(self, groups: Sequence[list[Target]]) -> None:
        """Set the solution of each layer; groups: a leader and its companions each.

        Every process makes this call with the same groups, in the same order.
        """
        alone = len(groups) == 1
        owners = [-1] if alone else deal(map(_cost_of_trust, groups), self.ranks.size)
        sums = [self.sums(group[0]) for group in groups]
        started = time.perf_counter()
        own = {
            n: self._trust(group, *sums[n])
            for n, group in enumerate(groups)
            if owners[n] in (-1, self.ranks.rank)
        }
        seconds = (time.perf_counter() - started) / len(groups)
        trusts = (
            own if alone else {n: t for part in self.ranks.gather(own) for n, t in part.items()}
        )
        problems = []
        for n, group in enumerate(groups):  # the memory of the sums is that of the Hessian
            problems.append(self._problem(group, *sums.pop(0), trusts[n], seconds))
        for batch, results in self._results(problems):
            for problem, parts in zip(batch, results, strict=True):
                self._conclude(problem, parts)

    def sums(self, leader: Target) -> tuple[HessianSum, HessianSum]:
        """Of the batches that count in a fit, and of those held out, in all processes"""
        empty = partial(leader.empty_sum, self.hessian_dtype, self.drifts)
        fit, held_out = (self.ranks.sum(leader.sums[which], empty()) for which in (False, True))
        leader.sums = {False: {}, True: {}}
        for each in (fit, held_out):
            each.check(leader.name)
        return fit, held_out

    def _trust(self, group: list[Target], fit: HessianSum, held_out: HessianSum) -> Trust:
        """What was asked for, or what is best on the rows of the batches that are held out."""
        leader, damp, fraction = group[0], self.options["damp"], self.drift_correction
        fixed = DAMP if damp is None else damp
        chosen = Trust(fixed, fixed, DRIFT_CORRECTION if fraction is None else fraction)
        if self.chooses and fit.rows and held_out.rows:
            weight = torch.cat([layers.weight_matrix(target.module) for target in group], 1)
            how = {key: self.options[key] for key in ("precision", "backend")}
            seen, other = (Moments(part.hessian(), part.drift()) for part in (fit, held_out))
            if leader.prior is not None:
                seen = Moments(*leader.prior.joined(seen.hessian, seen.drift, fit.rows))
            best = choose(weight, seen, other, leader.spec, **how)
            if damp is None:
                chosen = chosen._replace(damp=best.damp)
            if fraction is None:
                chosen = chosen._replace(ridge=best.ridge, fraction=best.fraction)
        return chosen

    def _problem(
        self, group: list[Target], total: HessianSum, held_out: HessianSum, trust: Trust,
        seconds: float,
    ) -> _Problem:  # fmt: skip
        started = time.perf_counter()
        leader, weights = group[0], [layers.weight_matrix(target.module) for target in group]
        if held_out.rows:
            total.merge(held_out)
        hessian, drift = total.take()
        if leader.prior is not None:
            hessian, drift = leader.prior.joined(hessian, drift, total.rows)
            leader.notes.append(leader.prior.note(total.rows))
        if total.unmatched:
            leader.notes.append(OTHER_WAYS)
        if drift is not None:
            ridge, fraction = trust.ridge, trust.fraction
            weights = [drifted(w.float(), hessian, drift, ridge, fraction) for w in weights]
        return _Problem(
            group, weights, hessian, total.mean(), total.rows, trust,
            fraction=trust.fraction if drift is not None else 0.0,
            seconds=seconds + time.perf_counter() - started,
        )  # fmt: skip

    def _results(
        self, problems: list[_Problem]
    ) -> list[tuple[list[_Problem], list[list[SolveResult]]]]:
        """Batches, and of each problem in them the results of its layers."""
        batches = _batches(problems)
        if len(problems) == 1:
            return [(problems, self._solved(problems, shared=True))]
        costs = (sum(problem.cost for problem in batch) for batch in batches)
        owners = deal(costs, self.ranks.size)
        own = {
            n: self._solved(batch, shared=False)
            for n, batch in enumerate(batches)
            if owners[n] == self.ranks.rank
        }
        if self.ranks.size > 1:
            told = [[[moved(r, "cpu") for r in parts] for parts in own[n]] for n in own]
            for part in self.ranks.gather(dict(zip(own, told, strict=True))):
                for n, results in part.items():
                    if n not in own:
                        device = batches[n][0].hessian.device
                        own[n] = [[moved(r, device) for r in parts] for parts in results]
        return [(batch, own[n]) for n, batch in enumerate(batches)]

    def _solved(self, batch: list[_Problem], shared: bool) -> list[list[SolveResult]]:
        """shared: the rows, among all processes"""
        started = time.perf_counter()
        first = batch[0]
        leader = first.targets[0]
        hessian = torch.cat([problem.hessian for problem in batch]) if batch[1:] else first.hessian
        window = layers.window_size(leader.module)
        options = self.options | {"damp": first.trust.damp, "window": window}

        def solved(weights: list[Tensor]) -> SolveResult:
            weight = torch.cat(weights) if weights[1:] else weights[0]
            rows = self.ranks.shared_rows(hessian, weight) if shared else None
            return solve(weight, hessian, leader.spec, **options, rows=rows)

        if leader.spec.share:  # of each layer, not of all together
            results = [solved([*ws]) for ws in zip(*(p.weights for p in batch), strict=True)]
        else:
            rows = [weight.shape[1] for weight in first.weights]
            results = split_rows(solved([torch.cat(p.weights, 1) for p in batch]), rows)
        seconds = (time.perf_counter() - started) / len(batch)
        for problem in batch:
            problem.seconds += seconds
        if not batch[1:]:
            return [results]
        B = len(first.hessian)
        parts = [slice(n * B, (n + 1) * B) for n in range(len(batch))]
        return [[_part(result, part) for result in results] for part in parts]

    def _conclude(self, problem: _Problem, parts: list[SolveResult]) -> None:
        options = self.options | {"window": layers.window_size(problem.targets[0].module)}
        with self.stopwatch.stage("rounding to nearest, to compare"):
            baselines = against_nearest(parts, problem.weights, problem.hessian, options)
        names = [target.name for target in problem.targets]
        total = sum(part.codes.shape[1] for part in parts)
        for place, (target, part, aim, baseline) in enumerate(
            zip(problem.targets, parts, problem.weights, baselines, strict=True)
        ):
            target.solution = Solution(
                part, aim, problem.mean, problem.rows, problem.fraction,
                problem.seconds * part.codes.shape[1] / total, baseline,
                others=tuple(names[:1] if place else names[1:]),
            )  # fmt: skip


def _cost_of_trust(group: list[Target]) -> float:
    """In proportion: factorizations of the Hessian"""
    groups, _, columns = layers.matrix_shape(group[0].module)
    return float(groups * columns**3)


def _batches(problems: list[_Problem]) -> list[list[_Problem]]:
    """Problems of one form, in their order; what is in one batch does not depend on processes."""
    batches: dict[Hashable, list[list[_Problem]]] = {}
    for problem in problems:
        of_form = batches.setdefault(problem.form, [[]])
        if of_form[-1] and (len(of_form[-1]) + 1) * problem.hessian.numel() > BATCH:
            of_form.append([])
        of_form[-1].append(problem)
    return [batch for of_form in batches.values() for batch in of_form]


def _part(record: Any, problems: slice) -> Any:
    """A result of some problems of a batch, in memory of its own."""
    values = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            values[field.name] = value[problems].clone()
        elif field.name == "report":
            values[field.name] = _part(value, problems)
    return replace(record, **values)
