"""solve_rows: the choices, codes and updates of exact OBQ written out, one row at a time."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # absolute 2.5e-6 measured, weights up to 18

SHAPES = [  # N, F, G, steps
    pytest.param(1, 1, 1, 1, id="one-weight"),
    pytest.param(1, 9, 1, 9, id="one-row-to-its-end"),
    pytest.param(4, 12, 3, 7, id="some-steps"),
    pytest.param(2, 70, 5, 4, id="ragged"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(N: int, F: int, G: int, spread: float, device: torch.device) -> Arguments:
    """weight, inverse, scale, zero_point, group; spread: standard deviation in steps of the grid"""
    factor = torch.randn(N, F, 2 * F, device=device)
    inverse = torch.linalg.inv(factor @ factor.mT / (2 * F) + 0.1 * torch.eye(F, device=device))
    scale = torch.rand(N, G, device=device) + 0.5
    zero_point = torch.randint(6, 10, (N, G), device=device).float()
    group = torch.randint(0, G, (N, F), device=device)
    weight = torch.randn(N, F, device=device) * spread
    return weight, (inverse + inverse.mT) / 2, scale, zero_point, group


def literal_obq(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, steps: int
) -> tuple[list[int], list[int], Tensor, Tensor]:
    """One row, one grid per column, all in float64; the inverse is written after each step.

    ->  columns, codes, rows of the inverse over the root of their diagonal [steps, F], weights left
    """
    w, a = weight.double(), inverse.double()
    s, z = scale.double(), zero_point.double()
    picked: list[int] = []
    codes, rows = [], []
    for _ in range(steps):
        best, best_key = -1, None
        values = ((w / s).round() + z).clamp(0, qmax)
        delta = w - (values - z) * s
        left = [c for c in range(len(w)) if c not in picked]
        off_the_grid = any(abs(delta[c]) > s[c] / 2 for c in left)
        for c in left:
            key = -(delta[c] ** 2) if off_the_grid else delta[c] ** 2 / a[c, c]
            if best_key is None or key < best_key:
                best, best_key = c, key
        picked.append(best)
        codes.append(int(values[best]))
        row = a[best].clone()
        row[picked[:-1]] = 0
        rows.append(row / row[best].sqrt())
        w = w - delta[best] * row / row[best]
        a = a - torch.outer(rows[-1], rows[-1])
    return picked, codes, torch.stack(rows), w


def assert_solves(arguments: Arguments, qmax: int, steps: int) -> tuple[Tensor, Tensor]:
    """Kernel and reference against the literal loop; ->  picked, codes of the kernel"""
    weight, inverse, scale, zero_point, group = arguments
    results = []
    for backend in ("triton", "reference"):
        left = weight.clone()
        found = ops.solve_rows(
            left, inverse, scale, zero_point, group, qmax, steps, backend=backend
        )
        results.append((*found, left))
    s, z = scale.gather(1, group), zero_point.gather(1, group)
    for n in range(len(weight)):
        columns, values, v, w = literal_obq(weight[n], inverse[n], s[n], z[n], qmax, steps)
        for picked, codes, rows, left in results:
            assert picked[n].tolist() == columns
            assert codes[n].tolist() == values
            torch.testing.assert_close(rows[n].double(), v, **TOLERANCE)
            torch.testing.assert_close(left[n].double(), w, **TOLERANCE)
    for picked, _, rows, _ in results:
        for step in range(1, steps):
            assert not rows[:, step].gather(1, picked[:, :step]).any()  # of columns that are done
    return results[0][:2]


@pytest.mark.parametrize("spread", [1.5, 9.0], ids=["on-the-grid", "outliers"])
@pytest.mark.parametrize("N, F, G, steps", SHAPES)
def test_is_literal_obq(
    N: int, F: int, G: int, steps: int, spread: float, device: torch.device
) -> None:
    assert_solves(problem(N, F, G, spread, device), 15, steps)


def test_any_strides(device: torch.device) -> None:
    """As the solver calls it: one inverse for all rows at first, then what is left of each."""
    N, F, G = 3, 11, 2
    weight, inverse, scale, zero_point, group = problem(N, F, G, 3.0, device)
    contiguous = (weight, inverse[:1].expand(N, F, F), scale, zero_point, group)
    expected = assert_solves(contiguous, 15, 4)
    whole = torch.full((N, F + 2, F + 3), torch.nan, device=device)
    whole[:, 2:, 3:] = inverse[0]
    wide = torch.full((N, 2 * F), torch.nan, device=device)
    left = wide[:, ::2].copy_(weight)
    arguments = (
        left,
        whole[:, 2:, 3:],
        scale.mT.contiguous().mT,
        zero_point.mT.contiguous().mT,
        group.mT.contiguous().mT,
    )
    assert not any(t.is_contiguous() for t in arguments)
    actual = ops.solve_rows(*arguments, 15, 4, backend="triton")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    in_place = weight.clone()
    ops.solve_rows(in_place, *contiguous[1:], 15, 4, backend="triton")
    torch.testing.assert_close(left, in_place, rtol=0, atol=0)
    assert wide[:, 1::2].isnan().all()


def identity_problem(weights: list[float], device: torch.device) -> Arguments:
    """No column minds any other; the grid is 0, 1, ... 15."""
    weight = torch.tensor([weights], device=device)
    inverse = torch.eye(len(weights), device=device)[None]
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    return weight, inverse, one, zero, torch.zeros(weight.shape, dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    "weights, order, values",
    [
        pytest.param([3.25, 5.5, 7.125], [2, 0, 1], [7, 3, 6], id="cheapest-first"),
        pytest.param([0.125, 20.0, -3.0, 17.0], [1, 2, 3, 0], [15, 0, 15, 0], id="outliers-first"),
        pytest.param([0.5, 0.25, 1.5], [1, 0, 2], [0, 0, 2], id="a-tie-is-no-outlier"),
        pytest.param([2.25, 1.25, 7.75, 3.25], [0, 1, 2, 3], [2, 1, 8, 3], id="first-of-equals"),
        pytest.param([1.0, 20.0, -5.0, 18.0], [1, 2, 3, 0], [15, 0, 15, 1], id="first-outlier"),
    ],
)
def test_order_by_hand(
    weights: list[float], order: list[int], values: list[int], device: torch.device
) -> None:
    picked, codes = assert_solves(identity_problem(weights, device), 15, len(weights))
    assert picked.tolist() == [order]
    assert codes.tolist() == [values]


@pytest.mark.parametrize(
    "special, order",
    [
        pytest.param({100: 3.125, 1026: 3.125}, [100, 1026, 0], id="cheapest"),
        pytest.param({100: 3.125, 1028: 30.0}, [1028, 100, 0], id="outlier-in-the-last"),
        pytest.param({100: 30.0, 1028: 3.125}, [100, 1028, 0], id="outlier-in-the-first"),
        pytest.param({100: 30.0, 1028: 30.0}, [100, 1028, 0], id="equal-outliers"),
    ],
)
def test_choice_across_blocks_of_columns(
    special: dict[int, float], order: list[int], device: torch.device
) -> None:
    """More columns than a block has: the choice is the best of all blocks, the first of equals."""
    F = 1030
    arguments = identity_problem([special.get(c, 2.25) for c in range(F)], device)
    picked, _, rows = ops.solve_rows(*arguments, 15, 3, backend="triton")
    assert picked.tolist() == [order]
    assert torch.equal(rows[0], torch.eye(F, device=device)[picked[0]])


def test_weights_are_left_on_the_grid(device: torch.device) -> None:
    N, F, G = 2, 10, 2
    weight, inverse, scale, zero_point, group = problem(N, F, G, 3.0, device)
    picked, codes, _ = ops.solve_rows(
        weight, inverse, scale, zero_point, group, 15, F, backend="triton"
    )
    values = torch.empty_like(codes).scatter_(1, picked, codes)
    expected = reference.to_value(values, scale.gather(1, group), zero_point.gather(1, group), 15)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
