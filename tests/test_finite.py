"""NaN and Inf at every entrance: a ValueError names what holds them, and nothing is changed."""

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, error_curves, solve
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.calibrate import collect_hessians
from sapq_triton.dropin import GPTQ, TrueOBS
from sapq_triton.hessian import HessianSum
from sapq_triton.result import row_errors

SPEC = QuantSpec(4)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False)
NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """An embedding or numbers in; a layer, a BatchNorm, a layer whose output is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if not x.is_floating_point():
            x = self.table(x)
        y = self.first(x)
        return self.last(self.norm(y.flatten(0, -2)).relu().view_as(y))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def refuse(model: nn.Module, batches: Any, message: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize(model, batches, SPEC, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)), name


def batches(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*(shape or (32, 8)), generator=generator) for _ in range(3)]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean",
             "norm.running_var"],
)  # fmt: skip
def test_parameters_and_statistics(name: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.state_dict()[name][3] = value
    layer, part = name.split(".")
    refuse(model, batches(), f"the {part} of '{layer}' holds NaN or Inf")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_batch(number: int) -> None:
    inputs = batches()
    inputs[number][5, 2] = NAN
    refuse(net(), inputs, "the input of 'first' holds NaN or Inf during calibration")


def test_an_embedding_of_integers() -> None:
    model = net()
    with torch.no_grad():
        model.table.weight[3] = NAN
    tokens = torch.arange(10).expand(4, 10)
    refuse(model, [tokens], "the input of 'first' holds NaN or Inf")
    quantize(model, [tokens.clamp(min=4)], SPEC)  # what no batch asks for may be anything


def test_padding_may_hold_anything_and_the_mask_may_not() -> None:
    model, tokens = net(), torch.arange(10).expand(4, 10)
    with torch.no_grad():
        model.table.weight[3] = NAN
    model.norm = nn.Identity()  # would spread it
    mask = (tokens != 3).float()
    quantize(model, [{"x": tokens, "attention_mask": mask}], SPEC)
    for value in (NAN, -INF):
        bad = mask.clone()
        bad[0, 0] = value
        batch = {"x": tokens, "attention_mask": bad}
        refuse(net(), [batch], "the attention_mask of a batch holds NaN or Inf; it must hold 0")


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("dtype, large", [(torch.float16, 1e4), (torch.bfloat16, 3e38)])
def test_an_output_that_overflows(which: str, dtype: torch.dtype, large: float) -> None:
    """The input is finite, and where the layer is the last, no other layer would ever see it."""
    model = net().to(dtype)
    with torch.no_grad():
        model.get_submodule(which).weight.fill_(large)
        model.get_submodule(which).bias.fill_(large)
        if which == "last":
            model.norm.bias.fill_(20)
    inputs = [x.abs().add(9).to(dtype) for x in batches()]
    message = f"the output of '{which}' holds NaN or Inf during calibration, in {dtype}"
    refuse(model, inputs, re.escape(message))


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_inputs_whose_squares_overflow(preset: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inputs = [x * 1e20 for x in batches()]
    message = "the Hessian of '0' holds NaN or Inf: one of its inputs does, or is so large that "
    refuse(model, inputs, message + "sums of squares overflow float32", preset=preset)
    with pytest.raises(ValueError, match=message):
        collect_hessians(model, inputs)
    with pytest.raises(ValueError, match=message):
        error_curves(model, inputs, SPEC)


def test_statistics_whose_squares_overflow() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with torch.no_grad():
        model[0].weight.mul_(1e20)
    for rule in ("paired", "reestimate"):
        refuse(model, batches(), "the running_.* of '1' holds NaN or Inf", batchnorm=rule)


def test_a_quantized_weight_that_its_dtype_cannot_hold() -> None:
    """A grid may reach beyond the largest weight, which float16 just holds."""
    model = nn.Sequential(nn.Linear(64, 4, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-65504, 65504, 256).view(4, 64).flip(1))
    inputs = [torch.randn(64, 64).mul(1e-4).half()]
    spec = QuantSpec(2, symmetric=True, scale_search="absmax")
    with pytest.raises(ValueError, match="the weight of '0' holds NaN or Inf, once quantized"):
        quantize(model, inputs, spec, candidates=1, rounds=0)
    assert model[0].weight.isfinite().all()


def test_the_full_precision_model_beside_the_quantized_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its copy alone has become wrong: what the drift would be measured against."""
    run: Any = sys.modules["sapq_triton.quantize"]  # the package has the function of that name

    def spoiled(model: nn.Module) -> nn.Module:
        other = copied(model)
        with torch.no_grad():
            other.first.bias[0] = NAN
        return other

    copied = run._copied
    monkeypatch.setattr(run, "_copied", spoiled)
    refuse(net(), batches(), "the input of 'last' in the full-precision model holds NaN or Inf")


