"""Scales as they are stored: exactly reproduced, and rounded before the solver compensates."""

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, quantize, solve
from sapq_triton.packed import QuantLinear, pack_weight
from sapq_triton.result import row_errors
from sapq_triton.scales import snapped
from sapq_triton.spec import Order, ScaleDtype
from tests.test_solver import (
    ORDERS,
    Grid,
    assert_same,
    damped,
    ill_conditioned,
    problem,
    rounding_error,
)  # fmt: skip

GRIDS = {
    "symmetric": QuantSpec(3, 6, symmetric=True),
    "asymmetric": QuantSpec(3, 6),
    "nf4": QuantSpec(4, 6, symmetric=True, codebook="nf4"),
    "fp4": QuantSpec(4, 6, symmetric=True, codebook="fp4"),
}
ON = pytest.mark.parametrize("grid", GRIDS)


def with_scales(spec: QuantSpec, scale_dtype: ScaleDtype) -> QuantSpec:
    options = {name: getattr(spec, name) for name in ("bits", "group_size", "symmetric")}
    return QuantSpec(**options, codebook=spec.codebook, scale_dtype=scale_dtype)


def is_power_of_two(scale: Tensor) -> bool:
    return bool((scale.frexp()[0] == 0.5).all())


@ON
def test_powers_of_two_have_the_lesser_error(grid: str) -> None:
    weight, hessian = problem(40, 36)
    exact = solve(weight, hessian, GRIDS[grid], order="nearest")
    spec = with_scales(GRIDS[grid], "power-of-two")
    result = solve(weight, hessian, spec, order="nearest")
    assert is_power_of_two(result.scale)
    ratio = result.scale / exact.scale
    assert 0.5 < ratio.min() < 0.9 and 1.2 < ratio.max() < 2  # either one is chosen at times
    other = torch.where(ratio < 1, 2, 0.5) * result.scale
    errors = []
    for scale in (result.scale, other):
        each = solve(
            weight, hessian, GRIDS[grid], order="nearest", scale=scale, zero_point=exact.zero_point
        )
        errors.append((weight - each.dequantize()).double().square().unflatten(1, (6, 6)).sum(2))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


def test_powers_of_two_at_the_ends() -> None:
    """What is one already stays; float32 ends, and its subnormal numbers are none."""
    scale = torch.tensor([0.25, 1.0, 2.0**-126, 1e-40, 2.0**127, 3e38])
    weight = torch.ones(1, len(scale), 1) * scale[:, None]
    spec = QuantSpec(4, scale_dtype="power-of-two", symmetric=True)
    found = snapped(scale.view(1, -1, 1), weight, torch.full((1, len(scale), 1), 8.0), spec)
    assert found.flatten().tolist() == [0.25, 1.0, 2.0**-126, 2.0**-126, 2.0**127, 2.0**127]


def stored(scale: Tensor) -> tuple[Tensor, Tensor]:
    """What a file holds of scales [R, G]: uint8 [R, G], float16 [R]"""
    largest = scale.amax(1)
    return (scale / largest[:, None] * 256 - 1).to(torch.uint8), largest.half()


@ON
def test_uint8_scales_are_reproduced_from_what_is_stored(grid: str) -> None:
    weight, hessian = problem(20, 36)
    weight *= torch.logspace(-6, 3, 20)[:, None]  # half the rows have subnormal numbers of float16
    weight[3, 6:12], weight[4] = 0, 0
    exact = solve(weight, hessian, GRIDS[grid]).scale
    scale = solve(weight, hessian, with_scales(GRIDS[grid], "uint8")).scale
    steps, largest = stored(scale)
    assert_same((steps.float() + 1) / 256 * largest.float()[:, None], scale)
    assert (steps.amax(1) == 255).all()
    assert scale[4].eq(1).all()
    assert scale[3, 1] == scale[3].max()  # zeros need no scale, and leave the others theirs
    kept = torch.ones_like(scale, dtype=torch.bool)
    kept[3, 1] = False
    top = exact.where(kept, 0).amax(1, keepdim=True)
    assert_same(largest, top[:, 0].half().clamp(min=2.0**-24))
    wide = (top[:, 0] > 2.0**-14)[:, None] & kept
    assert wide.sum() > 50
    assert ((scale - exact).abs() / top)[wide].max() < 0.5 / 256 + 2.0**-11


