"""The exact choice within a budget: against all combinations, and against a table over costs."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest

from sapq_triton.knapsack import Floats, choose, whole_bits


def total(values: Iterable[float]) -> float:
    """In the order of the items, as `choose` adds."""
    result = 0.0
    for value in values:
        result += value
    return result


def costs_of(choice: Iterable[int], table: list[Floats]) -> float:
    return total(float(values[option]) for values, option in zip(table, choice, strict=True))


def problem(
    random: np.random.Generator, whole_errors: bool, whole_costs: bool
) -> tuple[list[Floats], list[Floats]]:
    """A few items of one to four options; whole numbers make ties."""
    sizes = random.integers(1, 5, random.integers(1, 6))

    def draw(count: int, whole: bool) -> Floats:
        return random.integers(0, 4, count).astype(float) if whole else random.random(count)

    return [draw(n, whole_errors) for n in sizes], [draw(n, whole_costs) for n in sizes]


@pytest.mark.parametrize("whole_costs", [False, True], ids=["costs", "whole-costs"])
@pytest.mark.parametrize("whole_errors", [False, True], ids=["errors", "whole-errors"])
def test_best_of_all_combinations(whole_errors: bool, whole_costs: bool) -> None:
    """Error and cost to the bit; of equal errors the cheapest."""
    random = np.random.default_rng(0)
    for trial in range(150):
        errors, costs = problem(random, whole_errors, whole_costs)
        low, high = (total(f(values) for values in costs) for f in (np.min, np.max))
        budget = low + (high - low) * random.random() if trial % 4 else low
        every = itertools.product(*(range(len(values)) for values in errors))
        scored = ((costs_of(c, errors), costs_of(c, costs)) for c in every)
        best = min(pair for pair in scored if pair[1] <= budget)
        chosen = choose(errors, costs, budget)
        assert (costs_of(chosen, errors), costs_of(chosen, costs)) == best


def test_many_items_against_a_table_over_costs() -> None:
    """least[c] over all whole budgets c: another exact algorithm, that prunes nothing."""
    random = np.random.default_rng(1)
    bits = np.array([2.0, 3, 4, 5, 6, 8])
    sizes = random.integers(1, 9, 60)
    errors = [10 ** random.normal() * 4.0**-bits * random.lognormal(0, 0.2, 6) for _ in sizes]
    costs = [bits * size for size in sizes]
    budget = int(4 * sizes.sum())
    least = np.full(budget + 1, np.inf)
    least[0] = 0
    for e, c in zip(errors, costs, strict=True):
        after = np.full_like(least, np.inf)
        for error, cost in zip(e, c.astype(int), strict=True):
            if cost <= budget:
                after[cost:] = np.minimum(after[cost:], least[: budget + 1 - cost] + error)
        least = after
    chosen = choose(errors, costs, budget)
    assert costs_of(chosen, costs) <= budget
    assert costs_of(chosen, errors) == least.min()


def test_more_budget_never_errs_more_and_the_same_problem_has_one_answer() -> None:
    random = np.random.default_rng(2)
    errors, costs = [random.random(5) for _ in range(12)], [random.random(5) for _ in range(12)]
    low, high = (total(f(values) for values in costs) for f in (np.min, np.max))
    before = np.inf
    for budget in np.linspace(low, high, 30):
        chosen = choose(errors, costs, budget)
        assert choose(errors, costs, budget) == chosen
        error = costs_of(chosen, errors)
        assert error <= before
        before = error
    assert before == total(float(values.min()) for values in errors)


def test_budget_that_is_too_small_names_the_least() -> None:
    costs = [np.array([2.0, 3.0]), np.array([2.5, 4.0])]
    errors = [np.array([1.0, 0.0])] * 2
    assert choose(errors, costs, 4.5) == [0, 0]
    with pytest.raises(ValueError, match=r"budget 4\.4 is too small: 4\.5 is the least"):
        choose(errors, costs, 4.4)


def test_a_mean_of_bits_is_the_decimal_that_it_prints_as() -> None:
    assert 4.35 * 100 < 435
    assert whole_bits(4.35, 100) == 435
    assert whole_bits(3, 7) == 21
    assert whole_bits(2.5, 3) == 7


@pytest.mark.parametrize("mean", [0, -1.0, float("nan"), float("inf"), True, "4", None])
def test_means_that_are_none(mean: object) -> None:
    with pytest.raises(ValueError, match="mean_bits must be a positive number"):
        whole_bits(mean, 10)  # type: ignore[arg-type]
