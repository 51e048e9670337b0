"""Asymmetric calibration: layers that aim at the outputs of the full-precision model."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, solve
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.hessian import drifted
from sapq_triton.solving import OTHER_WAYS

SPEC = QuantSpec(bits=3)
PLAIN: dict[str, Any] = dict(
    batchnorm="keep", bias_correction=False, hessian_dtype=torch.float64, starts=1, candidates=1,
    rounds=0,
    damp=0.01,
)  # fmt: skip
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False, **PLAIN)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6)
    ).double()


def batches(sizes: tuple[int, ...] = (40, 17, 60)) -> list[Tensor]:
    mixing = torch.eye(12) + torch.randn(12, 12) / 3
    return [(torch.randn(size, 12) @ mixing).double() for size in sizes]


def literal(model: nn.Sequential, data: list[Tensor], fraction: float) -> dict[str, Tensor]:
    """Layer after layer, on all rows at once: codes by name."""
    x = y = torch.cat(data)
    codes = {}
    with torch.no_grad():
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                weight, n = module.weight, len(x)
                hessian, drift = 2 / n * x.T @ x, 2 / n * x.T @ (y - x)
                aim = drifted(weight.float()[None], hessian[None], drift[None], 0.01, fraction)
                result = solve(aim[0], hessian, SPEC)
                codes[name] = result.codes[None]
                y = y @ weight.T + module.bias
                x = x @ result.dequantize().double().T + module.bias
            else:
                x, y = module(x), module(y)
    return codes


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_each_layer_aims_at_the_full_precision_model(fraction: float) -> None:
    model, data = mlp(), batches()
    expected = literal(model, data, fraction)
    report = quantize(model, data, SPEC, drift_correction=fraction)
    for name, codes in expected.items():
        assert torch.equal(report[name].codes, codes), name
        assert not report[name].notes


def test_drift_of_earlier_layers_is_undone() -> None:
    """Error of the model's output, on rows that did not calibrate."""
    errors = []
    model, data = mlp(), batches((200, 300))
    for fraction in (0.0, 1.0):
        quantized = copy.deepcopy(model)
        quantize(quantized, data[:1], SPEC, drift_correction=fraction)
        with torch.no_grad():
            errors.append((quantized(data[1]) - model(data[1])).square().sum())
    assert errors[1] < 0.9 * errors[0]


class Images(nn.Module):
    """Convolutions, one grouped, a residual, BatchNorm, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = x + F.relu(self.grouped(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_images_with_all_corrections() -> None:
    model, x = Images().eval(), torch.randn(24, 3, 8, 8)
    expected = model(x).detach()
    errors = []
    for fraction in (0.0, 1.0):
        quantized = copy.deepcopy(model)
        report = quantize(
            quantized, x.split(7), QuantSpec(2), drift_correction=fraction, batchnorm="paired",
            bias_correction=True, candidates=2, rounds=1,
        )  # fmt: skip
        assert [layer.notes for layer in report.layers] == [()] * 3
        errors.append((quantized(x) - expected).square().sum().item())
    assert errors[1] < 0.9 * errors[0]


def test_bias_makes_up_for_the_mean_that_rounding_shifts() -> None:
    """Of the weight that was rounded, the one that aims at the full-precision outputs."""
    model, data = mlp(), batches()
    plain = quantize(copy.deepcopy(model), data, SPEC, drift_correction=1.0)
    corrected = copy.deepcopy(model)
    quantize(corrected, data, SPEC, drift_correction=1.0, bias_correction=True)
    x, y = (torch.cat(data) for _ in range(2))
    first, last = model[0], corrected[0]
    assert torch.equal(plain["0"].dequantize()[0].double(), last.weight)  # no drift before it
    lost = (first.weight - last.weight) @ x.mean(0)
    torch.testing.assert_close(last.bias, first.bias + lost)
    with torch.no_grad():
        x, y = corrected[:4](x), model[:4](y)
        n = len(x)
        weight = model[4].weight.float()[None]
        hessian, drift = 2 / n * x.T @ x, 2 / n * x.T @ (y - x)
        aim = drifted(weight, hessian[None], drift[None], 0.01)[0].double()
        expected = model[4].bias + (aim - corrected[4].weight) @ x.mean(0)
        torch.testing.assert_close(corrected[4].bias, expected, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        out: Tensor = self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        return out


def test_padding_counts_in_no_drift() -> None:
    model, ids = Masked(), torch.randint(1, 20, (3, 9))
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1)
    codes = []
    for tokens in (ids, padded):
        quantized = copy.deepcopy(model)
        batch = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
        report = quantize(quantized, [batch], SPEC, drift_correction=1.0)
        codes.append([layer.codes for layer in report.layers])
        assert "solved together" in report["gate"].notes[0]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


class Detour(nn.Module):
    """Takes another way once its first layer has become what it was not."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.weight, self.way = self.first.weight.detach().clone(), way

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        changed = not torch.equal(self.first.weight, self.weight)
        if changed and self.way == "shorter":
            x = x[1:]
        middle = self.right if changed and self.way == "other" else self.left
        out: Tensor = self.last(F.relu(middle(x)))
        return out


