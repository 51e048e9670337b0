"""Mixtures of experts: those that one tensor holds, and those that few tokens come to."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapq_triton import QuantSpec, layer_error, load, quantize, save, solve
from sapq_triton.experts import Experts, unfuse
from sapq_triton.formats import find_format
from sapq_triton.formats.writer import check
from sapq_triton.hessian import HessianSum, Prior
from sapq_triton.language import quantize_folder
from sapq_triton.regularize import Moments, choose
from sapq_triton.targets import find_targets
from sapq_triton.waves import find_experts
from tests.tiny import MIXED, mixture, save_tokenizer

SPEC = QuantSpec(4)
# one solve without choices, as it can be repeated by hand
PLAIN: dict[str, Any] = dict(
    order="activation", candidates=1, rounds=0, damp=0.01, drift_correction=0.0, progress=False
)


# --- fused experts --------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FEW = dict(num_local_experts=4, num_experts_per_tok=2)
MANY = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
MODELS = {"Mixtral": FEW, "Qwen3Moe": MANY, "Olmoe": MANY, "GptOss": FEW}


def build(name: str, **sizes: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name], **sizes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases, too
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 50, (4, 12))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("name", MODELS)
def test_unfused_experts_put_out_the_same(name: str, tokens: Tensor) -> None:
    model = build(name)
    with_kernels = logits(model, tokens)
    model.set_experts_implementation("eager")
    expected, numbers = logits(model, tokens), sum(p.numel() for p in model.parameters())
    assert unfuse(model) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert sum(p.numel() for p in model.parameters()) == numbers
    outputs = logits(model, tokens)
    if name == "GptOss":  # whose own code multiplies a transposed weight
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(outputs, expected)
    torch.testing.assert_close(outputs, with_kernels, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(copy.deepcopy(model), tokens), outputs)
    assert unfuse(model) == []


def test_fused_experts_are_named_in_the_report(tokens: Tensor) -> None:
    model = build("Mixtral")
    report = quantize(model, [tokens], SPEC, **PLAIN)
    names = {f"model.layers.{i}.mlp.experts.{x}" for i in range(2) for x in ("gate_up_proj",
             "down_proj")}  # fmt: skip
    gates = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert set(report.skipped) == names | gates
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == (
        "a 4x16x24 parameter of MixtralExperts, no known kind of layer; "
        "sapq_triton.experts.unfuse makes layers of it"
    )
    assert "unfuse" not in report.skipped["model.layers.0.mlp.gate.weight"]


def test_small_and_flat_parameters_are_not_worth_a_word() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(100, 100)
            self.embedding = nn.Embedding(10, 100)
            self.small, self.flat = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(1, 99))
            self.large = nn.Parameter(torch.ones(1, 10, 10))

    assert set(find_targets(Odd(), SPEC, [], {})[1]) == {"large"}


def test_a_mixture_is_quantized_packed_and_stored(tokens: Tensor, tmp_path: Path) -> None:
    model = build("Mixtral")
    unfuse(model)
    plain, batches = copy.deepcopy(model), [*tokens.split(2)]
    options = dict(skip=["lm_head"], preset="fast", progress=False)
    quantize(plain, batches, QuantSpec(4, scale_dtype="float16"), **options)
    report = quantize(model, batches, QuantSpec(4, scale_dtype="float16"), pack=True, **options)
    assert len(report.layers) == 2 * (4 + 4 * 2)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="gptq do not know these experts: use format 'sapq'"):
        check(find_format("gptq"), plain, {})
    save(model, tmp_path / "own", report=report)
    assert torch.equal(logits(load(tmp_path / "own"), tokens), logits(model, tokens))


def test_a_mixture_from_a_folder_to_a_folder(tmp_path: Path) -> None:
    """Block by block, and read back by the names of the layers that experts have become."""
    sizes = dict(SIZES, vocab_size=256, hidden_size=64, intermediate_size=64)
    plain = build("Mixtral", **sizes).half()
    plain.save_pretrained(tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 400)
    report = quantize_folder(
        tmp_path / "plain", tmp_path / "out", calibration=tmp_path / "text.txt", bits=8,
        format="sapq", group_size=32, samples=4, sequence_length=32, device="cpu", progress=False,
    )  # fmt: skip
    assert {x.name for x in report.layers} >= {f"model.layers.1.mlp.experts.{i}.down_proj"
            for i in range(4)}  # fmt: skip
    assert not any("experts" in name for name in report.skipped)
    tokens = torch.randint(0, 256, (2, 12))
    expected, outputs = logits(plain, tokens), logits(load(tmp_path / "out"), tokens)
    assert (outputs - expected).float().norm() < 0.05 * expected.float().norm()


def test_experts_in_two_places_or_alone_are_refused() -> None:
    block = build("Mixtral").model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"must be in one place within a model, got \[''\]"):
        unfuse(block)
    with pytest.raises(ValueError, match=r"must be in one place within a model, got \['0', '1'\]"):
        unfuse(nn.ModuleList([block, block]))


# --- starved experts ------------------------------------------------------------------------------

COLUMNS, EXPERTS = 24, 4


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(COLUMNS, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.relu(self.up(x)))
        return result


class Mixture(nn.Module):
    """Tokens go to the expert that their last number names."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS) / COLUMNS**0.5
        self.experts = nn.ModuleList(Pair() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows, expert = x[:, :-1] @ self.mixing, x[:, -1]
        out = torch.zeros(len(x), 8)
        for number in expert.unique().int().tolist():
            out[expert == number] = self.experts[number](rows[expert == number])
        return out


def batch(*counts: int) -> Tensor:
    """So many tokens for each expert."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.cat([torch.randn(len(expert), COLUMNS), expert[:, None].float()], 1)


def hessian(x: Tensor) -> Tensor:
    total = HessianSum(1, x.shape[1])
    total.add(x)
    return total.hessian()


def inputs(model: Mixture, batches: list[Tensor], expert: int) -> Tensor:
    return torch.cat([b[b[:, -1] == expert, :-1] for b in batches]) @ model.mixing


@pytest.mark.parametrize("replay", [False, True])
def test_what_an_expert_changes_in_place_counts_as_it_came(replay: bool) -> None:
    class Wipes(Pair):
        wipe: Any

        def forward(self, x: Tensor) -> Tensor:
            inner = F.relu(self.up(x))
            result: Tensor = self.down(inner)
            return result + type(self).wipe(inner).sum()

    torch.manual_seed(2)
    model = Mixture()
    model.experts = nn.ModuleList(Wipes() for _ in range(EXPERTS))
    options: dict[str, Any] = PLAIN | dict(drift_correction=0.5, replay=replay)
    batches, reports = [batch(90, 80, 70, 60) for _ in range(2)], []
    for wipe in (Tensor.zero_, torch.zeros_like):
        Wipes.wipe = staticmethod(wipe)
        reports.append(quantize(copy.deepcopy(model), batches, SPEC, **options))
    for layer, other in zip(*(report.layers for report in reports), strict=True):
        assert torch.equal(layer.codes, other.codes) and layer.error == other.error


def test_few_rows_count_beside_those_of_all() -> None:
    model, batches = Mixture(), [batch(100, 15, 3, 0), batch(100, 10, 2, 0)]
    original = copy.deepcopy(model)
    report = quantize(model, batches, SPEC, **PLAIN)
    rows = [inputs(model, batches, expert) for expert in range(EXPERTS)]
    everyone = torch.cat(rows)
    pool = hessian(everyone)
    for number, own in enumerate(rows):
        h, n, name = hessian(own), len(own), f"experts.{number}.up"
        note = f"{n} rows for 24 columns: the Hessian of 4 experts, of 230 rows, counts as 24 more"
        if n < COLUMNS:
            h = (n * h + COLUMNS * pool) / (n + COLUMNS)
        expected = solve(original.get_submodule(name).weight, h[0], SPEC, order="activation")
        assert torch.equal(report[name].codes[0], expected.codes)
        assert report[name].rows == n and (note in report[name].notes) == (n < COLUMNS)
    # no token comes to the last one: its second layer gets what its first would make of all
    last = original.experts[3]
    assert report["experts.3.down"].notes == (
        "no calibration row reached it",
        "0 rows for 16 columns: the Hessian of 4 experts, of 230 rows, counts as 16 more",
    )
    hidden = F.relu(last.up(everyone)).detach()
    expected = solve(last.down.weight, hessian(hidden)[0], SPEC, order="activation")
    assert torch.equal(report["experts.3.down"].codes[0], expected.codes)
    assert report["experts.3.down"].damp == 0.01 and report["experts.3.down"].fallbacks == 0


def test_damping_is_chosen_beside_a_prior() -> None:
    """On rows held out, for the Hessian that the prior is a part of."""
    model, batches = Mixture(), [batch(40, 30, 3, 3), batch(40, 30, 7, 7)]
    weights = {e: model.experts[e].up.weight.detach().clone() for e in (2, 3)}  # type: ignore
    report = quantize(model, batches, SPEC, **{**PLAIN, "damp": None})
    pool = hessian(torch.cat([inputs(model, batches, expert) for expert in range(EXPERTS)]))
    for expert, weight in weights.items():
        fit, other = (hessian(inputs(model, [part], expert)) for part in batches)
        seen = Moments((3 * fit + COLUMNS * pool) / (3 + COLUMNS), None)
        trust = choose(weight[None], seen, Moments(other, None), SPEC)
        alone = choose(weight[None], Moments(fit, None), Moments(other, None), SPEC)
        layer = report[f"experts.{expert}.up"]
        assert layer.damp == trust.damp != alone.damp
        assert "of 160 rows" in layer.notes[0]


def test_without_a_row_for_any_expert_there_is_no_prior() -> None:
    model = nn.ModuleDict({"first": nn.Linear(COLUMNS, 8), "mixture": Mixture()})
    report = quantize(
        model, [torch.randn(50, COLUMNS)], SPEC, forward=lambda m, x: m["first"](x), **PLAIN
    )
    layer = report["mixture.experts.0.up"]
    assert layer.notes == ("no calibration row reached it",)
    nearest = solve(model["mixture"].experts[0].up.weight, torch.eye(COLUMNS), SPEC,
                    order="nearest")  # fmt: skip
    assert torch.equal(layer.codes[0], nearest.codes)


def test_experts_are_told_from_layers_by_name() -> None:
    experts = (
        "layers.0.experts.0.w1", "layers.0.experts.1.w1", "layers.0.experts.0.w2",
        "layers.1.experts.0.w1", "layers.1.experts.1.w1", "mlp.experts.expert_0.wi",
        "mlp.experts.expert_1.wi", "experts.0", "experts.1",
    )  # fmt: skip
    others = (
        "layers.0.q", "layers.1.q", "shared_experts.0.up", "shared_experts.1.up",
        "last.experts.0.up", "mlp.experts.up.0", "mlp.experts.up.1",
    )  # fmt: skip
    root = nn.Module()
    for name in experts + others:
        place = root
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, nn.Linear(4, 4))
    targets, _ = find_targets(root, SPEC, [], {})
    found = [
        {name: [target.name for target in inside] for name, inside in block.items()}
        for block in find_experts(targets)
    ]
    assert len(found) == 4 and found[0]["layers.0.experts.0"] == [experts[0], experts[2]]
    assert {n for block in found for inside in block.values() for n in inside} == {*experts}


def test_experts_that_cannot_be_run_have_no_prior() -> None:
    class Container(Mixture):
        def __init__(self) -> None:
            super().__init__()
            pairs = ({"up": pair.up, "down": pair.down} for pair in self.experts)
            self.experts = nn.ModuleList(nn.ModuleDict(pair) for pair in pairs)

        def forward(self, x: Tensor) -> Tensor:
            layers: Any = self.experts[0]
            result: Tensor = layers["down"](layers["up"](x[:, :-1]))
            return result

    report = quantize(Container(), [batch(3)], SPEC, **PLAIN)
    note = "fewer rows than columns, and no prior"
    assert report["experts.0.up"].notes == (note,) and report["experts.0.up"].rows == 3
    assert report["experts.1.up"].notes == (note, "no calibration row reached it")


def test_a_prior_helps_where_rows_are_fewer_than_columns() -> None:
    """On new rows, summed over problems, against the own Hessian and rounding to nearest."""
    columns, spec = 64, QuantSpec(3)
    totals = dict.fromkeys(("nearest", "own", "prior"), 0.0)
    for _ in range(4):
        shared = torch.randn(columns, columns) * torch.logspace(-1, 0.5, columns)
        x = [torch.randn(200, columns) @ (shared + 0.5 * torch.randn(columns, columns))
             for _ in range(6)]  # fmt: skip
        weight = torch.randn(48, columns)
        own, test = (2 / len(part) * part.T @ part for part in (x[0][:20], x[0][20:]))
        rest = torch.cat([x[0][:20], *x[1:]])
        prior = Prior(2 / len(rest) * rest.T @ rest, len(rest), 6)
        joined, _ = prior.joined(own.clone(), None, 20)
        for name, h, order in (
            ("nearest", own, "nearest"), ("own", own, "sensitivity"),
            ("prior", joined, "sensitivity"),
        ):  # fmt: skip
            result = solve(weight, h, spec, order=order)  # type: ignore[arg-type]
            totals[name] += float(layer_error(weight, result.dequantize(), test))
    assert totals["prior"] < 0.8 * totals["own"] and totals["prior"] < 0.8 * totals["nearest"]


def test_experts_keep_their_mode() -> None:
    model = build("Mixtral").train()
    unfuse(model)
    block = model.model.layers[0].mlp.experts
    assert (
        isinstance(block, Experts)
        and block.training
        and block.get_submodule("0.down_proj").training
    )


# --- waves ----------------------------------------------------------------------------------------


def shapes_solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []

    def spied(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(weight.shape))
        return solve(weight, *args, **kwargs)

    monkeypatch.setattr("sapq_triton.solving.solve", spied)
    return seen


ONE_BY_ONE = ("sapq_triton.waves.LEAST_WAVE", 10**9)


@pytest.mark.parametrize("options", [PLAIN, dict(preset="fast", drift_correction=0.5,
                                                 progress=False)])  # fmt: skip
def test_experts_are_solved_together(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the codes of one after another, in a batch for each of their layers."""
    model, batches = mixture()
    alone = copy.deepcopy(model)
    seen = shapes_solved(monkeypatch)
    report = quantize(model, batches, SPEC, **options)
    assert seen == [(1, 24, 24), (1, 6, 24), (6, 32, 24), (6, 24, 16), (1, 24, 24), (1, 4, 24)]
    monkeypatch.setattr(*ONE_BY_ONE)
    expected = quantize(alone, batches, SPEC, **options)
    assert len(seen) == 6 + 4 + 12
    assert {x.name for x in report.layers} == {x.name for x in expected.layers}
    for layer in expected.layers:
        assert torch.equal(report[layer.name].codes, layer.codes), layer.name
        assert report[layer.name].notes == layer.notes
        for name in ("rows", "drift_correction"):
            assert getattr(report[layer.name], name) == getattr(layer, name)
        assert report[layer.name].error == pytest.approx(layer.error, rel=1e-5)
    torch.testing.assert_close(model(batches[0]), alone(batches[0]))


def test_what_is_chosen_is_chosen_for_each_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one damping are a batch."""
    model, batches = mixture()
    alone = copy.deepcopy(model)
    seen = shapes_solved(monkeypatch)
    report = quantize(model, batches, SPEC, progress=False)
    damps = {report[f"1.experts.{n}.down"].damp for n in range(6)}
    assert len(damps) > 1
    assert sum(shape[1:] == (24, 16) for shape in seen) == len(damps)
    monkeypatch.setattr(*ONE_BY_ONE)
    expected = quantize(alone, batches, SPEC, progress=False)
    for layer in expected.layers:
        assert torch.equal(report[layer.name].codes, layer.codes), layer.name


@pytest.mark.parametrize("replay", [False, True])
def test_waves_and_batches_hold_so_many_numbers(
    replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = mixture(8)
    copies = [copy.deepcopy(model) for _ in range(2)]
    whole = quantize(model, batches, SPEC, **PLAIN)
    seen = shapes_solved(monkeypatch)
    monkeypatch.setattr("sapq_triton.waves.WAVE", 5 * 24 * 24)
    waves = quantize(copies[0], batches, SPEC, replay=replay, **PLAIN)
    assert [shape[0] for shape in seen] == [1, 1, 5, 3, 8, 1, 1]
    monkeypatch.setattr("sapq_triton.solving.BATCH", 3 * 24 * 24)
    seen.clear()
    parts = quantize(copies[1], batches, SPEC, replay=replay, **PLAIN)
    assert [shape[0] for shape in seen] == [1, 1, 3, 2, 3, 6, 2, 1, 1]
    for layer in whole.layers:
        assert torch.equal(waves[layer.name].codes, layer.codes)
        assert torch.equal(parts[layer.name].codes, layer.codes)


def change_norm(model: Any) -> None:
    model[1].experts.append(nn.BatchNorm1d(MIXED))


def change_shared(model: Any) -> None:
    model[1].experts[1].up = model[1].experts[0].up


def change_twice(model: Any) -> None:
    model.forward = lambda x: model[1](model[1](x))


def change_chunks(model: Any) -> None:
    """Each half of a batch is a call of the block, and comes to experts of its own."""
    block = model[1]

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(self.offset + torch.arange(len(x)) % 3, 6)

    block.gate = Gate()

    def forward(x: Tensor) -> Tensor:
        x, out = model[0](x), []
        for offset in (3, 0) if x[0, 0] > 0 else (0, 3):
            block.gate.offset = offset
            out.append(block(x[:70]))
        return model[2](torch.cat(out))

    model.forward = forward


def change_in_place(model: Any) -> None:
    block = model[1]
    inner = block.forward

    def forward(x: Any) -> Tensor:
        result = inner(x[0])
        x[0].add_(1)
        return result

    block.forward = forward
    model.forward = lambda x: model[2](block((model[0](x),)))


def change_cache(model: Any) -> None:
    class Cache:
        seen: Any = None

    block = model[1]
    inner = block.forward

    def forward(x: Tensor, cache: Cache) -> Tensor:
        cache.seen = x if cache.seen is None else cache.seen + x
        return inner(cache.seen)

    block.forward = forward
    model.forward = lambda x: model[2](block(model[0](x), cache=Cache()))


def change_chain(model: Any) -> None:
    """Each expert on what the one before it puts out."""
    block = model[1]

    def forward(x: Tensor) -> Tensor:
        for expert in block.experts:
            x = x + expert(x)
        return block.behind(x)

    block.forward = forward


def change_nested(model: Any) -> None:
    """What runs the experts runs those of another block, too."""
    block, (other, _) = model[1], mixture(4)
    block.before = other[1]
    inner = block.forward
    block.forward = lambda x: inner(block.before(x))
    for name in ("gate", "behind"):
        delattr(other[1], name)
    other[1].forward = lambda x: sum(expert(x.clone()) for expert in other[1].experts)


@pytest.mark.parametrize(
    "change",
    [change_norm, change_shared, change_twice, change_chunks, change_in_place, change_cache,
     change_chain, change_nested],
)  # fmt: skip
@pytest.mark.parametrize("replay", [False, True])
def test_unusual_experts_are_solved_one_by_one(
    change: Any, replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = mixture()
    change(model)
    seen = shapes_solved(monkeypatch)
    quantize(model, batches, SPEC, replay=replay, **PLAIN)
    assert {shape[0] for shape in seen} == ({1, 4} if change is change_nested else {1})


def test_an_expert_that_no_row_comes_to_waits_for_no_wave() -> None:
    model, batches = mixture()
    with torch.no_grad():
        model[1].gate.bias[2] = -1e9  # type: ignore[union-attr, operator]
    report = quantize(model, batches, SPEC, **PLAIN)
    lonely = report["1.experts.2.down"]
    assert lonely.rows == 0 and "no calibration row reached it" in lonely.notes
    assert all(report[f"1.experts.{n}.down"].rows > 0 for n in (0, 1, 3, 4, 5))


def test_drift_is_that_of_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the quantized model sends as many tokens to an expert, but others, none are pairs."""
    model, _ = mixture()
    seen: list[tuple[Tensor, Tensor]] = []
    add = HessianSum.add_drift

    def spied(self: HessianSum, inputs: Tensor, original: Tensor, window: Any = None) -> None:
        seen.append((inputs, original))
        add(self, inputs, original, window)

    monkeypatch.setattr(HessianSum, "add_drift", spied)
    expert = model[1].experts[0]  # type: ignore[index]
    tokens = torch.randn(40, COLUMNS)

    class Swapped(nn.Module):
        """The quantized copy of a model leaves out token 7, and takes one more at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(COLUMNS, COLUMNS)
            self.experts = nn.ModuleList([expert, copy.deepcopy(expert)])
            self.was = self.first.weight.detach().clone()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            changed = not torch.equal(self.first.weight, self.was)
            kept = torch.arange(40) != (7 if changed else 39)
            result: Tensor = self.experts[0](x[kept]) + self.experts[1](x[kept])
            return result

    report = quantize(
        Swapped(), [tokens], SPEC, preset="fast", drift_correction=1.0, progress=False
    )
    now, before = next((x, y) for x, y in seen if len(x) == 39)
    assert (now[:7] != before[:7]).any(1).all()  # quantization changed them
    assert torch.equal(now[7:], before[7:])  # others: no drift
    assert any("drift of some inputs is unknown" in n for n in report["experts.0.gate"].notes)


@pytest.mark.parametrize("first", ["experts", "another"])
def test_experts_that_share_their_input_with_others_are_no_wave(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leads, the others would be solved before their own turn."""

    class Everywhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(COLUMNS, 8) for _ in range(5))
            self.another = nn.Linear(COLUMNS, 8)

        def forward(self, x: Tensor) -> Tensor:
            both = [*self.experts, self.another]
            outputs = [layer(x) for layer in (both if first == "experts" else both[::-1])]
            return torch.stack(outputs).sum(0)

    seen = shapes_solved(monkeypatch)
    quantize(Everywhere(), [torch.randn(80, COLUMNS)], SPEC, **PLAIN)
    assert seen == [(1, 48, 24)]


