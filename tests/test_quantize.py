"""Quantizing whole models: against a literal loop over the layers, and what must stay as it was."""

import contextlib
import copy
import importlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sapq_triton import QuantSpec, Report, dequantize, layers, ops, reference, solve
from sapq_triton import quantize as quantize_with_bar

SPEC = QuantSpec(bits=3)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False)
# nothing but the weights changes
PLAIN: dict[str, Any] = dict(batchnorm="keep", bias_correction=False, hessian_dtype=torch.float64)
EXACT: dict[str, Any] = dict(rtol=1e-9, atol=1e-12)
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # means are taken of float32 activations


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough for more: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fast_path_of_attention_is_on_again() -> Iterator[None]:
    yield
    assert torch.backends.mha.get_fastpath_enabled()


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


CONVNET_STEPS = ["stem", "norm1", "depthwise", "norm2", "pointwise", "norm3", "down", "head"]


def images(count: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 7, 7, dtype=dtype) + torch.linspace(-1, 1, 7, dtype=dtype)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers "0", "2", ... with ReLU between them."""
    modules: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        modules += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Encoder(nn.Module):
    """One layer of a transformer that takes tokens and a mask by keyword."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        scores = self.query(x) @ self.key(x).mT / 8**0.5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        x = self.norm1(x + self.out(scores.softmax(-1) @ self.value(x)))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        result: Tensor = self.lm_head(x)
        return result


ENCODER_LAYERS = ["query", "key", "value", "out", "up", "down", "lm_head"]


def sentences(lengths: Iterable[int]) -> list[Tensor]:
    return [torch.randint(1, 20, (length,)) for length in lengths]


