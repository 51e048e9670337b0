"""Damping and drift correction, chosen on rows that are held out."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, solve
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.hessian import HessianSum, drifted
from sapq_triton.regularize import DAMPS, Moments, choose, excess
from sapq_triton.solving import DAMP, DRIFT_CORRECTION

SPEC = QuantSpec(4)
quantize: Any = partial(quantize_with_bar, progress=False)


def moments(x: Tensor, y: Tensor | None = None) -> Moments:
    """x, y: rows [n, C], float64"""
    n = len(x)
    drift = None if y is None else (2 / n * x.T @ (y - x))[None]
    return Moments((2 / n * x.T @ x)[None], drift)


def rows(n: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """Rows of which `rank` directions repeat, and `noise` in all."""
    fixed = torch.Generator().manual_seed(99)
    basis = torch.randn(rank, columns, generator=fixed).double()
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=random).double() @ basis
    return x + noise * torch.randn(n, columns, generator=random).double()


def test_excess_is_the_error_of_outputs_but_for_a_constant() -> None:
    x, y = torch.randn(2, 50, 6, dtype=torch.float64)
    weight, a, b = torch.randn(3, 1, 4, 6, dtype=torch.float64)

    def error(quantized: Tensor) -> Tensor:
        return 2 / 50 * (x @ quantized[0].T - y @ weight[0].T).square().sum()

    found = [excess(weight, q, moments(x, y)) for q in (a, b, weight)]
    expected = [float(error(q)) for q in (a, b, weight)]
    assert found[2] == 0
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1])
    assert found[0] == pytest.approx(expected[0] - expected[2])
    plain = excess(weight, a, moments(x))
    assert plain == pytest.approx(float(2 / 50 * (x @ (a - weight)[0].T).square().sum()))


@pytest.mark.parametrize("n, expected", [(20, {0.3, 1.0}), (4000, {0.01, 0.03})])
def test_few_rows_are_trusted_less(n: int, expected: set[float]) -> None:
    """40 columns: 20 rows of wide noise say little of other rows, 4000 say nearly all."""
    weight = torch.randn(1, 16, 40)
    fit, held_out = rows(n, 40, 3, 1.0, seed=1), rows(4000, 40, 3, 1.0, seed=2)
    trust = choose(weight, moments(fit), moments(held_out), SPEC)
    assert trust.damp in expected
    assert trust.fraction == 0


def test_damping_is_the_best_of_those_tried() -> None:
    weight = torch.randn(1, 16, 40)
    fit, held_out = (moments(rows(n, 40, 3, 0.5, seed=n)) for n in (60, 500))
    errors = {
        damp: excess(
            weight,
            solve(weight, fit.hessian, SPEC, order="activation", damp=damp).dequantize(),
            held_out,
        )
        for damp in DAMPS
    }
    assert choose(weight, fit, held_out, SPEC).damp == min(errors, key=lambda d: errors[d])


def test_fraction_is_where_the_error_on_other_rows_is_least() -> None:
    x, z = rows(80, 12, 12, 0.5, seed=1), rows(400, 12, 12, 0.5, seed=2)
    weight = torch.randn(1, 5, 12)
    noisy = [t + 0.4 * torch.randn_like(t) + 0.1 * t for t in (x, z)]
    fit, held_out = moments(noisy[0], x), moments(noisy[1], z)
    trust = choose(weight, fit, held_out, SPEC)
    assert 0 < trust.fraction < 1
    assert fit.drift is not None

    def error(damp: float, fraction: float) -> float:
        return excess(weight, drifted(weight, fit.hessian, fit.drift, damp, fraction), held_out)  # type: ignore[arg-type]

    least = error(trust.ridge, trust.fraction)
    assert least < 0
    tried = [error(damp, step / 20) for damp in DAMPS for step in range(21)]
    assert least <= min(tried) + 1e-5 * abs(least)


def test_drift_that_other_rows_do_not_have_is_left_alone() -> None:
    x, z = rows(30, 12, 12, 0.5, seed=1), rows(400, 12, 12, 0.5, seed=2)
    fit, held_out = moments(x, x + 0.5 * x[:, :1]), moments(z, z - 0.5 * z[:, :1])
    assert choose(torch.randn(1, 5, 12), fit, held_out, SPEC).fraction == 0


def test_columns_that_never_fire_and_sparsity() -> None:
    x, z = rows(30, 16, 16, 0.5, seed=1), rows(400, 16, 16, 0.5, seed=2)
    x[:, 3] = z[:, 3] = 0
    trust = choose(torch.randn(1, 5, 16), moments(x), moments(z), QuantSpec(4, sparsity="2:4"))
    assert trust.damp in DAMPS


# --- in quantize ----------------------------------------------------------------------------------


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def test_every_fourth_batch_is_held_out_and_counts_in_the_end() -> None:
    net, data = model(), [torch.randn(n, 24) for n in (30, 40, 50, 60, 70, 80)]
    weight = net[0].weight.detach().clone()
    report = quantize(net, data, SPEC, hessian_dtype=torch.float64)
    sums = [HessianSum(1, 24, dtype=torch.float64, drift=True) for _ in range(2)]
    for number, batch in enumerate(data):
        sums[number in (1, 5)].add(batch)
    trust = choose(weight[None], *(Moments(s.hessian(), s.drift()) for s in sums), SPEC)
    assert report["0"].damp == trust.damp
    assert report["0"].rows == 330 and report["0"].drift_correction == 0  # no layer before it
    sums[0].merge(sums[1])
    result = solve(weight, sums[0].hessian()[0], SPEC, damp=trust.damp, candidates=8, rounds=3)
    assert torch.equal(report["0"].codes[0], result.codes)


def test_what_is_given_is_taken() -> None:
    data = [torch.randn(30, 24) for _ in range(4)]
    report = quantize(model(), data, SPEC, damp=0.07, drift_correction=0.25)
    assert [layer.damp for layer in report.layers] == [0.07, 0.07]
    assert [layer.drift_correction for layer in report.layers] == [0.25, 0.25]
    half = quantize(model(), data, SPEC, drift_correction=0.25)
    assert half["2"].damp in DAMPS and half["2"].drift_correction == 0.25
    fast = quantize(model(), data, SPEC, preset="fast")
    assert [(layer.damp, layer.drift_correction) for layer in fast.layers] == [(DAMP, 0.0)] * 2
    nearest = quantize(model(), data, SPEC, order="nearest")
    assert [layer.drift_correction for layer in nearest.layers] == [0.0, 0.0]


def test_one_batch_leaves_nothing_to_choose_on() -> None:
    report = quantize(model(), [torch.randn(60, 24)], SPEC)
    for layer in report.layers:
        assert (layer.damp, layer.drift_correction) == (DAMP, DRIFT_CORRECTION)


def test_layer_that_only_held_out_batches_reach_uses_them() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rarely = nn.Linear(24, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.always(x)
            return self.rarely(y) if len(x) == 41 else y

    data = [torch.randn(n, 24) for n in (30, 41, 50)]
    report = quantize(Branch(), data, SPEC)
    layer = report["rarely"]
    assert (layer.rows, layer.damp, layer.drift_correction) == (41, DAMP, DRIFT_CORRECTION)


def test_few_images_are_trusted_less_in_a_model() -> None:
    """A classifier on pooled features, as at the end of a convolutional network."""
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32))
    x, held_out = torch.randn(40, 256), torch.randn(500, 256)
    expected = net(held_out).detach()
    errors = []
    for options in (dict(damp=0.01), dict()):
        quantized = copy.deepcopy(net)
        quantize(quantized, x.split(10), QuantSpec(3), drift_correction=0.0, **options)
        errors.append((quantized(held_out) - expected).square().sum().item())
    assert errors[1] < 0.9 * errors[0]