def test_experts_called_by_keyword_and_of_several_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mixture(8)
    model.forward = lambda x: model[2](model[1](x=model[0](x)))  # type: ignore
    alone = copy.deepcopy(model)
    alone.forward = lambda x: alone[2](alone[1](x=alone[0](x)))  # type: ignore
    seen = shapes_solved(monkeypatch)
    overrides = {"1.experts.[0-2].*": QuantSpec(3), "1.experts.7.down": QuantSpec(2)}
    report = quantize(model, batches, SPEC, overrides=overrides, **PLAIN)
    assert [shape[0] for shape in seen] == [1, 1, 3, 5, 3, 4, 1, 1, 1]
    monkeypatch.setattr(*ONE_BY_ONE)
    expected = quantize(alone, batches, SPEC, overrides=overrides, **PLAIN)
    for layer in expected.layers:
        assert torch.equal(report[layer.name].codes, layer.codes), layer.name
        assert report[layer.name].spec == layer.spec
    for layer in report.layers:  # whoever keeps one layer keeps no other
        for tensor in (layer.codes, layer.scale, layer.zero_point):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert sum(x.seconds_solve for x in report.layers) < 1.5 * report.stages["solves"]


def test_experts_of_grouped_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is two problems of the batch."""

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Conv1d(8, 6, 3, groups=2) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([e(x * n) for n, e in enumerate(self.experts, 1)]).sum(0)

    model = Convolutions()
    alone, seen = copy.deepcopy(model), shapes_solved(monkeypatch)
    batches = [torch.randn(4, 8, 20) * torch.arange(1, 9)[:, None]]
    report = quantize(model, batches, SPEC, **PLAIN)
    assert seen == [(8, 3, 12)]
    monkeypatch.setattr(*ONE_BY_ONE)
    for layer in quantize(alone, batches, SPEC, **PLAIN).layers:
        assert torch.equal(report[layer.name].codes, layer.codes)
        assert report[layer.name].error == pytest.approx(layer.error, rel=1e-5)


@pytest.mark.parametrize("options, copies", [(dict(drift_correction=0.5), 2),
                                             (dict(deterministic=True), 5)])  # fmt: skip
def test_a_wave_counts_all_sums_that_it_needs(
    options: Any, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapq_triton.waves.LEAST_WAVE", 1)
    monkeypatch.setattr("sapq_triton.waves.WAVE", 2 * copies * 24 * 24)
    model, batches = mixture()
    seen = shapes_solved(monkeypatch)
    quantize(model, batches, SPEC, **{**PLAIN, **options})
    assert [shape[0] for shape in seen if shape[1] == 32] == [2, 2, 2]


@pytest.mark.parametrize("replay", [False, True])
def test_inputs_of_the_full_precision_model_do_not_stay(
    replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["sapq_triton.quantize"]
    most, runs = 0, []

    class Watched(module._Run):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(self)

        def _run_batch(self, *args: Any) -> None:
            nonlocal most
            super()._run_batch(*args)
            most = max(most, len(self._original))

    monkeypatch.setattr(module, "_Run", Watched)
    model, batches = mixture()
    quantize(model, batches, SPEC, preset="fast", drift_correction=0.5, replay=replay,
             progress=False)  # fmt: skip
    assert runs[0]._original == {} and most <= 6 * len(batches)
    assert all(target.prior is None for target in runs[0].targets.values())
