"""One option for each item, least error within a budget: the multiple-choice knapsack, exactly.

Partial choices are extended item by item. One that costs no less and errs no less than another is
dropped, which changes no optimum (Nemhauser & Ullmann 1969), and so is one that cannot lead to less
than a known solution: by the Lagrangian bound, the least of error + price * cost over all choices.
With many items that leaves a few states around the optimum of the linear relaxation.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SLACK = 1e-9  # of the sums that a bound compares: it must not cut off the optimum by its rounding


def choose(errors: Sequence[Floats], costs: Sequence[Floats], budget: float) -> list[int]:
    """The options, one for each item, of least total error whose total cost is at most `budget`.

    errors, costs: of the options of each item, float64, finite; costs not negative. Totals are sums
    in float64 in the order of the items, of which the error is the least to the bit. Of equal
    totals the cheapest is chosen, and then always the same one. ValueError where even the cheapest
    options of all items exceed the budget.
    """
    cheapest = sum(float(c.min()) for c in costs)
    if cheapest > budget:
        raise ValueError(f"the budget {budget:g} is too small: {cheapest:.12g} is the least")
    price, known = _relax(errors, costs, budget)
    # of the items from i on, the least of error + price * cost, and of the cost alone
    rest = _from_behind([float((e + price * c).min()) for e, c in zip(errors, costs, strict=True)])
    need = _from_behind([float(c.min()) for c in costs])
    limit = known + price * budget
    limit += SLACK * (abs(limit) + rest[0])

    cost, error = np.zeros(1), np.zeros(1)
    origins: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []  # state before, option chosen
    for item, (e, c) in enumerate(zip(errors, costs, strict=True), start=1):
        new_cost = (cost[:, None] + c).ravel()
        new_error = (error[:, None] + e).ravel()
        possible = new_cost + need[item] * (1 - SLACK) <= budget
        possible &= new_error + price * new_cost + rest[item] <= limit
        places = possible.nonzero()[0]
        order = places[np.lexsort((new_error[places], new_cost[places]))]
        best = np.minimum.accumulate(new_error[order])
        kept = order[np.diff(best, prepend=np.inf) < 0]
        origins.append(np.divmod(kept, len(c)))
        cost, error = new_cost[kept], new_error[kept]
    # errors fall as costs rise: the last state within the budget is the best
    state = int((cost <= budget).nonzero()[0][-1])
    chosen = []
    for before, option in reversed(origins):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def whole_bits(mean_bits: float, weights: int) -> int:
    """The bits that so many weights may take at a mean, which is read as the decimal it prints as:
    4.35 for 100 weights is 435, though the float lies below. ValueError for what is no such mean.
    """
    number = isinstance(mean_bits, Real) and not isinstance(mean_bits, bool)
    if not number or not 0 < float(mean_bits) < math.inf:
        raise ValueError(f"mean_bits must be a positive number, got {mean_bits!r}")
    return math.floor(Fraction(str(mean_bits)) * weights)


def _from_behind(values: list[float]) -> list[float]:
    """Sums of the values from each place on; one more, 0, for none."""
    return [0.0, *np.cumsum(values[::-1]).tolist()][::-1]


def _relax(errors: Sequence[Floats], costs: Sequence[Floats], budget: float) -> tuple[float, float]:
    """Price of a unit of cost at the optimum of the linear relaxation, and the error of a solution.

    Steps along the lower convex hulls of the items are taken by falling gain per cost; the price is
    that of the first one that does not fit, and the solution takes all that fit before it.
    """
    spent, total, steps = 0.0, 0.0, []
    for e, c in zip(errors, costs, strict=True):
        place = int(np.lexsort((e, c))[0])
        spent, total = spent + float(c[place]), total + float(e[place])
        while (gains := e[place] - e).max() > 0:
            # dearer options alone: one of equal cost and less error would have been the first
            with np.errstate(divide="ignore", invalid="ignore"):
                rates = np.where((gains > 0) & (c > c[place]), gains / (c - c[place]), 0.0)
            if rates.max() <= 0:
                break
            best = int(np.lexsort((c, -rates))[0])
            steps.append((float(rates[best]), float(c[best] - c[place]), float(gains[best])))
            place = best
    for rate, cost, gain in sorted(steps, key=lambda step: -step[0]):
        if spent + cost > budget * (1 - SLACK):  # in this order of sums; it must fit in any
            return rate, total
        spent, total = spent + cost, total - gain
    return 0.0, total
