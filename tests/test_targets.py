"""Which layers are quantized, which are left alone, and which share their inputs."""

import copy
import importlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sapq_triton import QuantSpec, Report, ops, reference, solve
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.targets import InputTracker, VersionedRef

SPEC = QuantSpec(bits=3)
# as `solve` by itself
SIMPLE: dict[str, Any] = dict(starts=1, candidates=1, rounds=0, damp=0.01, drift_correction=0.0)
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False, **SIMPLE)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers "0", "2", ... with ReLU between them."""
    modules: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        modules += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Decoder(nn.Module):
    """One layer of a transformer: grouped-query attention and a gated MLP, over padded tokens."""

    def __init__(self, width: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, width)
        self.query, self.key = nn.Linear(width, 16), nn.Linear(width, 8, bias=False)
        self.value, self.out = nn.Linear(width, 6), nn.Linear(12, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 18), nn.Linear(width, 18)
        self.down, self.head = nn.Linear(18, width), nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        y = self.norm1(x)
        query = self.query(y).unflatten(-1, (2, 8)).transpose(1, 2)  # two heads for one key
        scores = query @ self.key(y)[:, None].mT
        weights = scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf).softmax(-1)
        x = x + self.out((weights @ self.value(y)[:, None]).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        result: Tensor = self.head(x)
        return result


def padded(*lengths: int) -> dict[str, Tensor]:
    """Random tokens in sequences of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(40, mask.shape), "attention_mask": mask.long()}


class TiedPair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inward, self.between = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outward = nn.Linear(6, 6, bias=bias)
        self.outward.weight = self.inward.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outward(F.relu(self.between(F.relu(self.inward(x)))))
        return result


def test_skip_and_overrides() -> None:
    names = ["stem", "deep", "point", "down", "head"]
    model = nn.Sequential(OrderedDict((name, nn.Linear(6, 6)) for name in names))
    before = copy.deepcopy(model.state_dict())
    overrides = {"*": replace(SPEC, bits=6), "d*": replace(SPEC, bits=5), "down": SPEC}
    report = quantize(
        model, [torch.randn(9, 6)], QuantSpec(8), skip=["stem", "h*"], overrides=overrides
    )
    bits = {layer.name: layer.spec.bits for layer in report.layers}
    assert bits == {"deep": 5, "point": 6, "down": 3}
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


def test_layers_that_differ_but_share_a_weight_are_left_alone() -> None:
    model = TiedPair(bias=False)
    report = quantize(model, [torch.randn(9, 6)], SPEC)
    assert [layer.name for layer in report.layers] == ["between"]
    assert report.skipped == {
        "inward": "its weight is shared with ['outward']",
        "outward": "its weight is shared with ['inward']",
    }


def test_weights_tied_through_their_memory_are_one() -> None:
    expected, model = TiedPair(), TiedPair()
    model.load_state_dict(expected.state_dict())
    model.outward.weight = nn.Parameter(model.inward.weight.data)
    batch = torch.randn(20, 6)
    reports = [quantize(m, [batch], SPEC) for m in (expected, model)]
    assert [layer.name for layer in reports[1].layers] == ["inward", "between"]
    assert reports[1]["inward"].notes == reports[0]["inward"].notes
    for name in ("inward", "between"):
        assert torch.equal(reports[1][name].codes, reports[0][name].codes)
    assert torch.equal(model.outward.weight, reports[1]["inward"].dequantize()[0])


def test_twin_of_a_skipped_layer_is_left_alone() -> None:
    report = quantize(TiedPair(), [torch.randn(9, 6)], SPEC, skip=["outward"])
    assert report.skipped == {
        "outward": "as asked",
        "inward": "its weight is shared with ['outward']",
    }


def test_head_that_is_tied_to_an_embedding_is_left_alone() -> None:
    model = Decoder(tied=True)
    before = model.embedding.weight.detach().clone()
    report = quantize(model, [padded(4, 6)], SPEC)
    assert report.skipped == {"head": "its weight is shared with ['embedding']"}
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, before)
    assert len(report.layers) == 7


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
        "attention.out_proj": "nn.MultiheadAttention reads its weight without calling it",
        "attention.in_proj_weight": (
            "a 24x8 parameter of MultiheadAttention, no known kind of layer"
        ),
    }
    assert [layer.name for layer in report.layers] == ["last"]
    for name, tensor in model.attention.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weight_norm_is_left_alone() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    report = quantize(model, [torch.randn(9, 6)], SPEC)
    assert report.skipped == {"0": "its weight is computed from other parameters"}
    assert [layer.name for layer in report.layers] == ["1"]


