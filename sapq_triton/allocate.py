"""Bits per layer under a budget: how much each layer loses at each width, then the best choice.

    curves = error_curves(model, batches, spec)      what rounding a layer costs, by bits
    best   = allocate(curves, mean_bits=4)           least sum of those costs within the budget
    quantize(model, batches, spec, overrides=best.overrides)

The sum over layers stands for the loss of the whole model, as if layers did not interact.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from . import knapsack
from .report import packed_bytes
from .spec import QuantSpec


@dataclass(frozen=True)
class LayerCurve:
    """What a layer costs at each width.

    shape: [B, R, C] of its weight, as of `layers.weight_matrix`. specs: one for each width,
    ascending. errors: by score, one for each spec. notes: whatever deviates from what was asked.
    """

    shape: tuple[int, int, int]
    specs: tuple[QuantSpec, ...]
    errors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def bytes(self, spec: QuantSpec) -> float:
        """As `LayerReport.bytes`."""
        problems, rows, columns = self.shape
        return packed_bytes(problems * rows, columns, spec)


@dataclass(frozen=True)
class ErrorCurves:
    """Curves by name of the layer, in the order of definition.

    scores: what errors there are. loss: of the model's output, for the scores that stand for it;
    None where none does. skipped: name and reason of layers that have no curve.
    """

    layers: Mapping[str, LayerCurve]
    scores: tuple[str, ...]
    loss: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """specs: by name of the layer. error: sum of the layers' errors, in units of the score.

    cost and budget: in bits of all weights, bytes, or the unit of the table. mean_bits: over all
    weights of these layers. bytes: as the sum of `LayerReport.bytes`.
    """

    specs: Mapping[str, QuantSpec]
    error: float
    cost: float
    budget: float
    mean_bits: float
    bytes: float

    @property
    def overrides(self) -> dict[str, QuantSpec]:
        """For `quantize`: patterns that match these names alone."""
        return {re.sub(r"([*?[])", r"[\1]", name): spec for name, spec in self.specs.items()}

    def __str__(self) -> str:
        width = max(map(len, self.specs), default=0)
        lines = [f"{name:{width}} {spec.bits} bits" for name, spec in self.specs.items()]
        mean = f"{self.mean_bits:.3f} bits per weight, {self.bytes:.0f} bytes"
        return "\n".join([*lines, f"{mean}, error {self.error:.4g}"])


def allocate(
    curves: ErrorCurves,
    *,
    mean_bits: float | None = None,
    bytes: float | None = None,
    cost: Mapping[str, Mapping[int, float]] | None = None,
    budget: float | None = None,
    score: str | None = None,
) -> Allocation:
    """The widths of all layers whose errors have the least sum, within a budget: exactly.

    One budget of three:
    mean_bits: bits per weight, over the weights of all layers in `curves`, without scales.
    bytes: packed codes, float16 scales and packed zero points, as of `LayerReport.bytes`.
    cost, budget: a table of your own, such as latency or bit operations: layer -> bits -> cost. A
        width that is not in a layer's table is not given to it. Costs add up over the layers, in
        float64 and in the order of `curves`.
    score: one of `curves.scores`; by default the first.

    The same curves and budget give the same allocation; of those of equal error a cheapest one. A
    larger budget never gives a larger error. ValueError for a budget that even the smallest widths
    exceed, naming the least that would do, and for bad arguments.
    """
    score = curves.scores[0] if score is None else score
    if score not in curves.scores:
        raise ValueError(f"score must be one of {curves.scores}, got {score!r}")
    if not curves.layers:
        raise ValueError("curves hold no layer")
    asked = {"mean_bits": mean_bits, "bytes": bytes, "cost": cost}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"one of mean_bits, bytes and cost must be given, got {given or 'none'}")
    if (cost is None) != (budget is None):
        raise ValueError("cost and budget must be given together, and mean_bits and bytes alone")

    weights = sum(curve.weights for curve in curves.layers.values())
    unit, limit = 1.0, 0.0
    if mean_bits is not None:
        unit, limit = float(weights), knapsack.whole_bits(mean_bits, weights)
    elif bytes is not None:
        limit = _number("bytes", bytes)
    elif budget is not None:
        limit = _number("budget", budget)
    options = _options(curves, cost, "bytes" if bytes is not None else "bits")
    errors = [
        np.array([curve.errors[score][i] for i in allowed])
        for curve, (allowed, _) in zip(curves.layers.values(), options, strict=True)
    ]
    for name, values in zip(curves.layers, errors, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"errors of {name!r} must be finite, got {values.tolist()}")
    costs = [values for _, values in options]
    least = sum(float(values.min()) for values in costs)
    if least > limit:
        what, value = ("budget", budget) if cost is not None else (given[0], asked[given[0]])
        raise ValueError(f"{what} {value} is too small: {least / unit:.12g} is the least possible")
    chosen = knapsack.choose(errors, costs, limit)

    specs = {
        name: curve.specs[allowed[place]]
        for (name, curve), (allowed, _), place in zip(
            curves.layers.items(), options, chosen, strict=True
        )
    }
    pairs = [(curves.layers[name], spec) for name, spec in specs.items()]
    return Allocation(
        specs=specs,
        error=sum(float(e[place]) for e, place in zip(errors, chosen, strict=True)),
        cost=sum(float(c[place]) for c, place in zip(costs, chosen, strict=True)),
        budget=float(limit),
        mean_bits=sum(spec.bits * curve.weights for curve, spec in pairs) / weights,
        bytes=sum(curve.bytes(spec) for curve, spec in pairs),
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name} must be a finite number, not negative, got {value!r}")


def _options(
    curves: ErrorCurves, table: Mapping[str, Mapping[int, float]] | None, unit: str
) -> list[tuple[list[int], knapsack.Floats]]:
    """Of each layer, the places of the specs that it may have, and what they cost."""
    if table is None:
        return [
            (
                list(range(len(curve.specs))),
                np.array([
                    curve.bytes(spec) if unit == "bytes" else float(spec.bits * curve.weights)
                    for spec in curve.specs
                ]),
            )
            for curve in curves.layers.values()
        ]  # fmt: skip
    if table.keys() != curves.layers.keys():
        odd = sorted(table.keys() ^ curves.layers.keys())
        raise ValueError(f"cost must have the layers of the curves; the odd ones are {odd}")
    options = []
    for name, curve in curves.layers.items():
        places = {spec.bits: place for place, spec in enumerate(curve.specs)}
        if not table[name] or not table[name].keys() <= places.keys():
            raise ValueError(
                f"cost[{name!r}] must have some of the widths {list(places)}, "
                f"got {list(table[name])}"
            )
        widths = sorted(table[name])
        costs = [_number(f"cost[{name!r}][{width}]", table[name][width]) for width in widths]
        options.append(([places[width] for width in widths], np.array(costs)))
    return options
