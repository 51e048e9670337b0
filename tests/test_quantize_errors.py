"""What `quantize` leaves as it was, whether it succeeds or not, and what it refuses."""

import contextlib
import copy
import gc
import importlib
import itertools
import random
import re
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, error_curves, solve
from sapq_triton import quantize as quantize_with_bar

SPEC = QuantSpec(bits=3)
# as `solve` by itself
SIMPLE: dict[str, Any] = dict(starts=1, candidates=1, rounds=0, damp=0.01, drift_correction=0.0)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False, **SIMPLE)


@pytest.fixture(autouse=True)
def fast_path_of_attention_is_on_again() -> Iterator[None]:
    yield
    assert torch.backends.mha.get_fastpath_enabled()


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers "0", "2", ... with ReLU between them."""
    modules: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        modules += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


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


@contextlib.contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """ValueError with this message, and the model untouched."""
    state = State.of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        yield
    state.assert_all(model)


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


def image_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize("replay", [False, True])
def test_error_inside_the_model_keeps_no_activation(replay: bool) -> None:
    """Without the help of the garbage collector, which may come late, and never for a GPU."""
    model, alive = mlp(8, 8, 8), []

    def forward(module: nn.Module, batch: Tensor) -> object:
        inputs = batch + 1
        alive.append(weakref.ref(inputs))
        output = module(inputs)
        if len(alive) > 4:  # all batches of the second pass wait in front of a layer, or have ended
            raise KeyError("on purpose")
        return output

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(KeyError):
            quantize(
                model, [torch.randn(4, 8) for _ in range(3)], SPEC, forward=forward, replay=replay
            )
        assert len(alive) > 4 and not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


def test_a_buffer_that_was_replaced_is_put_back() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x.mean()[None]])
            if len(self.seen) > 3:
                raise KeyError("enough")
            return self.layer(x)

    model = Grows()
    seen = model.seen
    with pytest.raises(KeyError, match="enough"):
        quantize(model, [torch.randn(8, 4)] * 3, SPEC)
    assert model.seen is seen and model.seen.tolist() == [0]


def test_an_interrupt_while_the_report_is_made_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(**_: Any) -> Report:
        raise KeyboardInterrupt

    model, batch = mlp(4, 4), torch.randn(8, 4)
    state = State.of(model)
    monkeypatch.setattr(importlib.import_module("sapq_triton.quantize"), "Report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, [batch], SPEC)
    state.assert_all(model)


def test_error_in_the_solver_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = image_model().train(), 0

    def failing(*args: Any, **options: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory, say")
        return solve(*args, **options)

    # by import_module: as an attribute of the package, `quantize` is the function
    monkeypatch.setattr(importlib.import_module("sapq_triton.solving"), "solve", failing)
    batches = torch.randn(12, 3, 7, 7).split(4)
    state = State.of(model)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        quantize(model, batches, SPEC)
    assert calls == 4
    state.assert_all(model)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, partial(torch.autocast, "cpu"), torch.no_grad]
)
def test_modes_of_the_caller_change_nothing(mode: Callable[[], Any]) -> None:
    model, data = image_model(), torch.randn(12, 3, 7, 7).split(4)
    expected = copy.deepcopy(model)
    quantize(expected, data, SPEC)
    with mode():
        state = State.of(model)
        quantize(model, data, SPEC)
        state.assert_surroundings(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_autocast_of_a_forward_sees_the_quantized_weights() -> None:
    """Its cache of casts would keep the weights that were."""
    inputs = torch.randn(64, 16)

    def run(model: nn.Module, batch: Tensor, caches: bool) -> object:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=caches):
            return model(batch)

    found = {}
    for caches in (True, False):
        torch.manual_seed(1)
        model = mlp(16, 16, 16, 4)
        with torch.autocast("cpu", torch.bfloat16):  # of the caller, around it all
            before = model(inputs)
            report = quantize(
                model, [inputs], SPEC, forward=partial(run, caches=caches), drift_correction=0.5
            )
            assert (model(inputs) != before).any()
        found[caches] = [layer.codes for layer in report.layers]
        curves = error_curves(
            mlp(16, 4), [inputs, inputs], SPEC, bits=[2], score="measured",
            forward=partial(run, caches=caches),
        )  # fmt: skip
        assert curves.layers["0"].errors["measured"][0] > 1e-3
    for with_cache, without in zip(found[True], found[False], strict=True):
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("replay", [False, True])
def test_compiled_models_call_their_layers(replay: bool) -> None:
    """Also when they were compiled before there was a hook."""
    model, inputs = mlp(8, 8, 4).eval(), torch.randn(32, 8)
    expected = quantize(copy.deepcopy(model), [inputs], SPEC)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(inputs)
    report = quantize(compiled, [inputs], SPEC, replay=replay)
    assert [layer.rows for layer in report.layers] == [32, 32]
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert torch.equal(layer.codes, other.codes)


def test_variables_of_the_callers_context_are_there() -> None:
    variable: ContextVar[float] = ContextVar("factor")

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(8, 8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * variable.get())

    variable.set(2.0)
    report = quantize(Reads(), [torch.randn(20, 8)] * 2, SPEC)
    assert [layer.rows for layer in report.layers] == [40, 40]


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
    again = nn.Linear(6, 6)
    model = nn.Sequential(again, again)
    with refused(model, "the input of '0' holds NaN or Inf during calibration"):
        quantize(model, [torch.full((9, 6), torch.nan)], SPEC)


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
        *(
            ({flag: "no"}, f"{flag} must be True or False, got 'no'")
            for flag in ("bias_correction", "pack", "replay", "distributed", "deterministic")
        ),
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