def module_of_quantize() -> Any:
    """As an attribute of the package, `quantize` is the function."""
    return importlib.import_module("sapq_triton.quantize")


@contextmanager
def each_alone() -> Iterator[None]:
    """Every layer with a Hessian and a solve of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_quantize(), "find_leaders", lambda targets, batches: None)
        yield


def quantize_both(model: nn.Module, *args: Any, **options: Any) -> tuple[nn.Module, Report, Report]:
    """The model with every layer solved alone, its report, and that of `model` itself."""
    alone = copy.deepcopy(model)
    with each_alone():
        expected = quantize(alone, *args, **options)
    return alone, expected, quantize(model, *args, **options)


def groups(report: Report) -> list[set[str]]:
    """Layers that were solved together, by their notes."""
    found: list[set[str]] = []
    for layer in report.layers:
        notes = [note for note in layer.notes if note.startswith("solved together with")]
        if notes:
            (note,) = notes
            others = note.removeprefix("solved together with ").removesuffix(": one Hessian")
            if group := next((group for group in found if layer.name in group), None):
                assert others in group
            else:
                found.append({layer.name, *others.split(", ")})
    return found


def assert_equal(model: nn.Module, alone: nn.Module, report: Report, expected: Report) -> None:
    """Bit for bit, and in the same order; sums over rows may be taken in another one."""
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert layer.name == other.name
        for field in ("kind", "shape", "spec", "order", "rows", "damp", "dead_columns", "bytes"):
            assert getattr(layer, field) == getattr(other, field), (layer.name, field)
        for field in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(layer, field), getattr(other, field)), (layer.name, field)
        assert layer.error == pytest.approx(other.error, rel=1e-5)
        assert layer.energy == pytest.approx(other.energy, rel=1e-5)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert report.corrected == pytest.approx(expected.corrected, rel=1e-4)


STATIC: list[Any] = ["natural", "activation", "min-pivot", "nearest"]


@pytest.mark.parametrize("order", [*STATIC, "obq"])
def test_shared_solve_equals_separate_ones(order: Any) -> None:
    model, batches = Decoder(), [padded(9, 4, 7), padded(5, 5), padded(8, 1, 6)]
    alone, expected, report = quantize_both(model, batches, SPEC, order=order)
    assert groups(expected) == []
    assert groups(report) == [{"query", "key", "value"}, {"gate", "up"}]
    assert_equal(model, alone, report, expected)
    names = ["query", "key", "value", "out", "gate", "up", "down", "head"]
    assert [layer.name for layer in report.layers] == names


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    if name == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
        shared = [{f"encoder.layer.{i}.attention.self.{x}" for x in ("query", "key", "value")}
                  for i in range(2)]  # fmt: skip
        distinct = 2 * 4 + 1  # with the pooler
    else:
        config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes)
        model = transformers.LlamaModel(config)
        shared = [{f"layers.{i}.{x}" for x in names} for i in range(2) for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )]  # fmt: skip
        distinct = 2 * 4
    batches = [padded(9, 4, 7), padded(5, 5)]
    with accumulations() as rows:
        alone, expected, report = quantize_both(model, batches, SPEC, order="activation")
    assert groups(report) == shared
    assert_equal(model, alone, report, expected)
    assert len(rows) == 2 * (len(report.layers) + distinct)


@contextmanager
def accumulations() -> Iterator[list[int]]:
    """Rows of each call of `ops.accumulate_hessian`."""
    rows: list[int] = []
    accumulate = ops.accumulate_hessian

    def counting(*args: Any) -> int:
        rows.append(accumulate(*args))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "accumulate_hessian", counting)
        yield rows


def test_one_hessian_per_input_and_one_solve_per_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def counting(weight: Tensor, *args: Any, **options: Any) -> object:
        shapes.append(tuple(weight.shape))
        return solve(weight, *args, **options)

    monkeypatch.setattr("sapq_triton.solving.solve", counting)
    with accumulations() as rows:
        report = quantize(Decoder(), [padded(9, 4), padded(5, 3), padded(2, 8)], SPEC)
    assert rows == [13, 8, 10] * 5
    assert {layer.rows for layer in report.layers} == {31}
    assert shapes == [(1, 30, 12), (1, 12, 12), (1, 36, 12), (1, 12, 18), (1, 40, 12)]


def test_report_of_layers_that_share_a_solve() -> None:
    report = quantize(Decoder(), [padded(9, 4), padded(5, 3)], replace(SPEC, group_size=5))
    query, key, value = (report[name] for name in ("query", "key", "value"))
    one_group = "group_size 5 does not divide 12 columns: one group per row"
    assert query.notes == (one_group, "solved together with key, value: one Hessian")
    assert key.notes == (one_group, "solved together with query: one Hessian")
    assert value.notes == (one_group, "solved together with query: one Hessian")
    assert report["down"].notes == ("group_size 5 does not divide 18 columns: one group per row",)
    assert query.seconds_hessian > 0 == key.seconds_hessian == value.seconds_hessian
    assert min(layer.seconds_solve for layer in report.layers) > 0
    assert sum(x.seconds_solve + x.seconds_hessian for x in report.layers) < report.seconds
    for layer in report.layers:  # whoever keeps one layer keeps no other
        for tensor in (layer.codes, layer.scale, layer.zero_point):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_shared_order_costs_little() -> None:
    """All rows have one order of columns: over several tiles, each layer would choose another."""
    model, batches = Decoder(width=48), [padded(*[20] * 10) for _ in range(2)]
    options: dict[str, Any] = dict(block=8, skip=["out", "gate", "up", "down", "head"])
    _, expected, report = quantize_both(model, batches, SPEC, **options)
    assert groups(report) == [{"query", "key", "value"}]
    total, alone = (sum(layer.error for layer in r.layers) for r in (report, expected))
    assert total != alone
    assert total == pytest.approx(alone, rel=0.05)


class Branches(nn.Module):
    """A residual block that halves its input on both ways, the shortcut's convolution last."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(4, 6, 1, 2, groups=groups), nn.BatchNorm2d(6)
        self.expand, self.norm2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.shortcut, self.norm3 = nn.Conv2d(4, 8, 1, 2, groups=groups), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(4, 8, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.expand(F.relu(self.norm1(self.reduce(x)))))
        return y + self.norm3(self.shortcut(x)) + self.wide(x)


