"""What rounding to nearest would have lost, and what is said of the columns: by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, quantize, solve
from sapq_triton.baseline import against_nearest
from sapq_triton.columns import BINS, POINTS, summarize, unit_costs
from sapq_triton.layers import weight_matrix
from sapq_triton.spec import Order
from sapq_triton.targets import split_rows

HOW: dict[str, Any] = dict(window=1, precision="tf32x3", backend="auto")
PLAIN: dict[str, Any] = dict(progress=False, drift_correction=0.0, damp=0.01)


def problem(groups: int = 1, rows: int = 6, columns: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(groups, 40, columns) * torch.linspace(0.1, 2, columns)
    return torch.randn(groups, rows, columns), 2 / 40 * x.mT @ x


@pytest.mark.parametrize("search", ["absmax", "mse", "hessian"])
@pytest.mark.parametrize("candidates, rounds", [(1, 0), (4, 0), (1, 2)])
@pytest.mark.parametrize("sparsity, window", [(None, 1), ("2:4", 1), ("2:4", 3), (0.5, 1)])
def test_the_grid_is_the_one_that_the_spec_finds(
    search: Any, candidates: int, rounds: int, sparsity: str | float | None, window: int
) -> None:
    weight, hessian = problem(groups=2)
    spec = QuantSpec(3, 4, scale_search=search, sparsity=sparsity)
    how = {**HOW, "window": window}
    options: dict[str, Any] = dict(how, candidates=candidates, rounds=rounds)
    result = solve(weight, hessian, spec, **options)
    (baseline,) = against_nearest([result], [weight], hessian, options)
    nearest = solve(weight, hessian, spec, order="nearest", **how)
    assert baseline.error == float(nearest.report.error.sum())


def test_layers_that_share_a_hessian_are_told_apart() -> None:
    (first, hessian), (second, _) = problem(rows=5), problem(rows=3)
    both = solve(torch.cat([first, second], 1), hessian, QuantSpec(3))
    options: dict[str, Any] = dict(HOW, candidates=1, rounds=0)
    found = against_nearest(split_rows(both, [5, 3]), [first, second], hessian, options)
    for baseline, weight in zip(found, (first, second), strict=True):
        nearest = solve(weight, hessian, QuantSpec(3), order="nearest")
        assert baseline.error == float(nearest.report.error.sum())


class Twice(nn.Module):
    """Two layers on the same inputs, and a third one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu())


def twice(**options: Any) -> tuple[Report, dict[str, Tensor], Tensor]:
    torch.manual_seed(1)
    model, x = Twice(), torch.randn(50, 8) @ torch.randn(8, 8)
    weights = {n: weight_matrix(model.get_submodule(n)).clone() for n in ("left", "right")}
    return quantize(model, [x], QuantSpec(3), **{**PLAIN, **options}), weights, x


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_layers_of_a_model(preset: Any) -> None:
    report, weights, x = twice(preset=preset)
    hessian = 2 / 50 * x.T @ x
    for name, weight in weights.items():
        layer = report[name]
        nearest = solve(weight, hessian, QuantSpec(3), order="nearest")
        error, energy = (float(v.sum()) for v in (nearest.report.error, nearest.report.energy))
        assert layer.nearest_error == pytest.approx(error, rel=1e-4)
        assert layer.nearest_relative_error == pytest.approx(error / energy, rel=1e-4)
        assert layer.nearest_ratio == layer.error / layer.nearest_error < 1
        assert layer.order == report.options["order"]
    assert "solved together with right: one Hessian" in report["left"].notes
    nearest_run, _, _ = twice(preset=preset, order="nearest")
    for layer in nearest_run.layers:
        assert layer.error == layer.nearest_error and layer.nearest_ratio == 1


def test_the_error_is_against_what_the_layer_aimed_at() -> None:
    report, _, _ = twice(drift_correction=1.0)
    plain, _, _ = twice()
    assert report["left"].nearest_error == plain["left"].nearest_error  # no drift at the first
    assert report["last"].nearest_error != plain["last"].nearest_error
    assert report["last"].error < report["last"].nearest_error


