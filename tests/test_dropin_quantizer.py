"""Grids with the interface of the published Quantizer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sapq_triton import QuantSpec, solve
from sapq_triton.dropin import Quantizer


def configured(*args: Any, **kwargs: Any) -> Quantizer:
    quantizer = Quantizer()
    quantizer.configure(*args, **kwargs)
    return quantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_its_grid_is_ours(bits: int, sym: bool) -> None:
    weight = torch.randn(7, 24)
    quantizer = configured(bits, perchannel=True, sym=sym)
    quantizer.find_params(weight, weight=True)
    spec = QuantSpec(bits, symmetric=sym, scale_search="absmax")
    ours = solve(weight, torch.eye(24), spec, order="nearest")
    torch.testing.assert_close(quantizer.scale, ours.scale, rtol=1e-6, atol=0)
    assert torch.equal(quantizer.zero, ours.zero_point)
    torch.testing.assert_close(quantizer.quantize(weight), ours.dequantize())


def test_symmetric_rows_without_negative_weights_are_not_cut_off() -> None:
    weight = torch.rand(3, 8)
    quantizer = configured(4, perchannel=True, sym=True)
    quantizer.find_params(weight, weight=True)
    assert torch.equal(quantizer.scale[:, 0], 2 * weight.amax(1) / 15)
    assert ((quantizer.quantize(weight) - weight).abs() <= quantizer.scale / 2 + 1e-6).all()


def test_rows_of_zeros_and_whole_layers() -> None:
    weight = torch.randn(4, 6)
    weight[2] = 0
    quantizer = configured(4, perchannel=True, sym=False)
    quantizer.find_params(weight, weight=True)
    assert quantizer.scale[2, 0] == torch.tensor(2 / 15)
    assert torch.equal(quantizer.quantize(weight)[2], torch.zeros(6))
    quantizer = configured(4, sym=False)
    quantizer.find_params(weight, weight=True)
    assert quantizer.scale.shape == (4, 1)
    assert (quantizer.scale == (weight.max() - weight.min()) / 15).all()


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("sym", [True, False])
def test_mse_search_finds_the_least_error(norm: float, sym: bool) -> None:
    weight = torch.randn(5, 40)
    options: dict[str, Any] = dict(perchannel=True, sym=sym)
    full, searched = configured(3, **options), configured(3, **options, mse=True, norm=norm)
    for quantizer in (full, searched):
        quantizer.find_params(weight, weight=True)

    def error(scale: Tensor) -> Tensor:
        code = ((weight / scale).round() + full.zero).clamp(0, 7)
        return ((code - full.zero) * scale - weight).abs().pow(norm).sum(1)

    trials = torch.stack([error(full.scale * (1 - step / 100)) for step in range(80)])
    torch.testing.assert_close(error(searched.scale), trials.amin(0))
    assert (searched.scale < full.scale).any()


def test_activations() -> None:
    images = torch.randn(2, 3, 4, 5)
    quantizer = configured(8, perchannel=True, sym=False)
    quantizer.find_params(images)
    assert quantizer.scale.shape == (1, 3, 1, 1)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    torch.testing.assert_close(quantizer.scale.flatten(), (high - low) / 255)
    for shape, expected in (((6, 3), (1, 3)), ((2, 6, 3), (1, 1, 3))):
        quantizer.find_params(torch.randn(shape))
        assert quantizer.scale.shape == expected


def test_states() -> None:
    quantizer = Quantizer()
    assert not quantizer.enabled() and not quantizer.ready()
    with pytest.raises(ValueError, match="configure"):
        quantizer.find_params(torch.ones(1, 1), weight=True)
    quantizer.configure(4)
    x = torch.randn(2, 3)
    assert quantizer.enabled() and torch.equal(quantizer.quantize(x), x)
    quantizer.find_params(x, weight=True)
    assert quantizer.ready() and not torch.equal(quantizer.quantize(x), x)
    assert set(quantizer.state_dict()) == {"maxq", "scale", "zero"}


def test_trits() -> None:
    weight = torch.tensor([[-1.0, -0.4, 0.3, 2.0]])
    quantizer = configured(2, perchannel=True, sym=False, trits=True)
    quantizer.find_params(weight, weight=True)
    assert torch.equal(quantizer.quantize(weight), torch.tensor([[-1.0, 0.0, 0.0, 2.0]]))
    assert not quantizer.enabled()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1},
        {"bits": 4, "grid": 0},
        {"bits": 4, "grid": math.nan},
        {"bits": 4, "norm": 0},
        {"bits": 4, "norm": math.nan},
        {"bits": 4, "norm": math.inf},
    ],
)
def test_bad_configurations(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        configured(**arguments)