@pytest.mark.parametrize("channels", [1, 2], ids=["plain", "groups"])
def test_convolutions_that_share_their_patches(channels: int) -> None:
    model, data = Branches(channels), torch.randn(12, 4, 6, 6).split(5)
    alone, expected, report = quantize_both(model, data, SPEC, order="activation")
    assert groups(report) == [{"reduce", "shortcut"}]
    assert_equal(model, alone, report, expected)
    assert [x.name for x in report.layers] == ["reduce", "expand", "shortcut", "wide"]
    assert set(report.corrected) == {"norm1", "norm2", "norm3", "wide"}


@pytest.mark.parametrize("difference", [dict(stride=2), dict(padding=0), dict(dilation=2)])
def test_convolutions_with_other_patches(difference: dict[str, Any]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = dict(kernel_size=3, padding=1)
            self.one = nn.Conv2d(4, 5, **options)
            self.other = nn.Conv2d(4, 5, **options | difference)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    model, data = Both(), torch.randn(12, 4, 6, 6).split(5)
    alone, expected, report = quantize_both(model, data, SPEC)
    assert groups(report) == []
    assert_equal(model, alone, report, expected)


class Pair(nn.Module):
    """Two layers, and how the input of each is made of one tensor."""

    def __init__(self, ways: Callable[[Tensor], Iterable[tuple[int, Tensor]]]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.pair = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 4)])
        self.ways = ways

    def forward(self, x: Tensor) -> None:
        for index, inputs in self.ways(F.relu(self.first(x))):
            self.pair[index](inputs)
            del inputs  # or the loop would keep it alive