def padded(tokens: list[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


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


def unfolded(module: Any, inputs: list[Tensor]) -> Tensor:
    """X^T of a Linear or Conv2d layer with zero padding, [groups, C, rows]"""
    if isinstance(module, nn.Linear):
        return torch.cat([x.flatten(0, -2) for x in inputs]).T[None]
    x = F.unfold(
        torch.cat(inputs), module.kernel_size, module.dilation, module.padding, module.stride
    )
    return x.transpose(0, 1).flatten(1).unflatten(0, (module.groups, -1))


def solve_here(module: Any, inputs: list[Tensor], spec: QuantSpec, **options: Any) -> Tensor:
    """Quantize one layer on its inputs, in place; returns the codes."""
    x = unfolded(module, inputs).double()
    weight = module.weight.detach().reshape(len(x), -1, x.shape[1])
    result = solve(weight, 2 / x.shape[2] * x @ x.mT, spec, **options)
    with torch.no_grad():
        module.weight.copy_(result.dequantize().reshape(module.weight.shape))
    return result.codes


def by_hand(
    model: nn.Module,
    batches: Iterable[Any],
    steps: Iterable[str],
    spec: QuantSpec,
    norms: bool = False,
    biases: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """One step after another, each with a forward pass of its own through what is done so far."""
    original, codes = copy.deepcopy(model), {}
    for name in steps:
        module: Any = model.get_submodule(name)
        if not isinstance(module, nn.BatchNorm2d):
            was = outputs_of(model, name, batches).mean(0) if name in biases else None
            codes[name] = solve_here(module, inputs_of(model, name, batches), spec, **options)
            if was is not None:
                module.bias.data += was - outputs_of(model, name, batches).mean(0)
        elif norms:
            assert module.running_mean is not None and module.running_var is not None
            (was_var, was), (now_var, now) = (
                torch.var_mean(torch.cat(inputs_of(m, name, batches)), (0, 2, 3), correction=0)
                for m in (original, model)
            )
            module.running_mean += now - was
            module.running_var *= now_var / was_var
    return codes


def assert_codes(report: Report, expected: dict[str, Tensor]) -> None:
    assert [layer.name for layer in report.layers] == list(expected)
    for name, codes in expected.items():
        assert torch.equal(report[name].codes, codes), name


def assert_weights_are_codes(model: nn.Module, report: Report) -> None:
    """Each weight holds exactly what the report says, in its own dtype."""
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        values = dequantize(layer.codes, layer.scale, layer.zero_point)
        matrix = layers.weight_matrix(module)
        assert torch.equal(matrix.cpu(), values.to(matrix.dtype)), layer.name
        assert layer.codes.max() <= layer.spec.qmax


class State(NamedTuple):
    """Everything that `quantize` must put back."""

    tensors: dict[str, Tensor]
    identities: dict[str, int]
    training: dict[str, bool]
    hooks: dict[str, tuple[int, ...]]
    momenta: dict[str, object]
    generators: tuple[bytes, object, object]
    modes: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "State":
        modules = dict(model.named_modules())
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        numpy_state: Any = np.random.get_state()
        return cls(
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            identities={name: id(tensor) for name, tensor in tensors.items()},
            training={name: module.training for name, module in modules.items()},
            hooks={
                name: (*module._forward_hooks, *module._forward_pre_hooks)
                for name, module in modules.items()
            },
            momenta={name: getattr(module, "momentum", None) for name, module in modules.items()},
            generators=(
                torch.get_rng_state().numpy().tobytes(),
                (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
                random.getstate(),
            ),
            modes=(
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.backends.mha.get_fastpath_enabled(),
            ),
        )

    def assert_surroundings(self, model: nn.Module) -> None:
        now = State.of(model)
        assert now.identities == self.identities
        assert now.training == self.training
        assert now.hooks == self.hooks
        assert now.momenta == self.momenta
        assert now.generators == self.generators
        assert now.modes == self.modes

    def assert_all(self, model: nn.Module) -> None:
        self.assert_surroundings(model)
        for name, tensor in State.of(model).tensors.items():
            assert torch.equal(tensor, self.tensors[name]), name


@pytest.mark.parametrize("order", ["sensitivity", "natural", "nearest"])
@pytest.mark.parametrize("batches", [1, 3])
def test_convnet_equals_the_literal_loop(order: Any, batches: int) -> None:
    model = ConvNet().double()
    expected, data = copy.deepcopy(model), images().chunk(batches)
    options: dict[str, Any] = dict(order=order, block=8, damp=0.02)
    layer_names = [name for name in CONVNET_STEPS if "norm" not in name]
    codes = by_hand(expected, data, layer_names, SPEC, **options)
    report = quantize(model, data, SPEC, **PLAIN, **options)
    assert_codes(report, codes)
    assert_weights_are_codes(model, report)
    for name, tensor in State.of(expected).tensors.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_encoder_equals_the_literal_loop() -> None:
    model, batches = Encoder().double(), [padded(sentences([6, 6])), padded(sentences([5] * 9))]
    codes = by_hand(copy.deepcopy(model), batches, ENCODER_LAYERS, SPEC)
    assert_codes(quantize(model, batches, SPEC, **PLAIN), codes)


def test_corrections_equal_the_literal_loop() -> None:
    model, data = ConvNet(bias=True).double(), images().chunk(3)
    expected = copy.deepcopy(model)
    codes = by_hand(expected, data, CONVNET_STEPS, SPEC, norms=True, biases=("down", "head"))
    report = quantize(model, data, SPEC, hessian_dtype=torch.float64)
    assert_codes(report, codes)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, **CLOSE, msg=name)
    assert set(report.corrected) == {"norm1", "norm2", "norm3", "down", "head"}


def test_one_batch_or_many() -> None:
    models = [ConvNet().double()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    data = images()
    splits = [[data], data.chunk(4), data.split([1, 6, 5])]
    reports = [
        quantize(model, split, SPEC, hessian_dtype=torch.float64)
        for model, split in zip(models, splits, strict=True)
    ]
    for model, report in zip(models[1:], reports[1:], strict=True):
        assert_codes(report, {layer.name: layer.codes for layer in reports[0].layers})
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, models[0].state_dict()[name], **CLOSE, msg=name)


def test_two_runs_are_bit_identical() -> None:
    models = [ConvNet(bias=True).float()]
    models.append(copy.deepcopy(models[0]))
    data = images(dtype=torch.float32).chunk(3)
    first, second = (quantize(model, data, SPEC) for model in models)
    assert first.corrected == second.corrected
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


class Routed(nn.Module):
    """Each batch goes through one of the experts, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        x = F.relu(self.first(x))
        result: Tensor = self.last(F.relu(self.experts[expert](x)))
        return result


def test_batches_may_take_different_ways() -> None:
    """The first batch does not see expert 1: `last` must wait for the others all the same."""
    batches = [(torch.randn(9, 6), 0), (torch.randn(8, 6), 1), (torch.randn(7, 6), 0)]
    report = quantize(Routed(), batches, SPEC)
    rows = {layer.name: layer.rows for layer in report.layers}
    assert rows == {"first": 24, "experts.0": 16, "experts.1": 8, "experts.2": 0, "last": 24}
    assert report["experts.2"].notes == ("no calibration row reached it",)
    assert list(rows)[-1] == "experts.2"


def test_way_that_only_the_quantized_model_takes() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.detour, self.last = (nn.Linear(6, 6) for _ in range(3))
            self.original = self.first.weight.detach().clone()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if not torch.equal(self.first.weight, self.original):
                x = self.detour(x)
            result: Tensor = self.last(x)
            return result

    report = quantize(Detour(), list(torch.randn(3, 8, 6)), SPEC)
    assert {layer.name: layer.rows for layer in report.layers} == {
        "first": 24,
        "detour": 24,
        "last": 24,
    }


def gpt2_layer() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module: nn.Module = conv1d(6, 5)
    return module


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        pytest.param(lambda: nn.Linear(5, 6), (2, 9, 5), id="linear"),
        pytest.param(gpt2_layer, (2, 9, 5), id="gpt2"),
        pytest.param(lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 20), id="conv1d"),
        pytest.param(
            lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            (2, 3, 6, 6),
            id="conv2d-reflect",
        ),
        pytest.param(
            lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 6, 6), id="depthwise"
        ),
        pytest.param(lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), id="conv3d"),
        pytest.param(
            lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 20), id="transposed1d"
        ),
        pytest.param(
            lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
            (2, 4, 6, 6),
            id="transposed2d",
        ),
    ],
)
def test_reported_error_is_the_change_of_the_output(
    factory: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = factory().double(), torch.randn(shape).double()
    with torch.no_grad():
        before = model(x)
        without = before - model(torch.zeros_like(x))
        report = quantize(model, x.split(1), SPEC, **PLAIN)
        change = model(x) - before
    layer = report[""]
    assert layer.kind == type(model).__name__
    assert layer.error == pytest.approx(2 / layer.rows * float(change.square().sum()), rel=1e-5)
    assert layer.energy == pytest.approx(2 / layer.rows * float(without.square().sum()), rel=1e-5)
    assert 0 < layer.relative_error < 0.2
    assert_weights_are_codes(model, report)


def test_report_of_a_layer() -> None:
    model, x = mlp(8, 6, 4), torch.randn(40, 8)
    x[:, 3] = 0
    spec = QuantSpec(bits=4, group_size=2, symmetric=True)
    report = quantize(
        model, x.split(15), spec, overrides={"2": replace(SPEC, bits=5)}, order="activation"
    )
    first, second = report.layers
    assert (first.name, first.kind, first.shape, first.spec) == ("0", "Linear", (6, 8), spec)
    assert second.spec == replace(SPEC, bits=5)
    assert (first.order, first.rows, first.damp) == ("activation", 40, 0.01)
    assert (first.dead_columns, first.fallbacks, first.notes) == (1, 0, ())
    assert (first.codes.shape, first.codes.dtype) == ((1, 6, 8), torch.uint8)
    assert first.scale.shape == first.zero_point.shape == (1, 6, 4)
    assert first.scale.dtype == first.zero_point.dtype == torch.float32
    assert first.bytes == 48 * 4 / 8 + 24 * 2
    assert second.bytes == 24 * 5 / 8 + 4 * (2 + 5 / 8)
    assert first.seconds_hessian > 0 and first.seconds_solve > 0
    assert report.seconds > first.seconds_solve + second.seconds_solve
    assert report["2"] is second
    mean = (first.relative_error + second.relative_error) / 2
    assert report.relative_error == pytest.approx(mean)
    assert report.skipped == {}
    with pytest.raises(KeyError, match=re.escape("'3' was not quantized; layers are ['0', '2']")):
        _ = report["3"]


def test_report_as_text() -> None:
    model, x = mlp(8, 6, 4), torch.randn(40, 8)
    x[:, :2] = 0
    report = quantize(model, [x], replace(SPEC, group_size=4), skip=["2"])
    (layer,) = report.layers
    text = str(replace(report, layers=(layer, replace(layer, name="other", fallbacks=1))))
    header, line, other, skipped = text.splitlines()
    assert header.split()[:4] == ["layer", "kind", "weight", "bits"]
    assert line.split()[:4] == ["0", "Linear", "6x8", "3"]
    assert f"{layer.relative_error:.3e}" in line
    assert line.endswith("2 columns never fired")
    assert other.endswith("2 columns never fired; 1 of 1 problems rounded to nearest")
    assert skipped == "2: left as it was, as asked"


def test_skip_and_overrides() -> None:
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    overrides = {"*": replace(SPEC, bits=6), "d*": replace(SPEC, bits=5), "down": SPEC}
    report = quantize(
        model,
        [images(dtype=torch.float32)],
        QuantSpec(8),
        skip=["stem", "h*"],
        overrides=overrides,
    )
    bits = {layer.name: layer.spec.bits for layer in report.layers}
    assert bits == {"depthwise": 5, "pointwise": 6, "down": 3}
    assert report.skipped == {"stem": "as asked", "head": "as asked"}
    for name in ("stem.weight", "head.weight", "head.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_group_size_that_does_not_divide() -> None:
    report = quantize(mlp(8, 6, 4), [torch.randn(9, 8)], replace(SPEC, group_size=4))
    assert report["0"].scale.shape == (1, 6, 2)
    assert report["0"].notes == ()
    assert report["2"].scale.shape == (1, 4, 1)
    assert report["2"].spec == SPEC
    assert report["2"].notes == ("group_size 4 does not divide 6 columns: one group per row",)


def test_layer_that_no_batch_reaches_is_rounded_to_nearest() -> None:
    unused = nn.Linear(6, 5)
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "unused": unused})
    weight, bias = unused.weight.detach().clone(), unused.bias.detach().clone()
    batch = torch.randn(9, 6)
    report = quantize(model, [batch], SPEC, forward=lambda model, x: model["used"](x))
    layer = report["unused"]
    assert layer.notes == ("no calibration row reached it",)
    assert (layer.rows, layer.dead_columns, layer.relative_error) == (0, 6, 0)
    codes, scale, _ = reference.quantize_groups(
        weight[None], 6, SPEC.qmax, SPEC.symmetric, SPEC.shrink
    )
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)
    assert torch.equal(unused.bias, bias)
    assert set(report.corrected) == {"used"}
    assert_weights_are_codes(model, report)
    assert "no calibration row reached it" in str(report)


class Twice(nn.Module):
    """A layer that runs twice in a pass, with a layer before and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.again(x))
        result: Tensor = self.last(x)
        return result


def test_layer_called_twice_sees_the_inputs_of_both_calls() -> None:
    model, batches = Twice().double(), list(torch.randn(2, 20, 6).double())
    expected, bias = copy.deepcopy(model), model.again.bias.detach().clone()
    seen = inputs_of(expected, "again", batches)
    assert len(seen) == 4
    codes = by_hand(expected, batches, ["first"], SPEC)
    codes["again"] = solve_here(expected.again, seen, SPEC)
    codes |= by_hand(expected, batches, ["last"], SPEC)
    report = quantize(model, batches, SPEC, **PLAIN)
    assert_codes(report, codes)
    assert report["again"].rows == 80
    assert report["again"].notes == ("called 2 times: calibrated on full-precision inputs",)
    assert torch.equal(model.again.bias, bias)


class TiedPair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inward, self.between = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outward = nn.Linear(6, 6, bias=bias)
        self.outward.weight = self.inward.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outward(F.relu(self.between(F.relu(self.inward(x)))))
        return result


def test_tied_layers_are_solved_once() -> None:
    model, batches = TiedPair().double(), list(torch.randn(2, 20, 6).double())
    expected = copy.deepcopy(model)
    seen = inputs_of(expected, "inward", batches) + inputs_of(expected, "outward", batches)
    codes = {"inward": solve_here(expected.inward, seen, SPEC)}
    codes |= by_hand(expected, batches, ["between"], SPEC)
    report = quantize(model, batches, SPEC, **PLAIN)
    assert_codes(report, codes)
    assert model.outward.weight is model.inward.weight
    assert report["inward"].notes == (
        "weight shared with outward",
        "called 2 times: calibrated on full-precision inputs",
    )
    assert "outward" not in report.skipped


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


def test_layers_that_differ_but_share_a_weight_are_left_alone() -> None:
    model = TiedPair(bias=False)
    report = quantize(model, [torch.randn(9, 6)], SPEC)
    assert [layer.name for layer in report.layers] == ["between"]
    assert report.skipped == {
        "inward": "its weight is shared with ['outward']",
        "outward": "its weight is shared with ['inward']",
    }


def test_twin_of_a_skipped_layer_is_left_alone() -> None:
    report = quantize(TiedPair(), [torch.randn(9, 6)], SPEC, skip=["outward"])
    assert report.skipped == {
        "outward": "as asked",
        "inward": "its weight is shared with ['outward']",
    }


def test_head_that_is_tied_to_an_embedding_is_left_alone() -> None:
    model = Encoder(tied=True)
    before = model.embedding.weight.detach().clone()
    report = quantize(model, [padded(sentences([4, 6]))], SPEC)
    assert report.skipped == {"lm_head": "its weight is shared with ['embedding']"}
    assert model.lm_head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, before)
    assert len(report.layers) == 6


def test_attention_module_keeps_its_projection() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.attention(x, x, x)[0])
            return result

    model = Attending()
    before = copy.deepcopy(model.attention.state_dict())
    report = quantize(model, [torch.randn(2, 5, 8)], SPEC)
    assert report.skipped == {
        "attention.out_proj": "nn.MultiheadAttention reads its weight without calling it"
    }
    assert [layer.name for layer in report.layers] == ["last"]
    for name, tensor in model.attention.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_transformer_with_padding_does_not_take_its_fast_path() -> None:
    """It would run past the layers, on nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()

    def forward(model: nn.Module, batch: Tensor) -> object:
        return model(batch, src_key_padding_mask=padding)

    batch = torch.randn(2, 5, 8)
    state = State.of(model)
    report = quantize(model, [batch], SPEC, forward=forward)
    assert {layer.name: layer.rows for layer in report.layers} == {
        "layers.0.linear1": 10,
        "layers.0.linear2": 10,
    }
    state.assert_surroundings(model)


def test_weight_norm_is_left_alone() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    report = quantize(model, [torch.randn(9, 6)], SPEC)
    assert report.skipped == {"0": "its weight is computed from other parameters"}
    assert [layer.name for layer in report.layers] == ["1"]


def test_decoder_with_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3),
    )
    x = images(6, torch.float32)
    with torch.no_grad():
        before = model.eval()(x)
        report = quantize(model, x.split(3), QuantSpec(bits=8))
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.02)
    assert [layer.name for layer in report.layers] == ["0", "2", "5"]
    assert_weights_are_codes(model, report)


def test_gpt2_block() -> None:
    model = nn.Sequential(nn.Linear(5, 5), gpt2_layer(), nn.GELU(), nn.Linear(6, 4))
    x = torch.randn(30, 5)
    with torch.no_grad():
        before = model(x)
        report = quantize(model, x.split(10), QuantSpec(bits=8))
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.02)
    assert [layer.kind for layer in report.layers] == ["Linear", "Conv1D", "Linear"]
    assert_weights_are_codes(model, report)


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


def test_paired_batchnorm_adds_the_change_of_its_input() -> None:
    """Also where the running statistics are those of other data."""
    model, data = ConvNet().double(), images().split(5)
    original = copy.deepcopy(model)
    report = quantize(model, data, SPEC)
    for name in ("norm1", "norm2", "norm3"):
        (was_var, was), (now_var, now) = (
            torch.var_mean(torch.cat(inputs_of(m, name, data)), (0, 2, 3), correction=0)
            for m in (original, model)
        )
        before, after = original.get_submodule(name), model.get_submodule(name)
        assert isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.BatchNorm2d)
        assert before.running_mean is not None and before.running_var is not None
        torch.testing.assert_close(after.running_mean, before.running_mean + now - was, **CLOSE)
        torch.testing.assert_close(
            after.running_var, before.running_var * now_var / was_var, **CLOSE
        )
        assert report.corrected[name] == pytest.approx(float((now - was).abs().max()), abs=1e-6)
        assert report.corrected[name] > 1e-3


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
    was, now = (torch.cat(inputs_of(m, "1", data)).mean(0) for m in (original, model))
    torch.testing.assert_close(model[1].running_mean, now - was, **CLOSE)
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


class Labelled(NamedTuple):
    image: Tensor
    label: Tensor


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        pytest.param(lambda x: list(x), None, id="tensors"),
        pytest.param(lambda x: tuple(x), None, id="tuple-of-batches"),
        pytest.param(lambda x: (batch for batch in x), None, id="generator"),
        pytest.param(lambda x: [(batch, torch.ones(4)) for batch in x], None, id="labels"),
        pytest.param(lambda x: [[batch, "label", 3] for batch in x], None, id="lists"),
        pytest.param(lambda x: [Labelled(batch, torch.ones(4)) for batch in x], None, id="named"),
        pytest.param(lambda x: [{"x": batch} for batch in x], None, id="dicts"),
        pytest.param(
            lambda x: torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.cat(list(x)), torch.ones(12)), batch_size=4
            ),
            None,
            id="loader",
        ),
        pytest.param(
            lambda x: [Labelled(batch, torch.ones(4)) for batch in x],
            lambda model, batch: model(batch.image),
            id="forward-named",
        ),
        pytest.param(
            lambda x: [{"image": [batch], "name": "a"} for batch in x],
            lambda model, batch: model(x=batch["image"][0]),
            id="forward-nested",
        ),
    ],
)
def test_batches_of_any_form(
    wrap: Callable[[Iterable[Tensor]], Iterable[Any]],
    forward: Callable[[nn.Module, Any], object] | None,
) -> None:
    model, data = ConvNet(), images(dtype=torch.float32).split(4)
    expected = quantize(copy.deepcopy(model), data, SPEC)
    report = quantize(model, wrap(data), SPEC, forward=forward)
    assert_codes(report, {layer.name: layer.codes for layer in expected.layers})
    assert report.corrected == expected.corrected


def test_tuples_fill_as_many_arguments_as_there_are() -> None:
    class Anything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, *parts: Tensor) -> Tensor:
            result: Tensor = self.linear(sum(parts))
            return result

    x = torch.randn(9, 6)
    assert quantize(Anything(), [(x, x, -x)], SPEC)["linear"].rows == 9


def test_layer_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.again = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(input=self.conv(input=x))
            result: Tensor = self.again(input=self.again(input=x))
            return result

    report = quantize(ByKeyword(), [images(4, torch.float32)], SPEC)
    assert [layer.name for layer in report.layers] == ["conv", "again"]
    assert set(report.corrected) == {"norm", "again"}


def test_layer_that_returns_more_than_a_tensor() -> None:
    class Parallel(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return F.linear(x, self.weight), self.bias

    report = quantize(Parallel(6, 4), [torch.randn(9, 6)], SPEC)
    assert report[""].kind == "Parallel"
    assert set(report.corrected) == {""}


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, partial(torch.autocast, "cpu"), torch.no_grad]
)
def test_modes_of_the_caller_change_nothing(mode: Callable[[], Any]) -> None:
    model, data = ConvNet(bias=True), images(dtype=torch.float32).split(4)
    expected = copy.deepcopy(model)
    quantize(expected, data, SPEC)
    with mode():
        state = State.of(model)
        quantize(model, data, SPEC)
        state.assert_surroundings(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_padding_tokens_do_not_count() -> None:
    model = Encoder().double()
    tokens = sentences([6, 3, 9, 1, 5, 9, 7, 8])
    alone, together, ignored = (copy.deepcopy(model) for _ in range(3))
    options: dict[str, Any] = dict(hessian_dtype=torch.float64)
    expected = quantize(alone, [padded([sentence]) for sentence in tokens], SPEC, **options)
    report = quantize(together, [padded(tokens[:5]), padded(tokens[5:])], SPEC, **options)
    assert_codes(report, {layer.name: layer.codes for layer in expected.layers})
    assert {layer.rows for layer in report.layers} == {48}
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, **CLOSE)
    counted = quantize(
        ignored, [padded(tokens[:5]), padded(tokens[5:])], SPEC, attention_mask=None, **options
    )
    assert {layer.rows for layer in counted.layers} == {5 * 9 + 3 * 9}
    assert any(not torch.equal(counted[name].codes, report[name].codes) for name in ENCODER_LAYERS)


def test_padding_tokens_may_hold_anything() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(6, 5, 4)

        def forward(self, features: Tensor, valid: Tensor) -> Tensor:
            result: Tensor = self.layers(features)
            return result

    model, features = Features(), torch.randn(3, 5, 6)
    valid = torch.arange(5) < torch.tensor([[5], [2], [3]])
    features[~valid] = torch.nan
    report = quantize(model, [{"features": features, "valid": valid}], SPEC, attention_mask="valid")
    assert {layer.rows for layer in report.layers} == {10}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


class Noisy(nn.Module):
    """Draws from every generator, counts its calls, and fails in one of them."""

    def __init__(self, watched: nn.Linear, fatal: int = 0, error: type = RuntimeError) -> None:
        super().__init__()
        self.watched, self.fatal, self.error = [watched], fatal, error
        self.original = watched.weight.detach().clone()
        self.calls = 0
        self.changed = False

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()
        self.calls += 1
        if self.calls == self.fatal:
            self.changed = not torch.equal(self.watched[0].weight, self.original)
            raise self.error("on purpose")
        return x


def noisy_model(**options: Any) -> nn.Sequential:
    """Three batches make three calls of the noisy layer in each pass."""
    first, last = nn.Linear(6, 6), nn.Linear(6, 4)
    model = nn.Sequential(
        first,
        nn.BatchNorm1d(6, momentum=0.3),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)),
        Noisy(first, **options),
        last,
    )
    model[2].eval()  # a mixture of states
    last.weight.requires_grad_(False)
    last.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("rule", ["paired", "reestimate", "keep"])
@pytest.mark.parametrize("training", [True, False])
def test_success_restores_the_surroundings(rule: Any, training: bool) -> None:
    model = noisy_model().train(training)
    model[2].eval()
    batches = list(torch.randn(3, 9, 6))
    state = State.of(model)
    quantize(model, batches, SPEC, batchnorm=rule)
    state.assert_surroundings(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("rule", "fatal"),
    [
        pytest.param("paired", 2, id="first-pass"),
        pytest.param("paired", 6, id="second-pass"),
        pytest.param("reestimate", 9, id="third-pass"),
    ],
)
def test_error_inside_the_model_leaves_no_trace(rule: Any, fatal: int, error: type) -> None:
    model = noisy_model(fatal=fatal, error=error).train()
    batches = list(torch.randn(3, 9, 6))
    state = State.of(model)
    with pytest.raises(error, match="on purpose"):
        quantize(model, batches, SPEC, batchnorm=rule)
    assert model[3].calls == fatal
    assert model[3].changed == (fatal > 3)  # it failed while the first layer was quantized
    state.assert_all(model)
    assert len(quantize(model, batches, SPEC, batchnorm=rule).layers) == 3


def test_error_in_the_solver_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = ConvNet(bias=True).train(), 0

    def failing(*args: Any, **options: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory, say")
        return solve(*args, **options)

    # by import_module: as an attribute of the package, `quantize` is the function
    monkeypatch.setattr(importlib.import_module("sapq_triton.quantize"), "solve", failing)
    batches = images(dtype=torch.float32).split(4)
    state = State.of(model)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        quantize(model, batches, SPEC)
    assert calls == 4
    state.assert_all(model)


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    evaluated, batches = copy.deepcopy(model).eval(), list(torch.randn(2, 9, 6))
    expected = quantize(evaluated, batches, SPEC)
    torch.manual_seed(5)
    report = quantize(model.train(), batches, SPEC)
    assert_codes(report, {layer.name: layer.codes for layer in expected.layers})
    assert model.training and model[1].training and not evaluated.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 3, 1))
    model = model.to(dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    report = quantize(model, list(torch.randn(2, 5, 4, 8).to(dtype)), SPEC)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes
    assert_weights_are_codes(model, report)
    assert set(report.corrected) == {"1", "3"}
    assert all(layer.relative_error < 0.2 for layer in report.layers)


def test_report_is_on_the_cpu_and_apart_from_the_model() -> None:
    model = nn.Linear(6, 4)
    layer = quantize(model, [torch.randn(9, 6)], SPEC)[""]
    codes = layer.codes.clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(layer.codes, codes)
    assert layer.codes.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solver_gets_the_hessian_as_asked(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def spy(weight: Tensor, hessian: Tensor, *args: Any, **options: Any) -> object:
        seen.append(hessian.dtype)
        return solve(weight, hessian, *args, **options)

    model = mlp(6, 5, 4)
    monkeypatch.setattr(importlib.import_module("sapq_triton.quantize"), "solve", spy)
    quantize(model, [torch.randn(9, 6)], SPEC, hessian_dtype=dtype)
    assert seen[-2:] == [dtype, dtype]  # those before only tried the options


def test_backend_reaches_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(tensor: Tensor, backend: Any) -> bool:
        asked.append(backend)
        return uses_triton(tensor, backend)

    uses_triton = ops.uses_triton
    monkeypatch.setattr(ops, "uses_triton", spy)
    quantize(mlp(6, 5, 4), [torch.randn(9, 6)], SPEC, backend="reference")
    assert len(asked) > 4 and set(asked) == {"reference"}


def test_gradients_still_flow_afterwards() -> None:
    model = mlp(6, 5, 4)
    quantize(model, [torch.randn(9, 6)], SPEC)
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    quantize_with_bar(mlp(6, 5, 4), [torch.randn(9, 6)], SPEC)
    assert "2/2" in capfd.readouterr().err
    quantize(mlp(6, 5, 4), [torch.randn(9, 6)], SPEC)
    assert capfd.readouterr().err == ""


@contextlib.contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """ValueError with this message, and the model untouched."""
    state = State.of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        yield
    state.assert_all(model)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        pytest.param([], "batches is empty: calibration needs at least one batch", id="none"),
        pytest.param(iter(()), "batches is empty", id="empty-generator"),
        pytest.param(
            torch.ones(3, 6),
            "batches must be an iterable of batches, got one Tensor; pass [batch]",
            id="tensor",
        ),
        pytest.param(
            {"input": torch.ones(3, 6)},
            "batches must be an iterable of batches, got one dict; pass [batch]",
            id="dict",
        ),
        pytest.param(
            [torch.ones(3, 6), torch.full((3, 6), torch.nan)],
            "the input of '0' holds NaN or Inf during calibration",
            id="nan",
        ),
        pytest.param(
            [torch.full((3, 6), torch.inf)],
            "the input of '0' holds NaN or Inf during calibration",
            id="inf",
        ),
    ],
)
def test_bad_batches(batches: Any, message: str) -> None:
    model = mlp(6, 5, 4)
    with refused(model, message):
        quantize(model, batches, SPEC)


def test_layer_in_the_middle_that_gets_nan_is_named() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.amax() - 1).sqrt()

    model, batch = nn.Sequential(nn.Linear(6, 5), Root(), nn.Linear(5, 4)), torch.randn(9, 6)
    with refused(model, "the input of '2' holds NaN or Inf during calibration"):
        quantize(model, [batch], SPEC)


def test_repeated_layer_with_bad_input_is_named() -> None:
    model = Twice()
    with refused(model, "the input of 'again' holds NaN or Inf during calibration"):
        quantize(model, [torch.full((9, 6), torch.nan)], SPEC, skip=["first"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weight_is_named(value: float) -> None:
    model = mlp(6, 5, 4)
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 2] = value
    with pytest.raises(ValueError, match="the weight of '2' holds NaN or Inf"):
        quantize(model, [torch.randn(9, 6)], SPEC)
    report = quantize(model, [torch.randn(9, 6)], SPEC, skip=["2"])
    assert [layer.name for layer in report.layers] == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(spec=4), "spec must be a QuantSpec, got 4"),
        (dict(overrides={"0": 4}), "overrides['0'] must be a QuantSpec, got 4"),
        (dict(skip="head"), "skip must be an iterable of patterns, got 'head'; pass ['head']"),
        (dict(skip=["head"]), "pattern 'head' matches no layer; layers are ['0', '2']"),
        (dict(overrides={"h*": SPEC}), "pattern 'h*' matches no layer; layers are ['0', '2']"),
        (dict(skip=["*"]), "no layer to quantize; left out: {'0': 'as asked', '2': 'as asked'}"),
        (dict(batchnorm="reset"), "batchnorm must be one of ('paired', 'reestimate', 'keep'), got"),
        (dict(hessian_dtype=torch.float16), "summed in float32 or float64, got torch.float16"),
        (dict(order="best"), "order must be one of"),
        (dict(block=0), "block must be"),
        (dict(damp=-1.0), "damp must be"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_before_the_model_runs(
    options: dict[str, Any], message: str
) -> None:
    model = mlp(6, 5, 4)

    def never(model: nn.Module, batch: Tensor) -> None:
        raise AssertionError("the model ran")

    with refused(model, message):
        quantize(model, [torch.ones(9, 6)], **{"spec": SPEC, "forward": never, **options})


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        pytest.param(nn.Sequential(nn.ReLU()), "none found", id="no-parameters"),
        pytest.param(nn.Sequential(nn.LayerNorm(6)), "none found", id="no-layers"),
        pytest.param(
            nn.Linear(6, 4, device="meta"),
            "{'': 'its weight has no data (meta device)'}",
            id="meta",
        ),
    ],
)
def test_nothing_to_quantize(model: nn.Module, left_out: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no layer to quantize; left out: {left_out}")):
        quantize(model, [torch.randn(9, 6)], SPEC)


def test_lazy_layers_must_be_initialized() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(4))
    message = "1.weight, 1.bias not initialized yet; run the model once before"
    with pytest.raises(ValueError, match=message):
        quantize(model, [torch.randn(9, 6)], SPEC)
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks


def test_layer_that_is_given_no_tensor() -> None:
    class First(nn.Linear):
        def forward(self, pair: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(pair[0])

    model = First(6, 4)
    with refused(model, "'' takes a tensor, but was called with list"):
        quantize(model, [[[torch.ones(9, 6)]]], SPEC)


def test_triton_backend(device: torch.device) -> None:
    """The kernels, on every kind of layer that they treat differently."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).to(device)
    data = torch.randn(8, 3, 5, 5).split(4)  # moved to where the model is
    expected = quantize(copy.deepcopy(model), data, SPEC, backend="reference", block=8)
    report = quantize(model, data, SPEC, backend="triton", block=8)
    assert_weights_are_codes(model, report)
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert layer.name == other.name
        assert torch.equal(layer.scale, other.scale)
        assert (layer.codes == other.codes).float().mean() > 0.95
        assert layer.relative_error == pytest.approx(other.relative_error, rel=0.1)
    assert set(report.corrected) == set(expected.corrected)


def test_triton_backend_with_tokens_in_float64(device: torch.device) -> None:
    model = Encoder().to(device)
    batches = [padded(sentences([3, 5])), padded(sentences([4, 2]))]
    expected = copy.deepcopy(model)
    options: dict[str, Any] = dict(hessian_dtype=torch.float64, skip=["lm_head"], block=8)
    was = quantize(expected, batches, SPEC, backend="reference", **options)
    report = quantize(model, batches, SPEC, backend="triton", **options)
    assert_weights_are_codes(model, report)
    for layer, other in zip(report.layers, was.layers, strict=True):
        assert (layer.rows, layer.name) == (14, other.name)
        assert (layer.codes == other.codes).float().mean() > 0.95
