"""Quantizing whole models, against a literal loop over the layers."""

import copy
import importlib
import itertools
import re
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, dequantize, layers, ops, reference, solve
from sapq_triton import quantize as quantize_with_bar

SPEC = QuantSpec(bits=3)
# as `solve` by itself
SIMPLE: dict[str, Any] = dict(starts=1, candidates=1, rounds=0, damp=0.01, drift_correction=0.0)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False, **SIMPLE)
# nothing but the weights changes
PLAIN: dict[str, Any] = dict(batchnorm="keep", bias_correction=False, hessian_dtype=torch.float64)
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # means are taken of float32 activations


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

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)

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
            scale = (now_var / was_var).sqrt()
            module.running_mean += now - was + (module.running_mean - was) * (scale - 1)
            module.running_var *= scale**2
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
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("order", ["sensitivity", "activation", "min-pivot", "obq"])
def test_encoder_equals_the_literal_loop(order: Any) -> None:
    """Query, key and value are solved as one matrix: nothing of it shows."""
    model, batches = Encoder().double(), [padded(sentences([6, 6])), padded(sentences([5] * 9))]
    codes = by_hand(copy.deepcopy(model), batches, ENCODER_LAYERS, SPEC, order=order)
    assert_codes(quantize(model, batches, SPEC, order=order, **PLAIN), codes)


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
    assert report["experts.2"].notes == (
        "no calibration row reached it",
        "0 rows for 6 columns: the Hessian of 3 experts, of 24 rows, counts as 6 more",
    )
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


class Encoding(UserDict[str, Tensor]):
    """As a tokenizer of transformers gives it"""

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


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
            lambda x: [{"image": batch} for batch in x],
            lambda model, batch: model(batch.pop("image")),
            id="forward-takes-out",
        ),
        pytest.param(
            lambda x: [[batch] for batch in x],
            lambda model, batch: model(batch.pop()),
            id="forward-takes-out-of-a-list",
        ),
        pytest.param(
            lambda x: [Encoding(image=batch) for batch in x],
            lambda model, batch: model(batch.image),
            id="forward-mapping",
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


def test_masks_that_are_added_are_not_of_tokens() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.softmax(self.layer(x) + attention_mask[:, 0, 0], -1)

    mask = torch.zeros(3, 1, 1, 4).masked_fill(torch.arange(4) == 2, -torch.inf)
    batch = {"x": torch.randn(3, 6), "attention_mask": mask}
    assert quantize(Adds(), [batch], SPEC)["layer"].rows == 3


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
    monkeypatch.setattr(importlib.import_module("sapq_triton.solving"), "solve", spy)
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