def in_memory_of_the_dead(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Two inputs at one address, one after the other."""
    memory = torch.zeros(1000)
    numpy = memory.numpy()
    numpy[: x.numel()] = x.flatten()
    yield 0, torch.from_numpy(numpy[: x.numel()]).view(x.shape)
    numpy[: x.numel()] = x.flatten() * 2 - 1
    yield 1, torch.from_numpy(numpy[: x.numel()]).view(x.shape)


def in_place(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield 0, x
    x.sub_(0.5)
    yield 1, x


def in_place_through_a_view(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield 0, x
    x[0].mul_(-1)
    yield 1, x


def now_and_then(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The same in most batches: not in those of three rows."""
    yield 0, x
    yield 1, x.neg() if len(x) == 3 else x


def in_inference_mode(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    with torch.inference_mode():
        x = x.clone()
        yield 0, x
        x.sub_(0.5)
        yield 1, x


class Tagged(Tensor):
    """A tensor that may be more than its elements."""


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(lambda x: [(0, x), (1, x.clone())], id="copy"),
        pytest.param(lambda x: [(0, x), (1, x[:])], id="view"),
        pytest.param(lambda x: [(0, x), (1, x[None])], id="shape"),
        pytest.param(lambda x: [(0, x), (1, x.flip(0))], id="other"),
        pytest.param(lambda x: [(0, x), (1, x), (1, x)], id="twice"),
        pytest.param(lambda x: [(0, x), (0, x), (1, x), (1, x)], id="both-twice"),
        pytest.param(lambda x: [(0, y := x.as_subclass(Tagged)), (1, y)], id="subclass"),
        pytest.param(lambda x: [(0, x), (1, x)][: 1 + (len(x) > 3)], id="not-always"),
        in_memory_of_the_dead,
        in_place,
        in_place_through_a_view,
        in_inference_mode,
        now_and_then,
    ],
)
def test_inputs_that_are_not_the_same(ways: Any) -> None:
    model, batches = Pair(ways), torch.randn(23, 6).split(10)
    alone, expected, report = quantize_both(model, batches, SPEC)
    assert groups(report) == []
    assert_equal(model, alone, report, expected)


def test_pair_that_does_share() -> None:
    """What the models of the test before have in common is no obstacle."""
    model = Pair(lambda x: [(0, x), (1, x)])
    report = quantize(model, torch.randn(23, 6).split(10), SPEC)
    assert groups(report) == [{"pair.0", "pair.1"}]


def test_experts_share_in_the_batches_that_reach_them() -> None:
    model = Pair(lambda x: [(0, x), (1, x)] if len(x) > 3 else [])
    report = quantize(model, torch.randn(23, 6).split(10), SPEC)
    assert groups(report) == [{"pair.0", "pair.1"}]
    assert [layer.rows for layer in report.layers] == [23, 20, 20]


def test_specs_must_be_equal() -> None:
    model, batches = Decoder(), [padded(9, 4), padded(5, 3)]
    overrides = {"value": replace(SPEC, bits=4), "up": replace(SPEC, scale_search="absmax")}
    alone, expected, report = quantize_both(model, batches, SPEC, overrides=overrides)
    assert groups(report) == [{"query", "key"}]
    assert_equal(model, alone, report, expected)
    assert report["value"].spec.bits == 4


def test_skipped_layer_shares_nothing() -> None:
    report = quantize(Decoder(), [padded(9, 4)], SPEC, skip=["query", "up"])
    assert groups(report) == [{"key", "value"}]