def test_hessians_of_single_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inputs = batches()
    inputs[1][0, 0] = NAN
    with pytest.raises(ValueError, match="the input of '0' holds NaN or Inf"):
        collect_hessians(model, inputs)
    with pytest.raises(ValueError, match="the output of the full-precision model holds NaN or Inf"):
        error_curves(model, inputs, SPEC)
    total = HessianSum(1, 8, drift=True)
    total.add(inputs[0])
    total.check("any")
    total.add_drift(inputs[0], inputs[1])
    with pytest.raises(ValueError, match="the Hessian of 'any' holds NaN or Inf"):
        total.check("any")


@pytest.mark.parametrize("published", [GPTQ, TrueOBS])
@pytest.mark.parametrize("compat", [False, True])
def test_dropins(published: type[GPTQ], compat: bool) -> None:
    layer = nn.Linear(8, 8)
    task = published(layer, compat=compat)
    with pytest.raises(ValueError, match="the input of this Linear holds NaN or Inf"):
        task.add_batch(torch.full((4, 8), NAN))
    huge = 1e20 if published is GPTQ else 1e38  # TrueOBS sums in float64
    assert not task.H.any() and task.nsamples == 0
    if published is GPTQ:
        with pytest.raises(ValueError, match=r"X\^T X of this Linear holds NaN or Inf"):
            task.add_batch(torch.full((4, 8), huge))
        assert not task.H.any() and task.nsamples == 0
    task.add_batch(batches()[0])
    with torch.no_grad():
        layer.weight[0, 0] = INF
    task.quantizer.configure(4, perchannel=True, sym=False)
    with pytest.raises(ValueError, match="the weight of this Linear holds NaN or Inf"):
        task.fasterquant() if isinstance(task, GPTQ) else task.quantize()


def test_errors_beyond_float32_are_measured() -> None:
    weight, hessian = torch.randn(4, 8) * 1e15, torch.eye(8) * 1e12
    exact = (weight.double().square() * 1e12).sum(1)
    torch.testing.assert_close(row_errors(weight, hessian), exact, rtol=1e-6, atol=0)
    report = solve(weight, hessian, SPEC).report
    assert report.error.isfinite() and 0 < report.relative_error < 0.1


@pytest.mark.parametrize("order", ["sensitivity", "activation", "obq"])
@pytest.mark.parametrize("exponent", [-1000, -200, -100, 100, 200, 900])
def test_hessians_in_float64_beyond_float32(order: Any, exponent: int) -> None:
    """Their size means nothing; it used to make every problem one that no damping solves."""
    x, weight = torch.randn(64, 16, dtype=torch.float64), torch.randn(8, 16)
    hessian = x.T @ x / 32
    options: dict[str, Any] = {} if order == "obq" else dict(candidates=4, rounds=2)
    expected = solve(weight, hessian, SPEC, order=order, **options)
    found = solve(weight, hessian * 2.0**exponent, SPEC, order=order, **options)
    assert not found.report.fallback and found.report.damp == expected.report.damp
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("name", ["weight", "hessian", "scale", "zero_point"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_solve(name: str, value: float) -> None:
    good: dict[str, Tensor] = dict(
        weight=torch.randn(4, 8), hessian=torch.eye(8), scale=torch.ones(4, 1),
        zero_point=torch.ones(4, 1),
    )  # fmt: skip
    solve(spec=SPEC, **good)
    good[name][1, 0] = value
    if name == "hessian":
        good[name][0, 1] = value
    with pytest.raises(ValueError, match=name):
        solve(spec=SPEC, **good)


def test_calibration_arrays() -> None:
    pytest.importorskip("onnx")
    from onnx import helper

    from sapq_triton.formats.onnx_calibration import calibration_batches

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "test",
        [helper.make_tensor_value_info("x", 1, (None, 2))],
        [helper.make_tensor_value_info("y", 1, (None, 2))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    for value in (NAN, INF, 1e300):  # the last is finite in float64 alone
        with pytest.raises(ValueError, match="input 'x' holds NaN or Inf in float32"):
            calibration_batches(model, np.array([[1.0, value]]))
