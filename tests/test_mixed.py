"""Rows of different bits and columns that keep floating point, against literal algebra."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sapq_triton import (
    QuantSpec,
    dequantize,
    layer_error,
    ops,
    solve,
    solve_float_columns,
    solve_row_bits,
)
from tests.test_solver import ill_conditioned, problem

SPEC = QuantSpec(4)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 12])
@pytest.mark.parametrize("order", ["sensitivity", "activation"])
def test_rows_come_from_the_solves_at_their_bits(group_size: int, order: Any) -> None:
    weight, hessian = problem(9, 36)
    weight[4] *= 30  # a row that deserves more bits
    weight[7] /= 30
    spec = replace(SPEC, group_size=group_size, symmetric=True)
    found = solve_row_bits(weight, hessian, spec, mean_bits=4, order=order)
    assert found.bits.sum() <= 4 * 9
    assert found.bits[4] > 4 > found.bits[7]
    for row, bits in enumerate(found.bits.tolist()):
        alone = solve(weight, hessian, replace(spec, bits=bits), order=order)
        equal(found.codes[row], alone.codes[row])
        equal(found.scale[row], alone.scale[row])
        equal(found.zero_point[row], alone.zero_point[row])
        equal(found.report.row_error[row], alone.report.row_error[row])
        equal(found.dequantize()[row], alone.dequantize()[row])
    uniform = solve(weight, hessian, spec, order=order)
    assert found.report.error < uniform.report.error
    torch.testing.assert_close(found.report.error, layer_error(weight, found.dequantize(), hessian))


def test_rows_are_the_best_of_all_choices() -> None:
    weight, hessian = problem(5, 20)
    weight *= torch.tensor([1.0, 4, 0.2, 2, 1])[:, None]
    widths = (2, 3, 5)
    errors = torch.stack(
        [solve(weight, hessian, QuantSpec(bits)).report.row_error for bits in widths], 1
    )
    for mean in (2, 2.4, 3.2, 5):
        found = solve_row_bits(weight, hessian, SPEC, mean_bits=mean, bits=widths)
        best = min(
            sum(float(errors[row, place]) for row, place in enumerate(places))
            for places in itertools.product(range(3), repeat=5)
            if sum(widths[place] for place in places) <= mean * 5
        )
        assert sum(found.report.row_error.tolist()) == best


def test_rows_of_a_batch_share_the_budget() -> None:
    weights, hessians = zip(*(problem(4, 12, seed) for seed in range(3)), strict=True)
    weight, hessian = torch.stack(weights), torch.stack(hessians)
    weight[1] *= 20
    found = solve_row_bits(weight, hessian, SPEC, mean_bits=3.5)
    assert found.bits.shape == (3, 4) and found.bits.sum() <= 3.5 * 12
    assert found.bits[1].min() > found.bits[[0, 2]].max()
    for b in range(3):
        for r in range(4):
            alone = solve(weight, hessian, QuantSpec(int(found.bits[b, r])))
            equal(found.codes[b, r], alone.codes[b, r])
    equal(found.dequantize(), dequantize(found.codes, found.scale, found.zero_point))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_bits": 1.5}, r"mean_bits 1\.5 is too small: 2 is the least possible"),
        ({"mean_bits": "4"}, "mean_bits must be a positive number"),
        ({"mean_bits": 4, "bits": [1, 4]}, "bits must be an integer from 2 to 8, got 1"),
        ({"mean_bits": 4, "bits": []}, "bits is empty"),
        ({"mean_bits": 4, "order": "best"}, "order must be one of"),
    ],
)
def test_bad_row_bits(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_row_bits(*problem(3, 8), SPEC, **options)


def test_rows_of_several_solves_keep_a_pattern_and_no_share() -> None:
    weight, hessian = problem(6, 16)
    found = solve_row_bits(weight, hessian, replace(SPEC, sparsity="2:4"), mean_bits=4)
    assert len(set(found.bits.tolist())) > 1
    assert ((found.dequantize() == 0).unflatten(1, (-1, 4)).sum(2) >= 2).all()
    with pytest.raises(ValueError, match=r"sparsity 0\.5 is a share of the whole matrix"):
        solve_row_bits(weight, hessian, replace(SPEC, sparsity=0.5), mean_bits=4)


# --- columns --------------------------------------------------------------------------------------


def schur(hessian: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Other columns, H_oo - H_oe H_ee^-1 H_eo, and H_oe H_ee^-1: literally, float64."""
    h = hessian.double()
    others = torch.tensor([c for c in range(len(h)) if c not in kept.tolist()])
    inverse = torch.linalg.inv(h[kept][:, kept])
    coupling = h[others][:, kept] @ inverse
    return others, h[others][:, others] - coupling @ h[kept][:, others], coupling


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("criterion", ["activation", "sensitivity"])
def test_kept_columns_against_literal_algebra(criterion: Any, symmetric: bool, damp: float) -> None:
    weight, given = problem(7, 40)
    given = given.double()
    hessian = given + damp * given.diagonal().mean() * torch.eye(40)
    spec = replace(SPEC, symmetric=symmetric)
    found = solve_float_columns(
        weight, given, spec, count=5, criterion=criterion, dtype=torch.float32, damp=damp,
        order="natural",
    )  # fmt: skip
    if criterion == "activation":
        rank = hessian.diagonal()
    else:
        rounded = solve(weight, hessian, spec, order="nearest").dequantize()
        rank = (weight - rounded).square().sum(0) / torch.linalg.inv(hessian).diagonal()
    equal(found.columns, rank.topk(5).indices.sort().values)

    others, rest, coupling = schur(hessian, found.columns)
    _, scale, zero_point = ops.quantize_groups(
        weight[:, others][None], 35, spec.qmax, symmetric, spec.shrink
    )
    reduced = solve(
        weight[:, others], rest, spec, order="natural", damp=0.0, scale=scale[0],
        zero_point=zero_point[0],
    )  # fmt: skip
    equal(found.scale, scale[0])
    equal(found.zero_point, zero_point[0])
    equal(found.codes[:, others], reduced.codes)
    equal(found.codes[:, found.columns].float(), zero_point[0].expand(-1, 5))

    lost = (weight[:, others] - reduced.dequantize()).double()
    kept = weight[:, found.columns] + lost @ coupling
    torch.testing.assert_close(found.kept.double(), kept, rtol=1e-5, atol=1e-6)
    quantized = found.dequantize()
    equal(quantized[:, others], reduced.dequantize())
    equal(quantized[:, found.columns], found.kept)
    # optimal: no gradient with respect to a kept weight, and the error is that of the rest alone
    error = (weight - quantized).double()
    slope = error @ hessian
    assert slope[:, found.columns].abs().max() < 1e-5 * slope.abs().max()
    alone = torch.einsum("rc,cd,rd->r", lost, rest, lost)
    torch.testing.assert_close((error * slope).sum(1), alone, rtol=1e-4, atol=0)
    literal = torch.einsum("rc,cd,rd->r", error, given, error)
    torch.testing.assert_close(found.report.row_error, literal, rtol=1e-5, atol=0)
    assert found.report.damp == damp