@pytest.mark.parametrize("way", ["other", "shorter"])
def test_ways_that_only_one_of_both_models_takes(way: str) -> None:
    model, data = Detour(way), list(torch.randn(3, 15, 6))
    report = quantize(model, data, SPEC, drift_correction=1.0)
    without = quantize(Detour(way), data, SPEC, drift_correction=0.0)
    assert {layer.name for layer in report.layers} == {layer.name for layer in without.layers}
    notes = {layer.name: layer.notes for layer in report.layers}
    assert notes["first"] == ()
    if way == "shorter":
        assert notes["left"] == (OTHER_WAYS,) and notes["last"] == (OTHER_WAYS,)
    else:
        assert notes["right"] == notes["last"] == (OTHER_WAYS,)  # the copy was there before
        assert notes["left"] == ("no calibration row reached it",)
        nearest = solve(model.left.weight, torch.eye(6), SPEC, order="nearest")
        assert report["left"].codes.shape == nearest.codes[None].shape


def test_failure_in_the_copy_leaves_no_trace() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copied = False

        def __deepcopy__(self, memo: Any) -> "Failing":
            twin = Failing()
            twin.copied = True
            return twin

        def forward(self, x: Tensor) -> Tensor:
            if self.copied:
                raise RuntimeError("on purpose")
            return x

    model = nn.Sequential(nn.Linear(6, 5), Failing(), nn.Linear(5, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"):
        quantize(model, list(torch.randn(2, 9, 6)), SPEC, drift_correction=1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert quantize(model, [torch.randn(9, 6)], SPEC, drift_correction=0.0).layers


def test_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 3)
    model.cache = model.weight * 2  # type: ignore[assignment]  # a tensor with a gradient
    with pytest.raises(ValueError, match="pass drift_correction=0"):
        quantize(model, [torch.randn(9, 4)], SPEC, drift_correction=1.0)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "half", float("nan")])
def test_values_that_mean_nothing_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="drift_correction must be a number from 0 to 1, got"):
        quantize(mlp(), batches(), SPEC, drift_correction=value)


# --- presets --------------------------------------------------------------------------------------


def run(**options: Any) -> list[Tensor]:
    torch.manual_seed(5)
    model, data = mlp(), batches()
    report = quantize_with_bar(model, data, SPEC, progress=False, **options)
    return [layer.dequantize() for layer in report.layers]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_presets_are_what_they_say() -> None:
    best = dict(order="sensitivity", sweeps=2, candidates=8, rounds=3)
    fast = dict(order="activation", candidates=1, rounds=0, damp=0.01, drift_correction=0.0)
    assert same(run(), run(preset="best")) and same(run(), run(**best))
    assert same(run(preset="fast"), run(**fast))
    assert not same(run(), run(preset="fast"))


def test_baseline_is_no_better_in_the_best_preset() -> None:
    assert same(run(order="nearest"), run(order="nearest", preset="fast"))


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of \('best', 'fast'\), got 'good'"):
        run(preset="good")
