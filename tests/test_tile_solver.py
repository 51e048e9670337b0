"""The codes of a tile: several orders to start from, and the order of each row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.grids import search_grids
from sapq_triton.hessian import damped, inverse
from sapq_triton.memory import Rows
from sapq_triton.result import row_errors
from sapq_triton.sparsity import Sparsity
from sapq_triton.tile_solver import Start, solve_tile, starting_points

HOW: dict[str, Any] = dict(precision="ieee", backend="reference")


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(4 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / 3)
    return torch.randn(rows, columns), 2 / len(x) * x.T @ x


def errors(weight: Tensor, hessian: Tensor, **options: Any) -> Tensor:
    """Of each row, of the damped Hessian, which is what the solver sees"""
    h = damped(hessian[None], 0.01)[0]
    return row_errors(weight, h, solve(weight, hessian, **options).dequantize())


SPECS = [QuantSpec(2), QuantSpec(4, 6), QuantSpec(4, symmetric=True, codebook="nf4")]


@pytest.mark.parametrize("spec", SPECS)
def test_more_starts_never_cost_a_row_more(spec: QuantSpec) -> None:
    """In one tile of all columns, where the cost is the error."""
    weight, hessian = problem(20, 24)
    one, *more = (
        errors(weight, hessian, spec=spec, block=24, starts=n, sweeps=1) for n in (1, 2, 4, 16)
    )
    before = one
    for now in more:
        assert (now <= before * (1 + 1e-6)).all()
        before = now
    assert (more[-1] < 0.999 * one).sum() > 10


def test_many_starts_find_the_best_codes_there_are() -> None:
    """All 4**6 of them are tried, in float64."""
    weight, hessian = problem(30, 6)
    spec = QuantSpec(2, scale_search="absmax")
    grid = solve(weight, hessian, spec, order="nearest")
    every = torch.cartesian_prod(*6 * [torch.arange(4.0)])[:, None]  # [4096, 1, 6]
    delta = (weight - (every - grid.zero_point) * grid.scale).double()
    h = damped(hessian.double()[None], 0.01)[0]
    least = ((delta @ h) * delta).sum(2).amin(0)
    shares = [
        (errors(weight, hessian, spec=spec, starts=n) <= least * (1 + 1e-4)).double().mean()
        for n in (1, 64)
    ]
    assert shares[0] < 0.8
    assert shares[1] > 0.95


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("pruned", [False, True])
def test_each_row_keeps_the_start_that_costs_it_least(sweeps: int, pruned: bool) -> None:
    B, R, T = 2, 9, 16
    pairs = [problem(R, T) for _ in range(B)]
    weight, hessian = (torch.stack(each) for each in zip(*pairs, strict=True))
    spec = QuantSpec(3, 4, sparsity="2:4" if pruned else None)
    scale, zero_point = search_grids(
        weight, hessian, spec, "sensitivity", 1, 0.01, "reference", Rows()
    )
    starts, positive = starting_points(inverse(hessian)[0], 5)
    assert positive.all()
    columns = torch.arange(T).repeat(B, 1)

    def solved(starts: list[Start]) -> tuple[Tensor, Tensor]:
        return solve_tile(
            weight, starts, scale, zero_point, columns // 4, spec.qmax, slice(2, 9),
            columns=columns, greedy=None, sweeps=sweeps, before=0,
            sparsity=Sparsity.of(spec, T, 1) if pruned else None, **HOW,
        )  # fmt: skip

    code, error = solved(starts)
    value = (code - zero_point[:, 2:].repeat_interleave(4, 2)) * scale[:, 2:].repeat_interleave(
        4, 2
    )
    torch.testing.assert_close(error, weight[:, 2:] - value)

    def cost(error: Tensor) -> Tensor:
        return ((error @ hessian) * error).sum(2)

    first = solved(starts[:1])
    if pruned:  # the zeros are those of the first start
        assert (value == 0).unflatten(2, (-1, 4)).sum(3).amin() >= 2
        assert (cost(error) <= cost(first[1]) * (1 + 1e-5)).all()
        return
    costs = torch.stack([cost(solved([start])[1]) for start in starts], 2)
    torch.testing.assert_close(cost(error), costs.amin(2), rtol=1e-5, atol=0)
    assert costs.argmin(2).unique().numel() > 2


def test_the_first_start_is_the_order_that_there_is() -> None:
    inverse = torch.eye(7)[None] + 0.1
    starts, positive = starting_points(inverse, 3)
    assert starts[0].order is None and positive.all()
    natural = torch.arange(7)
    orders = [natural if start.order is None else start.order for start in starts]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    for order, (_, back, root) in zip(orders, starts, strict=True):
        assert sorted(order.tolist()) == [*range(7)]
        assert back is None or order[back].equal(natural)
        assert (root.tril(-1) == 0).all()
        expected = torch.linalg.inv(inverse[:, order][:, :, order])
        torch.testing.assert_close(root @ root.mT, expected)
    again, _ = starting_points(inverse, 3)
    for a, b in zip(starts[1:], again[1:], strict=True):
        assert a.order is not None and b.order is not None and (a.order == b.order).all()


@pytest.mark.parametrize("bits, group_size", [(2, -1), (4, 6)])
def test_an_order_for_each_row_is_obq_where_there_is_one_tile(bits: int, group_size: int) -> None:
    weight, hessian = problem(12, 24)
    spec = QuantSpec(bits, group_size)
    expected = solve(weight, hessian, spec, order="obq")
    actual = solve(weight, hessian, spec, starts="obq", sweeps=0, block=24,
                   scale=expected.scale, zero_point=expected.zero_point)  # fmt: skip
    assert (actual.codes == expected.codes).all()
    swept = errors(weight, hessian, spec=spec, starts="obq", block=24,
                   scale=expected.scale, zero_point=expected.zero_point)  # fmt: skip
    h = damped(hessian[None], 0.01)[0]
    assert (swept <= row_errors(weight, h, expected.dequantize()) * (1 + 1e-6)).all()


def test_an_order_for_each_row_in_several_tiles_and_problems() -> None:
    pairs = [problem(10, 36) for _ in range(2)]
    weight, hessian = (torch.stack(each) for each in zip(*pairs, strict=True))
    spec = QuantSpec(3, 6)
    together = solve(weight, hessian, spec, starts="obq", block=8)
    nearest = solve(weight, hessian, spec, order="nearest")
    for number, (w, h) in enumerate(pairs):
        alone = solve(w, h, spec, starts="obq", block=8)
        assert (alone.codes == together.codes[number]).all()
        rounded = layer_error(w, nearest.dequantize()[number], h)
        assert layer_error(w, alone.dequantize(), h) < 0.7 * rounded


@pytest.mark.parametrize("sweeps", [0, 2])
def test_inverses_of_rows_that_are_lost_to_rounding_are_damped(sweeps: int) -> None:
    """The inverse of the whole tile is positive definite, those of rows do not stay so."""
    torch.manual_seed(5)  # one of those in which it happens
    x = torch.randn(24, 48) @ torch.diag(torch.logspace(0, -3, 48))
    weight, hessian = torch.randn(8, 48), 2 / 24 * x.T @ x
    options: dict[str, Any] = dict(damp=1e-8, sweeps=sweeps)
    plain = solve(weight, hessian, QuantSpec(3), **options)
    report = solve(weight, hessian, QuantSpec(3), starts="obq", **options).report
    assert plain.report.damp == 1e-8  # a single order has no such trouble
    assert report.damp > 1e-8 and not report.fallback
    nearest = solve(weight, hessian, QuantSpec(3), order="nearest").report
    assert report.relative_error < 0.9 * nearest.relative_error
    with_obq = solve(weight, hessian, QuantSpec(3), order="obq", **options).report
    assert with_obq.damp == report.damp


@pytest.mark.parametrize("starts", [3, "obq"])
@pytest.mark.parametrize("codebook", ["int", "nf4"])
def test_triton_gives_the_same_codes(starts: Any, codebook: Any, device: torch.device) -> None:
    weight, hessian = (t.to(device) for t in problem(6, 20))
    spec = QuantSpec(4, 10, symmetric=True, codebook=codebook)
    how = dict(starts=starts, block=8, sweeps=1)
    expected = solve(weight, hessian, spec, **how, backend="reference")  # type: ignore[arg-type]
    actual = solve(weight, hessian, spec, **how, backend="triton",  # type: ignore[arg-type]
                   scale=expected.scale, zero_point=expected.zero_point)  # fmt: skip
    assert (actual.codes == expected.codes).all()


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_zeros_are_as_many_as_with_one_start(sparsity: Any) -> None:
    weight, hessian = problem(16, 32)
    spec = QuantSpec(4, sparsity=sparsity)
    one, more = (solve(weight, hessian, spec, starts=n) for n in (1, 6))
    assert more.sparsity >= 0.5
    if sparsity == "2:4":
        zeros = (more.codes == more.zero_point).unflatten(1, (-1, 4)).sum(2)
        assert (zeros >= 2).all()
    assert more.report.error < one.report.error


def test_a_hessian_that_is_not_positive_definite_climbs_the_ladder() -> None:
    weight, _ = problem(5, 12)
    x = torch.randn(3, 12)
    result = solve(weight, x.T @ x, QuantSpec(3), damp=0.0, starts=4)
    assert result.report.damp > 0 and not result.report.fallback
    assert result.dequantize().isfinite().all()


def test_what_is_not_positive_definite_is_told() -> None:
    inverse = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, -1, 1, 1]))])
    assert starting_points(inverse, 2)[1].tolist() == [True, False]