def scaled(hessian: Tensor, column: int, factor: float) -> Tensor:
    """An input that is larger by this factor."""
    size = torch.ones(len(hessian))
    size[column] = factor
    return size[:, None] * hessian * size


def test_kept_columns_compensate() -> None:
    weight, hessian = problem(8, 48)
    hessian = scaled(hessian, 11, 20)
    plain = solve(weight, hessian, SPEC)
    found = solve_float_columns(weight, hessian, SPEC, count=1)
    assert found.columns.tolist() == [11]
    assert found.report.error < plain.report.error / 2
    assert found.kept.dtype == torch.float16
    assert found.mean_bits == (4 * 47 + 16) / 48
    torch.testing.assert_close(found.report.error, layer_error(weight, found.dequantize(), hessian))
    more = solve_float_columns(weight, hessian, SPEC, count=12)
    assert more.report.error < found.report.error


def test_kept_columns_in_groups_and_batches() -> None:
    weights, hessians = zip(*(problem(6, 24, seed) for seed in range(2)), strict=True)
    weight = torch.stack(weights)
    hessian = torch.stack([scaled(hessians[0], 3, 20), scaled(hessians[1], 20, 20)])
    spec = replace(SPEC, group_size=8)
    found = solve_float_columns(weight, hessian, spec, count=2, damp=0.02)
    assert found.columns.shape == (2, 2) and found.kept.shape == (2, 6, 2)
    assert 3 in found.columns[0].tolist() and 20 in found.columns[1].tolist()
    for b in range(2):
        alone = solve_float_columns(weight[b], hessian[b], spec, count=2, damp=0.02)
        equal(found.columns[b], alone.columns)
        equal(found.codes[b], alone.codes)
        equal(found.scale[b], alone.scale)
        torch.testing.assert_close(found.kept[b], alone.kept, rtol=1e-3, atol=1e-3)
    shared = solve_float_columns(weight, hessian[0], spec, count=2)
    assert shared.columns.shape == (2, 2) and shared.report.row_error.shape == (2, 6)
    torch.testing.assert_close(
        shared.report.error, layer_error(weight, shared.dequantize(), hessian[0])
    )


