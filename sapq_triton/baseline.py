"""What rounding to nearest would have lost, beside what the solver has lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .columns import ColumnSummary, summarize, unit_costs
from .result import SolveResult, layer_error
from .solver import solve


@dataclass(frozen=True)
class Baseline:
    """error: tr((W - Q) H (W - Q)^T) of W rounded to nearest. columns: what they cost."""

    error: float
    columns: ColumnSummary


def against_nearest(
    results: Sequence[SolveResult],
    weights: Sequence[Tensor],
    hessian: Tensor,
    options: Mapping[str, Any],
) -> list[Baseline]:
    """Of layers that share a Hessian [B, C, C]: weights [B, R, C] each, as they were solved.

    options: of `solve`, those of the results.
    """
    first = results[0].report
    cost = unit_costs(hessian, first.order, first.damp)
    baselines = []
    for result, weight in zip(results, weights, strict=True):
        nearest = _nearest(result, weight, hessian, options)
        error = float(layer_error(weight, nearest, hessian).sum())
        columns = summarize(weight, nearest, cost, result.columns, first.order)
        baselines.append(Baseline(error, columns))
    return baselines


def _nearest(
    result: SolveResult, weight: Tensor, hessian: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """The weight rounded to nearest on the grid that its spec finds, [B, R, C]"""
    if result.report.order == "nearest":
        return result.dequantize()
    fixed = {key: options[key] for key in ("window", "precision", "backend")}
    refitted = options["candidates"] > 1 or options["rounds"] > 0
    if not refitted and result.spec.scale_search != "hessian":  # which depends on the order
        fixed |= {"scale": result.scale, "zero_point": result.zero_point}  # no second search
    return solve(weight, hessian, result.spec, order="nearest", measure=False, **fixed).dequantize()