@pytest.mark.parametrize("order", ["sensitivity", "sensitivity-static", "activation", "natural"])
def test_the_sensitivity_of_columns(order: Order) -> None:
    weight, hessian = problem(groups=3)
    hessian[1, 2] = hessian[1, :, 2] = 0  # never fires
    result = solve(weight, hessian, QuantSpec(3), order=order)
    nearest = solve(weight, hessian, QuantSpec(3), order="nearest").dequantize()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    cost = diagonal.clone()
    if order.startswith("sensitivity"):
        full = hessian.double().clone()
        full[1, 2, 2] = diagonal[1].sum() / 11
        ridge = 0.01 * full.diagonal(dim1=1, dim2=2).mean(1)
        damped = full + ridge[:, None, None] * torch.eye(12, dtype=torch.float64)
        cost = (1 / damped.inverse().diagonal(dim1=1, dim2=2)).float()
        cost[1, 2] = 0
    found = unit_costs(hessian, order, result.report.damp)
    torch.testing.assert_close(found, cost, rtol=1e-4, atol=0)
    summary = summarize(weight, nearest, found, result.columns, order)
    sensitivity = ((weight - nearest).double().square().sum(1) * cost).flatten()
    logs = sensitivity[sensitivity > 0].log10()
    assert summary.compensated is order.startswith("sensitivity")
    assert (summary.low, summary.high) == pytest.approx(
        (float(logs.min()), float(logs.max())), abs=1e-3
    )
    assert sum(summary.counts) == 35 and len(summary.counts) == BINS and summary.free == 1
    assert summary.columns == 12 and result.columns is not None
    assert summary.order == tuple(result.columns[0].tolist())


def test_the_first_column_of_a_static_order_is_the_most_sensitive() -> None:
    weight, hessian = problem(columns=30)
    result = solve(weight, hessian, QuantSpec(3), order="sensitivity-static")
    options: dict[str, Any] = dict(HOW, candidates=1, rounds=0)
    (baseline,) = against_nearest([result], [weight], hessian, options)
    cost = unit_costs(hessian, "sensitivity-static", result.report.damp)
    nearest = solve(weight, hessian, QuantSpec(3), order="nearest").dequantize()
    sensitivity = (weight - nearest).square().sum(1) * cost
    assert baseline.columns.order == tuple(sensitivity[0].argsort(descending=True).tolist())


def test_summaries_do_not_grow() -> None:
    order = torch.randperm(5000)[None]
    cost = torch.ones(1, 5000)
    summary = summarize(torch.randn(1, 2, 5000), torch.zeros(1, 2, 5000), cost, order, "natural")
    assert len(summary.order) == POINTS and sum(summary.counts) == 5000
    places = torch.linspace(0, 4999, POINTS, dtype=torch.float64).round().long()
    assert summary.order == tuple(order[0, places].tolist())
    assert (summary.order[0], summary.order[-1]) == (int(order[0, 0]), int(order[0, -1]))


def test_columns_that_all_cost_the_same_or_nothing() -> None:
    weight, cost = torch.ones(1, 2, 4), torch.ones(1, 4)
    same = summarize(weight, torch.zeros(1, 2, 4), cost, None, "obq")
    assert (same.high - same.low, sum(same.counts), same.order) == (1.0, 4, ())
    nothing = summarize(weight, weight, cost, torch.arange(4)[None], "natural")
    assert (sum(nothing.counts), nothing.free, nothing.order) == (0, 4, (0, 1, 2, 3))


def test_what_never_fired_costs_nothing_in_any_order() -> None:
    for order in ("sensitivity", "natural"):
        cost = unit_costs(torch.zeros(2, 5, 5), order, torch.full((2,), 0.01))
        assert torch.equal(cost, torch.zeros(2, 5))


def test_where_h_is_not_positive_definite_nothing_compensates() -> None:
    hessian = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    cost = unit_costs(hessian, "sensitivity", torch.tensor([0.01]))
    assert torch.equal(cost, torch.ones(1, 2))