def test_dead_columns_and_a_singular_hessian() -> None:
    weight, hessian = problem(5, 30)
    hessian[:, 7] = hessian[7] = 0
    found = solve_float_columns(weight, hessian, SPEC, count=3, criterion="activation")
    assert found.dequantize().isfinite().all()
    assert found.report.dead_columns == 1 and not found.report.fallback
    assert solve_float_columns(weight, hessian, SPEC, count=3, damp=0.0).report.damp == 0
    weight, hessian = ill_conditioned(5, 40)
    hessian -= 0.5 * hessian.diagonal().mean() * torch.eye(40)  # not positive definite
    hessian.diagonal().clamp_(min=1e-3)
    found = solve_float_columns(weight, hessian, SPEC, count=3)
    assert found.report.damp > 0.01 and found.dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be an integer from 1 to 7, got 0"),
        ({"count": 8}, "count must be an integer from 1 to 7, got 8"),
        ({"count": True}, "count must be an integer from 1 to 7, got True"),
        ({"count": 1, "criterion": "size"}, "criterion must be one of"),
        ({"count": 1, "dtype": torch.int8}, "dtype must be torch.float16"),
        ({"count": 1, "damp": -1}, "damp must be a finite number"),
        ({"count": 1, "order": "best"}, "order must be one of"),
        ({"count": 1, "sweeps": -1}, "sweeps must be an integer"),
    ],
)
def test_bad_float_columns(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_float_columns(*problem(3, 8), SPEC, **options)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_kept_columns_have_no_part_in_a_sparsity(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=f"sparsity must be None .*, got {sparsity}"):
        solve_float_columns(*problem(3, 8), replace(SPEC, sparsity=sparsity), count=1)


def test_kept_columns_beside_a_given_grid() -> None:
    weight, hessian = problem(3, 12)
    grid = dict(scale=torch.full((3, 1), 0.3), zero_point=torch.full((3, 1), 7.0), window=3)
    found = solve_float_columns(weight, hessian, SPEC, count=2, **grid)
    assert (found.scale == 0.3).all() and (found.zero_point == 7).all()
    torch.testing.assert_close(found.report.error, layer_error(weight, found.dequantize(), hessian))
    with pytest.raises(ValueError, match="window must be a divisor of 12 columns, got 5"):
        solve_float_columns(weight, hessian, SPEC, count=2, window=5)


def test_kept_weight_beyond_its_dtype() -> None:
    weight, hessian = problem(3, 8)
    weight[:, 2] = 1e6
    hessian = scaled(hessian, 2, 100)
    with pytest.raises(ValueError, match=r"kept weights reach 1e\+06, beyond torch\.float16"):
        solve_float_columns(weight, hessian, SPEC, count=1)
    kept = solve_float_columns(weight, hessian, SPEC, count=1, dtype=torch.bfloat16).kept
    assert kept.isfinite().all()


def test_hessian_that_no_damping_helps() -> None:
    weight, hessian = problem(3, 8)
    hessian = hessian - 1e9 * (1 - torch.eye(8))
    with pytest.raises(ValueError, match="not positive definite, damped by up to 100"):
        solve_float_columns(weight, hessian, SPEC, count=1)