def test_one_group_has_a_float16_scale() -> None:
    weight, hessian = problem(5, 12)
    result = solve(weight, hessian, QuantSpec(4, scale_dtype="uint8"))
    assert_same(result.scale, solve(weight, hessian, QuantSpec(4, scale_dtype="float16")).scale)


def test_scales_beyond_float16_are_refused() -> None:
    weight, hessian = problem(5, 12)
    with pytest.raises(ValueError, match=r"scales reach .*, beyond float16; choose another"):
        solve(weight * 1e6, hessian, QuantSpec(4, 6, scale_dtype="uint8"))
    assert solve(weight * 1e6, hessian, QuantSpec(4, 6, scale_dtype="power-of-two")).scale.max() > 1


@ON
@pytest.mark.parametrize("scale_dtype", ["power-of-two", "uint8"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_solver_compensates_rounded_scales(
    order: Order, scale_dtype: ScaleDtype, grid: str
) -> None:
    """The codes are those of an external grid that was rounded so."""
    weight, hessian = ill_conditioned(6, 24)
    spec = with_scales(GRIDS[grid], scale_dtype)
    result = solve(weight, hessian, spec, order=order, block=8)
    given = {"scale": result.scale, "zero_point": result.zero_point}
    expected = solve(weight, hessian, GRIDS[grid], order=order, block=8, **given)
    assert_same(result.codes, expected.codes)
    assert result.report.error < rounding_error(weight, hessian, result)
    assert_same(result.dequantize().double(), Grid.of(result).value(result.codes).float().double())
    batch = solve(weight.repeat(2, 1, 1), hessian, spec, order=order, block=8)
    assert_same(batch.scale[1], result.scale)


@ON
@pytest.mark.parametrize("scale_dtype", ["power-of-two", "uint8"])
def test_refitted_scales_stay_what_is_stored(scale_dtype: ScaleDtype, grid: str) -> None:
    weight, hessian = problem(12, 24)
    spec = with_scales(GRIDS[grid], scale_dtype)
    result = solve(weight, hessian, spec, candidates=4, rounds=2)
    plain = solve(weight, hessian, spec)
    errors = [row_errors(weight, damped(hessian), x.dequantize()) for x in (plain, result)]
    assert (errors[1] <= errors[0]).all()
    if scale_dtype == "power-of-two":  # too coarse for a refit to change many
        assert is_power_of_two(result.scale)
    else:
        assert (result.scale != plain.scale).any() and (errors[1] < errors[0]).any()
        steps, largest = stored(result.scale)
        assert_same((steps.float() + 1) / 256 * largest.float()[:, None], result.scale)


@pytest.mark.parametrize(
    "spec, size",  # 60 weights, 12 scales in 6 rows
    [
        (QuantSpec(4, 5, scale_dtype="float16"), 30 + 24 + 6),
        (QuantSpec(4, 5, scale_dtype="power-of-two"), 30 + 12 + 6),
        (QuantSpec(4, 5, symmetric=True, scale_dtype="uint8"), 30 + 12 + 6 * 2),
        (QuantSpec(4, 5, symmetric=True, codebook="fp4", scale_dtype="power-of-two"), 30 + 12),
    ],
)
def test_bytes_of_a_layer(spec: QuantSpec, size: int) -> None:
    report = quantize(nn.Linear(10, 6), [torch.randn(20, 10)], spec, progress=False)
    assert report.layers[0].bytes == size


@pytest.mark.parametrize("scale_dtype", ["power-of-two", "uint8"])
def test_packed_layers_hold_floating_point_scales(scale_dtype: ScaleDtype) -> None:
    spec = QuantSpec(4, 6, scale_dtype=scale_dtype)
    message = f"packed layers hold scales of float32, float16 or bfloat16, not .*'{scale_dtype}'"
    result = solve(*problem(6, 24), spec)
    with pytest.raises(ValueError, match=message):
        pack_weight(result.codes, result.scale, result.zero_point, spec)
    with pytest.raises(ValueError, match=message):
        QuantLinear(24, 6, spec=spec)
    with pytest.raises(ValueError, match=message):
        quantize(nn.Linear(24, 6), [torch.randn(9, 24)], spec, pack=True)
