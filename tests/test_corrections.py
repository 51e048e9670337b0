"""BatchNorm statistics and biases that make up for the rounding of the weights."""

import copy
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from sapq_triton import QuantSpec, Report
from sapq_triton import quantize as quantize_with_bar

SPEC = QuantSpec(bits=3)
# as `solve` by itself
SIMPLE: dict[str, Any] = dict(starts=1, candidates=1, rounds=0, damp=0.01, drift_correction=0.0)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False, **SIMPLE)
# nothing but the weights changes
PLAIN: dict[str, Any] = dict(batchnorm="keep", bias_correction=False, hessian_dtype=torch.float64)
EXACT: dict[str, Any] = dict(rtol=1e-9, atol=1e-12)
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # means are taken of float32 activations


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, one of them depthwise, a residual, and a linear head."""

    def __init__(self, bias: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(6, eps=eps)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias)
        self.norm2 = nn.BatchNorm2d(6, eps=eps)
        self.pointwise = nn.Conv2d(6, 6, 1, bias=bias)
        self.norm3 = nn.BatchNorm2d(6, eps=eps)
        self.down = nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.get_buffer("running_mean"), std=0.3)
            nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        y = F.relu(self.norm2(self.depthwise(x)))
        x = F.relu(x + self.norm3(self.pointwise(y)))
        result: Tensor = self.head(F.relu(self.down(x)).mean((2, 3)))
        return result


def images(count: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 7, 7, dtype=dtype) + torch.linspace(-1, 1, 7, dtype=dtype)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers "0", "2", ... with ReLU between them."""
    modules: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        modules += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def inputs_of(model: nn.Module, name: str, batches: Iterable[Any]) -> list[Tensor]:
    """What a module gets in evaluation mode."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    model.train(was_training)
    hook.remove()
    return seen


def outputs_of(model: nn.Module, name: str, batches: Iterable[Any]) -> Tensor:
    """What an image layer or a linear layer puts out, [rows, channels]."""
    module = model.get_submodule(name)
    with torch.no_grad():
        found = [module(x) for x in inputs_of(model, name, batches)]
    return torch.cat([x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x for x in found])


class TiedPair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inward, self.between = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outward = nn.Linear(6, 6, bias=bias)
        self.outward.weight = self.inward.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outward(F.relu(self.between(F.relu(self.inward(x)))))
        return result


def set_statistics(model: nn.Module, batch: Tensor) -> None:
    """Give every BatchNorm the statistics that it meets on this batch."""

    def note(norm: Any, args: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_paired_batchnorm_restores_the_moments_of_its_output(bias: bool) -> None:
    model, data = ConvNet(bias, eps=1e-12).double(), images()
    set_statistics(model, data)
    original = copy.deepcopy(model)
    quantize(model, data.split(5), SPEC)
    for name in ("norm1", "norm2", "norm3"):
        was, now = (outputs_of(m, name, data.split(5)) for m in (original, model))
        torch.testing.assert_close(now.mean(0), was.mean(0), **CLOSE)
        torch.testing.assert_close(now.var(0), was.var(0), **CLOSE)
        assert not torch.allclose(now, was, rtol=0.01, atol=0.01)


def test_paired_batchnorm_keeps_mean_and_variance_of_its_output() -> None:
    """Also where the running statistics are those of other data."""
    model, data = ConvNet().double(), images().split(5)
    original = copy.deepcopy(model)
    report = quantize(model, data, SPEC)
    original.eval()
    model.eval()
    for name in ("norm1", "norm2", "norm3"):
        (was_var, was), (now_var, now) = (
            torch.var_mean(torch.cat(inputs_of(m, name, data)), (0, 2, 3), correction=0)
            for m in (original, model)
        )
        before, after = original.get_submodule(name), model.get_submodule(name)
        assert isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.BatchNorm2d)
        assert before.running_mean is not None and before.running_var is not None
        scale = (now_var / was_var).sqrt()
        expected = now + (before.running_mean - was) * scale
        torch.testing.assert_close(after.running_mean, expected, **CLOSE)
        torch.testing.assert_close(
            after.running_var + after.eps, before.running_var * scale**2 + after.eps, **CLOSE
        )
        shift = float((after.running_mean - before.running_mean).abs().max())
        assert report.corrected[name] == pytest.approx(shift, abs=1e-6)
        assert report.corrected[name] > 1e-3
        # what all that is for; eps keeps it from being exact
        (out_was_var, out_was), (out_var, out) = (
            torch.var_mean(torch.cat(outputs), (0, 2, 3))
            for outputs in (
                [norm(x) for x in inputs_of(m, name, data)]
                for m, norm in ((original, before), (model, after))
            )
        )
        torch.testing.assert_close(out, out_was, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out_var, out_was_var, rtol=1e-4, atol=1e-4)


def test_channels_without_variance_are_safe() -> None:
    first, norm1, second, norm2 = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )
    model = nn.Sequential(first, nn.ReLU(), norm1, second, norm2)
    with torch.no_grad():
        first.bias[1] = -100  # type: ignore[index]  # dead behind the ReLU
        second.weight[2] = 0
        norm1.get_buffer("running_var")[1] = 0.5
        norm2.get_buffer("running_var")[2] = 0.25
    quantize(model, images(dtype=torch.float32).split(4), SPEC)
    assert norm1.get_buffer("running_mean")[1] == 0
    assert norm1.get_buffer("running_var")[1] == 0.5
    assert norm2.get_buffer("running_var")[2] == 0.25
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_batchnorm_of_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    original, data = copy.deepcopy(model), torch.randn(40, 6).double().split(15)
    report = quantize(model, data, SPEC)
    (was_var, was), (now_var, now) = (
        torch.var_mean(torch.cat(inputs_of(m, "1", data)), 0, correction=0)
        for m in (original, model)
    )
    expected = now - was * (now_var / was_var).sqrt()
    torch.testing.assert_close(model[1].running_mean, expected, **CLOSE)
    assert set(report.corrected) == {"1", "3"}


@pytest.mark.parametrize("bias_correction", [False, True])
def test_keep_leaves_the_statistics(bias_correction: bool) -> None:
    model = ConvNet()
    before = copy.deepcopy(dict(model.named_buffers()))
    report = quantize(
        model,
        [images(dtype=torch.float32)],
        SPEC,
        batchnorm="keep",
        bias_correction=bias_correction,
    )
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert set(report.corrected) == ({"down", "head"} if bias_correction else set())


def test_reestimate_equals_a_plain_average() -> None:
    model, data = ConvNet().double(), images().split(4)
    expected = copy.deepcopy(model)
    quantize(expected, data, SPEC, **PLAIN)
    kept = copy.deepcopy(dict(expected.named_buffers()))
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for batch in data:
            expected(batch)
    report = quantize(model, data, SPEC, **PLAIN | {"batchnorm": "reestimate"})
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, **EXACT)
    for name in ("norm1", "norm2", "norm3"):
        shift = model.get_buffer(f"{name}.running_mean") - kept[f"{name}.running_mean"]
        assert report.corrected[name] == pytest.approx(float(shift.abs().max()))
        norm = model.get_submodule(name)
        assert norm.momentum == 0.1
    assert model.norm1.num_batches_tracked == len(data)


def test_reestimate_spares_what_no_batch_reaches() -> None:
    unused = nn.BatchNorm1d(5)
    model = nn.ModuleDict({"used": mlp(6, 5), "unused": unused})
    nn.init.normal_(unused.get_buffer("running_mean"))
    before = copy.deepcopy(unused.state_dict())
    quantize(
        model,
        [torch.randn(9, 6)],
        SPEC,
        batchnorm="reestimate",
        forward=lambda model, x: model["used"](x),
    )
    for name, tensor in unused.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_reestimate_needs_more_than_one_value() -> None:
    """And says so before anything is solved."""
    model, data = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval(), torch.randn(10, 6)
    before = copy.deepcopy(model.state_dict())
    solved: list[str] = []
    with pytest.raises(ValueError, match="one value per channel, which is what batch 1 brings to"):
        quantize_with_bar(
            model, [data[:9], data[9:]], SPEC, batchnorm="reestimate", progress=solved.append
        )
    assert solved == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    quantize(model, [data[:9], data[9:]], SPEC, batchnorm="paired")
    quantize(model, [data[:8], data[8:]], SPEC, batchnorm="reestimate")


@pytest.mark.parametrize("kind", ["rows", "tokens", "images"])
def test_rounding_a_layer_does_not_shift_its_mean_output(kind: str) -> None:
    if kind == "images":
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU()
        )
        data = images(dtype=torch.float32)
    else:
        model = mlp(6, 12, 12, 4)
        data = torch.randn(40, 6) + 1 if kind == "rows" else torch.randn(10, 5, 6) + 1
    model, batches = model.double(), data.double().split(3)
    original, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = quantize(model, batches, SPEC, hessian_dtype=torch.float64)
    without = quantize(plain, batches, SPEC, bias_correction=False)
    names = [layer.name for layer in report.layers]
    assert set(report.corrected) == set(names)
    assert without.corrected == {}
    for name in names:
        unrounded = copy.deepcopy(model)  # this layer only, on the same inputs
        unrounded.get_submodule(name).load_state_dict(original.get_submodule(name).state_dict())
        was, now = (outputs_of(m, name, batches).flatten(0, -2).mean(0) for m in (unrounded, model))
        torch.testing.assert_close(now, was, **CLOSE)
        bias, corrected, kept = (m.get_parameter(f"{name}.bias") for m in (original, model, plain))
        shift = (corrected - bias).detach()
        assert report.corrected[name] == pytest.approx(float(shift.abs().max()), rel=1e-5)
        assert shift.abs().max() > 1e-3
        assert torch.equal(kept, bias)


class Followed(nn.Module):
    """A convolution with a bias, something, and a BatchNorm."""

    def __init__(self, between: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.conv, self.between, self.norm = nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.conv(x))
        for _ in range(self.calls):
            x = self.norm(x)
        return x


@pytest.mark.parametrize(
    ("between", "rule", "calls", "corrected"),
    [
        pytest.param(nn.Identity(), "paired", 1, {"norm"}, id="paired"),
        pytest.param(nn.Identity(), "reestimate", 1, {"norm"}, id="reestimate"),
        pytest.param(nn.Identity(), "keep", 1, {"conv"}, id="keep"),
        pytest.param(nn.Identity(), "paired", 2, {"conv"}, id="norm-called-twice"),
        pytest.param(nn.ReLU(), "paired", 1, {"conv", "norm"}, id="relu"),
        pytest.param(nn.ReLU(inplace=True), "paired", 1, {"conv", "norm"}, id="relu-in-place"),
    ],
)
def test_bias_is_corrected_where_no_batchnorm_takes_it_up(
    between: nn.Module, rule: Any, calls: int, corrected: set[str]
) -> None:
    model = Followed(between, calls)
    bias = model.get_parameter("conv.bias").detach().clone()
    report = quantize(model, images(dtype=torch.float32).split(5), SPEC, batchnorm=rule)
    assert set(report.corrected) == corrected
    assert torch.equal(model.get_parameter("conv.bias"), bias) == ("conv" not in corrected)
    assert report.skipped == ({} if calls == 1 else {"norm": "called 2 times in a forward pass"})


@pytest.mark.parametrize("shared", [False, True])
def test_biases_of_tied_layers_are_corrected_once_each(shared: bool) -> None:
    model = TiedPair()
    if shared:
        model.outward.bias = model.inward.bias
    before = copy.deepcopy(model)
    report = quantize(model, [torch.randn(20, 6) + 1], SPEC)
    assert set(report.corrected) == {"inward", "between"} | (set() if shared else {"outward"})
    for name in ("inward", "outward"):
        was, now = (m.get_parameter(f"{name}.bias").detach() for m in (before, model))
        assert report.corrected["inward"] == pytest.approx(float((now - was).abs().max()), rel=1e-5)
        assert report.corrected["inward"] > 1e-3


def test_a_bias_of_two_layers_or_of_other_parameters_is_left_alone() -> None:
    """What one layer's rounding shifts is not what the other's does."""
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4))
    model[2].bias = model[0].bias
    prune.random_unstructured(model[3], "bias", 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize(model, [torch.randn(20, 6) + 1], SPEC)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("weight" not in name), name
    assert not report.corrected
    assert report["0"].notes == ("its bias, shared with 2, is not corrected",)
    assert report["2"].notes == ("its bias, shared with 0, is not corrected",)
    assert report["3"].notes == ("its bias, computed from other parameters, is not corrected",)