@pytest.mark.parametrize("used", [True, False])
def test_tied_layers_share_nothing(used: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.third = (nn.Linear(6, 6) for _ in range(3))
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.one(x) + self.third(x)
            return result + self.other(x) if used else result

    model, batches = Tied(), torch.randn(23, 6).split(10)
    alone, expected, report = quantize_both(model, batches, SPEC)
    assert groups(report) == []
    assert_equal(model, alone, report, expected)


class Parting(nn.Module):
    """Two layers get the same input until the one before them is quantized."""

    def __init__(self, batches: Iterable[int], missing: bool = False) -> None:
        super().__init__()
        self.first, self.one, self.other = (nn.Linear(6, 6) for _ in range(3))
        self.original = self.first.weight.detach().clone()
        self.batches, self.missing = batches, missing

    def forward(self, x: Tensor, attention_mask: Tensor) -> None:
        y = F.relu(self.first(x))
        self.one(y)
        if torch.equal(self.first.weight, self.original) or len(x) not in self.batches:
            self.other(y)
        elif not self.missing:
            self.other(y.neg())


def features(*sizes: int) -> list[dict[str, Tensor]]:
    """Batches of so many sequences of four tokens, a quarter of them padding."""
    return [
        {"x": torch.randn(size, 4, 6), "attention_mask": torch.rand(size, 4) < 0.75}
        for size in sizes
    ]


@pytest.mark.parametrize("sizes", [[11], [3], [11, 9, 3]], ids=["first", "last", "all"])
def test_ways_that_part_once_layers_are_quantized(sizes: list[int]) -> None:
    """Also found out at the last batch, while others wait for what their leader brought."""
    model, batches = Parting(sizes), features(11, 9, 3)
    alone, expected, report = quantize_both(model, batches, SPEC)
    assert_equal(model, alone, report, expected)
    assert report["other"].notes == ("once quantized, not on the inputs of one: solved alone",)


def test_layer_that_is_missed_once_others_are_quantized() -> None:
    model = Parting([11, 12], missing=True)
    weight = model.other.weight.detach().clone()
    layer = quantize(model, features(11, 12), SPEC)["other"]
    assert layer.notes == ("no calibration row reached it",)
    assert layer.rows == 0
    codes, _, _ = reference.quantize_groups(weight[None], 6, SPEC.qmax, SPEC.symmetric, SPEC.shrink)
    assert torch.equal(layer.codes, codes)


def test_error_between_layers_that_share_leaves_no_trace() -> None:
    model, batches, calls = Pair(lambda x: []), torch.randn(23, 6).split(10), 0

    def ways(x: Tensor) -> Iterator[tuple[int, Tensor]]:
        nonlocal calls
        yield 0, x
        calls += 1
        if calls == 5:  # in the second pass, where the first of the pair is quantized
            assert not torch.equal(model.state_dict()["pair.0.weight"], before["pair.0.weight"])
            raise RuntimeError("on purpose")
        yield 1, x

    model.ways = ways
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"):
        quantize(model, batches, SPEC)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert groups(quantize(model, batches, SPEC)) == [{"pair.0", "pair.1"}]


def test_first_pass_keeps_no_activation() -> None:
    model, batches = nn.Sequential(mlp(6, 5, 5, 4), nn.BatchNorm1d(4)), list(torch.randn(4, 9, 6))
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def forward(module: nn.Module, x: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        for child in module[0]:  # type: ignore[index]
            x = child(x)
            seen.append(weakref.ref(x))
        module[1](x)  # type: ignore[index]

    quantize(model, batches, SPEC, forward=forward)
    assert alive[:4] == [0, 0, 0, 0]


def test_versioned_ref() -> None:
    x = torch.zeros(3)
    ref = VersionedRef(x)
    assert ref.matches(x)
    assert not ref.matches(x[:]) and not ref.matches(x.clone())
    x[0] = 1
    assert not ref.matches(x) and VersionedRef(x).matches(x)
    with torch.inference_mode():
        x = torch.zeros(3)
    assert not VersionedRef(x).matches(x)


def test_input_tracker() -> None:
    tracker, x, y = InputTracker(), torch.zeros(3), torch.zeros(3)
    for name, inputs in {"a": x, "b": y, "c": x, "d": x[:]}.items():
        tracker.add(name, inputs)
    x += 1
    tracker.add("e", x)
    tracker.add("a", x)
    assert tracker.numbers == {"a": [0, 3], "b": [1], "c": [0], "d": [2], "e": [3]}


def test_input_tracker_does_not_take_a_new_tensor_for_a_dead_one() -> None:
    """Python gives the id of one to the next, and the allocator its memory."""
    tracker, ids = InputTracker(), []
    for name in map(str, range(100)):
        x = torch.zeros(1000)
        ids.append((id(x), x.data_ptr()))
        tracker.add(name, x)
        del x
    assert len(set(ids)) < 100
    assert len({number for numbers in tracker.numbers.values() for number in numbers}) == 100
