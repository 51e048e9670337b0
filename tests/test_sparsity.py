"""Pruning on the way: literal float64 loops, exact patterns and counts, and what it gains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, SolveResult, layer_error, layers, load, ops, save, solve
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.sparsity import STEP, Sparsity
from sapq_triton.spec import Order

quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False)
ORDERS = tuple(order for order in get_args(Order) if order not in ("obq", "nearest"))
LOOPS = ("sensitivity", "activation")  # one of each loop; the others are other permutations
DAMP = 0.01
SURE = 1e-3  # relative distance of two costs, or of a cost from a limit: float32 sees the same


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [R, C] and a Hessian [C, C] of correlated inputs of unequal size."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=random) / columns**0.5
    size = torch.logspace(-0.4, 0.4, columns)[torch.randperm(columns, generator=random)]
    x = torch.randn(6 * columns, columns, generator=random) @ mixing * size
    return torch.randn(rows, columns, generator=random), 2 / len(x) * x.T @ x


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_result(actual: SolveResult, expected: SolveResult) -> None:
    for name in ("codes", "scale", "zero_point", "columns"):
        assert_same(getattr(actual, name), getattr(expected, name))


def is_zero(result: SolveResult) -> Tensor:
    return result.dequantize() == 0


def zeros_of_groups(zero: Tensor, m: int, window: int = 1) -> Tensor:
    """Zeros in each group of m channels at one position of the window, [..., R, groups]"""
    channels = zero.unflatten(-1, (-1, m, window))
    return channels.sum(-2).flatten(-2)


# --- the literal loop -----------------------------------------------------------------------------


@dataclass
class Literal:
    """Tile after tile, step after step, one column after another, each with the inverse of what
    remains. Follows the order and the codes of `result` and asserts each choice that is clear."""

    weight: Tensor
    hessian: Tensor
    result: SolveResult
    compared: int = 0

    def __post_init__(self) -> None:
        self.w, h = self.weight.double().clone(), self.hessian.double()
        self.h = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
        each = self.w.shape[1] // self.result.scale.shape[1]
        grid = (self.result.scale, self.result.zero_point)
        self.scale, self.zero = (t.double().repeat_interleave(each, 1) for t in grid)
        self.codes, self.spec = self.result.codes.double(), self.result.spec
        assert self.result.columns is not None
        self.columns = self.result.columns.tolist()

    def rounded(self, columns: list[int]) -> Tensor:
        code = (self.w[:, columns] / self.scale[:, columns]).round() + self.zero[:, columns]
        return code.clamp(0, self.spec.qmax)

    def value(self, code: Tensor, columns: list[int]) -> Tensor:
        return (code - self.zero[:, columns]) * self.scale[:, columns]

    def inverse_of(self, columns: list[int]) -> Tensor:
        return torch.linalg.inv(self.h[columns][:, columns])

    def choose(self, step: list[int], left: list[int], done: int) -> tuple[Tensor, Tensor]:
        """pruned, and whether that is clear: bool [R, len(step)] each"""
        R, T = len(self.w), len(step)
        cost = self.w[:, step].square() / self.inverse_of(left).diagonal()[:T]
        pruned, clear = (torch.zeros(R, T, dtype=torch.bool) for _ in range(2))
        if self.spec.n_of_m is None:
            share = self.spec.share
            count = round(share * R * (done + T)) - round(share * R * done)
            low, high = cost.flatten().sort()[0][count - 1 : count + 1]
            return cost <= low, (cost > (1 + SURE) * low) | (cost < (1 - SURE) * high)
        n, m = self.spec.n_of_m
        for group in {c // m for c in step}:
            places = [step.index(group * m + i) for i in range(m)]  # whole groups only
            each = cost[:, places]
            low, high = (each.kthvalue(k, dim=1, keepdim=True).values for k in (m - n, m - n + 1))
            pruned[:, places] = each <= low
            clear[:, places] = (each > (1 + SURE) * low) | (each < (1 - SURE) * high)
        return pruned, clear

    def tile(self, start: int, end: int) -> None:
        m = self.spec.n_of_m[1] if self.spec.n_of_m else 1
        width = max(STEP // m, 1) * m
        for first in range(start, end, width):
            step = self.columns[first : min(first + width, end)]
            pruned, clear = self.choose(step, self.columns[first:], first)
            for k, c in enumerate(step):
                steps = self.w[:, [c]] / self.scale[:, [c]]
                own = torch.where(pruned[:, k], self.zero[:, c], self.rounded([c])[:, 0])
                tie = ((steps - steps.floor() - 0.5).abs() < 1e-4)[:, 0] & ~pruned[:, k]
                sure = clear[:, k] & ~tie
                assert_same(self.codes[sure, c], own[sure])
                self.compared += int(sure.sum())
                left = self.columns[first + k :]
                a = self.inverse_of(left)
                error = self.w[:, [c]] - self.value(self.codes[:, [c]], [c])
                self.w[:, left] -= error / a[0, 0] * a[0]

    def sensitivity(self, left: list[int]) -> dict[int, float]:
        """Of each group of columns that are left: the sum over its columns."""
        m = self.spec.n_of_m[1] if self.spec.n_of_m else 1
        error = self.w[:, left] - self.value(self.rounded(left), left)
        cost = error.square().sum(0) / self.inverse_of(left).diagonal()
        total: dict[int, float] = {}
        for c, value in zip(left, cost.tolist(), strict=True):
            total[c // m] = total.get(c // m, 0) + value
        return total


SPARSITIES = ["2:4", "1:4", "3:8", "5:20", 0.5, 0.3]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_static_orders_are_the_literal_loop(order: Order, sparsity: str | float) -> None:
    weight, hessian = problem(9, 40)
    result = solve(weight, hessian, QuantSpec(4, 8, sparsity=sparsity), order=order)
    literal = Literal(weight, hessian, result)
    literal.tile(0, 40)
    assert literal.compared > 0.95 * weight.numel()


@pytest.mark.parametrize("block", [20, 32])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sensitivity_is_the_literal_loop(sparsity: str | float, block: int) -> None:
    weight, hessian = problem(9, 80)
    spec = QuantSpec(4, sparsity=sparsity)
    result = solve(weight, hessian, spec, block=block, sweeps=0)
    literal, m = Literal(weight, hessian, result), spec.n_of_m[1] if spec.n_of_m else 1
    block = max(block // m, 1) * m
    for start in range(0, 80, block):
        left = literal.columns[start:]
        total = literal.sensitivity(left)
        chosen = {c // m for c in left[:block]}
        assert len(chosen) == len(left[:block]) // m
        others = [value for group, value in total.items() if group not in chosen]
        assert min(total[group] for group in chosen) >= (1 - SURE) * max(others, default=0)
        literal.tile(start, min(start + block, 80))
    assert literal.compared > 0.95 * weight.numel()


@pytest.mark.parametrize("sparsity", ["2:4", 0.4])
def test_sweeps_end_where_no_kept_code_can_be_better(sparsity: str | float) -> None:
    """One tile of all columns: descent on the whole error, over weights that were not pruned."""
    weight, hessian = problem(6, 24)
    spec, errors = QuantSpec(3, sparsity=sparsity), []
    damped = hessian.double() + DAMP * hessian.diagonal().mean() * torch.eye(24).double()
    first = solve(weight, hessian, spec, sweeps=0)
    for sweeps in (0, 1, 2, 50):
        result = solve(weight, hessian, spec, sweeps=sweeps)
        errors.append(layer_error(weight, result.dequantize(), damped).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    # what is zero in the first pass may be a weight that was rounded so: those may come back
    came_back = is_zero(first) & ~is_zero(result)
    assert came_back.sum() < is_zero(first).sum() / 4
    for c in range(24):
        for step in (-1, 1):
            other = result.codes.double()
            other[:, c] = (other[:, c] + step).clamp(0, spec.qmax)
            values = [(t - result.zero_point) * result.scale for t in (result.codes, other)]
            before, after = (((weight - v) @ damped * (weight - v)).sum(1) for v in (
                value.double() for value in values))  # fmt: skip
            kept = ~is_zero(result)[:, c]
            assert (after >= before * (1 - 1e-6))[kept].all()


# --- patterns and counts --------------------------------------------------------------------------


def masks_of(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> list[Tensor]:
    """Which weights were forced to be zero, as the solver chose them, without sweeps."""
    masks: list[Tensor] = []
    original = ops.solve_columns

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        codes, error = original(*arguments)
        weight, zero_point, group, mask = (arguments[i] for i in (0, 4, 5, 9))
        assert mask.shape == weight.shape
        zero = zero_point.gather(2, group[:, None].expand(-1, weight.shape[1], -1))
        assert_same(codes[mask].float(), zero[mask])
        assert_same(error[mask], weight[mask])
        masks.append(mask)
        return codes, error

    monkeypatch.setattr(ops, "solve_columns", watched)
    solve(*args, sweeps=0, **options)
    monkeypatch.setattr(ops, "solve_columns", original)
    return masks


@pytest.mark.parametrize("order", LOOPS)
@pytest.mark.parametrize("share", [0.5, 0.37, 0.999])
def test_a_share_is_met_exactly(
    order: Order, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(7, 53)
    spec = QuantSpec(3, sparsity=share)
    masks = masks_of(monkeypatch, weight, hessian, spec, order=order, block=24)
    count = sum(int(mask.sum()) for mask in masks)
    assert count == round(share * 7 * 53)
    assert sum(mask.shape[2] for mask in masks) == 53
    assert solve(weight, hessian, spec, order=order, block=24).sparsity >= count / (7 * 53)


PATTERNS = [  # sparsity, columns, window
    pytest.param("2:4", 40, 1, id="2:4"),
    pytest.param("1:4", 40, 1, id="1:4"),
    pytest.param("4:8", 40, 1, id="4:8"),
    pytest.param("1:2", 38, 1, id="1:2"),
    pytest.param("2:3", 39, 1, id="2:3"),
    pytest.param("7:24", 72, 1, id="wider-than-a-step"),
    pytest.param("2:4", 72, 9, id="window"),
    pytest.param("3:8", 8, 1, id="one-group"),
]


@pytest.mark.parametrize("block", [1, 30])
@pytest.mark.parametrize("order", [*LOOPS, "nearest"])
@pytest.mark.parametrize("sparsity, columns, window", PATTERNS)
def test_every_group_has_its_zeros(
    sparsity: str, columns: int, window: int, order: Order, block: int
) -> None:
    weight, hessian = problem(6, columns)
    spec = QuantSpec(4, sparsity=sparsity)
    result = solve(weight, hessian, spec, order=order, block=block, window=window)
    n, m = map(int, sparsity.split(":"))
    assert (zeros_of_groups(is_zero(result), m, window) >= m - n).all()
    assert result.columns is not None
    assert result.columns.sort()[0].tolist() == list(range(columns))


@pytest.mark.parametrize("order", [*ORDERS, "nearest"])
def test_without_coupling_the_smallest_go_and_no_others(order: Order) -> None:
    """Weights between 1 and 2 on a fine grid: nothing is rounded to zero."""
    size = 1 + torch.rand(11, 24)
    weight = size * torch.where(torch.rand(11, 24) < 0.5, -1, 1)
    result = solve(weight, torch.eye(24), QuantSpec(8, sparsity="3:8"), order=order)
    rank = size.unflatten(1, (3, 8)).argsort(2).argsort(2).flatten(1)
    assert_same(is_zero(result), rank < 5)
    assert result.sparsity == 5 / 8
    result = solve(weight, torch.eye(24), QuantSpec(8, sparsity=0.4), order=order, block=24)
    assert is_zero(result).sum() == round(0.4 * 11 * 24)
    if order == "nearest":
        assert_same(is_zero(result), size <= size.flatten().sort()[0][105])


@pytest.mark.parametrize("order", [*ORDERS, "nearest"])
def test_equal_costs(order: Order) -> None:
    """A thousand ties: still the exact number, the first ones of a group."""
    weight = torch.ones(5, 32)
    pairs = solve(weight, torch.eye(32), QuantSpec(4, sparsity="2:4"), order=order)
    assert_same(is_zero(pairs), (torch.arange(32) % 4 < 2).expand(5, 32))
    half = solve(weight, torch.eye(32), QuantSpec(4, sparsity=0.5), order=order)
    assert is_zero(half).sum() == 80
    nothing = solve(torch.zeros(5, 32), torch.eye(32), QuantSpec(4, sparsity=0.5), order=order)
    assert nothing.sparsity == 1


def test_positions_by_hand() -> None:
    pairs = Sparsity(0.5, group=2, window=3)  # channels 0 1 | 2 3, three positions each
    columns = torch.tensor([[11, 0, 5, 2, 8, 3]])
    assert columns.gather(1, pairs.by_group(columns)).tolist() == [[0, 3, 2, 5, 8, 11]]
    value = torch.tensor([[1.0, 2.0, 9.0, 0.0, 7.0, 3.0]])  # 0, 3: 5; 2, 5: 9; 8, 11: 8
    picked = pairs.largest(value, columns, 4)
    assert columns.gather(1, picked).tolist() == [[2, 5, 8, 11]]
    cost = torch.tensor([[[3.0, 9.0, 1.0, 2.0, 4.0, 8.0]]])
    pruned = pairs.cheapest(cost, columns, 0)
    assert pruned.tolist() == [[[True, False, True, False, False, True]]]
    wide = Sparsity(0.5, group=STEP)
    columns = torch.arange(2 * STEP).flip(0)[None]
    assert_same(wide.in_steps(columns), torch.arange(2 * STEP)[None])
    mixed = torch.arange(2 * STEP).view(2, STEP).T.flatten()[None]  # 0, 16, 1, 17, ...
    halves = mixed.gather(1, wide.in_steps(mixed))
    assert_same(halves, torch.arange(2 * STEP)[None])


# --- beside the dense solver ----------------------------------------------------------------------


@pytest.mark.parametrize("order", get_args(Order))
def test_a_share_of_nothing_is_dense(order: Order) -> None:
    weight, hessian = problem(8, 48)
    expected = solve(weight, hessian, QuantSpec(3, 12), order=order, block=20)
    spec = QuantSpec(3, 12, sparsity=0.0)
    actual = solve(weight, hessian, spec, order=order, block=20, window=3)
    assert_same(actual.codes, expected.codes)
    assert_same(actual.scale, expected.scale)
    if expected.columns is not None:
        assert_same(actual.columns, expected.columns)


@pytest.mark.parametrize("order", ORDERS)
def test_a_share_below_one_weight_is_nearly_dense(order: Order) -> None:
    """The loop in steps, which prunes nothing, is the loop over all columns."""
    weight, hessian = problem(8, 48)
    expected = solve(weight, hessian, QuantSpec(3), order=order)
    actual = solve(weight, hessian, QuantSpec(3, sparsity=1e-4), order=order)
    assert_same(actual.columns, expected.columns)
    assert (actual.codes != expected.codes).double().mean() < 0.01  # but for ties


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_compensation_beats_magnitude(sparsity: str | float, order: Order) -> None:
    weight, hessian = problem(24, 96, seed=1)
    spec = QuantSpec(4, sparsity=sparsity)
    nearest = solve(weight, hessian, spec, order="nearest")
    result = solve(weight, hessian, spec, order=order)
    assert result.report.error < 0.6 * nearest.report.error


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("order", LOOPS)
def test_triton_gives_the_same_codes(
    order: Order, sparsity: str | float, device: torch.device
) -> None:
    weight, hessian = (t.to(device) for t in problem(5, 28))
    spec = QuantSpec(3, 14, sparsity=sparsity)
    expected = solve(weight, hessian, spec, order=order, block=20, backend="reference")
    grid = {"scale": expected.scale, "zero_point": expected.zero_point}
    actual = solve(weight, hessian, spec, order=order, block=20, backend="triton", **grid)
    assert_same_result(actual, expected)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("order", [*LOOPS, "nearest"])
def test_batch_is_one_by_one(order: Order, sparsity: str | float) -> None:
    cases = [problem(5, 36, seed) for seed in range(3)]
    weight, hessian = (torch.stack(tensors) for tensors in zip(*cases, strict=True))
    spec = QuantSpec(4, 12, sparsity=sparsity)
    batch = solve(weight, hessian, spec, order=order, block=16, window=3)
    assert batch.sparsity.shape == (3,)
    for b, (w, h) in enumerate(cases):
        alone = solve(w, h, spec, order=order, block=16, window=3)
        for name in ("codes", "scale", "columns", "sparsity"):
            assert_same(getattr(batch, name)[b], getattr(alone, name))
    together = solve(weight, hessian[0], spec, order=order, block=16, window=3)
    rows = solve(weight.flatten(0, 1), hessian[0], spec, order=order, block=16, window=3)
    assert_same(together.codes.flatten(0, 1), rows.codes)


@pytest.mark.parametrize("order", LOOPS)
def test_window_is_channels_last(order: Order) -> None:
    """Groups at a distance are those of columns laid side by side."""
    weight, hessian = problem(6, 48)
    spec = QuantSpec(4, sparsity="2:4")
    side_by_side = torch.arange(48).view(-1, 6).T.flatten()
    expected = solve(weight, hessian, spec, order=order, block=16, window=6)
    weight, hessian = weight[:, side_by_side], hessian[side_by_side][:, side_by_side]
    actual = solve(weight, hessian, spec, order=order, block=16)
    assert_same(actual.codes, expected.codes[:, side_by_side])


@pytest.mark.parametrize("order", LOOPS)
def test_runs_are_identical(order: Order) -> None:
    weight, hessian = problem(16, 96)
    spec = QuantSpec(3, 32, sparsity=0.5)
    first = solve(weight, hessian, spec, order=order, block=32)
    for _ in range(3):
        assert_same_result(solve(weight, hessian, spec, order=order, block=32), first)


# --- Hessians that are of little use --------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("order", LOOPS)
def test_dead_columns_are_pruned_as_average_ones(order: Order, sparsity: str | float) -> None:
    weight, hessian = problem(8, 32)
    spec = QuantSpec(4, sparsity=sparsity)
    some = hessian.clone()
    some[[3, 4, 5, 20]], some[:, [3, 4, 5, 20]] = 0, 0
    result = solve(weight, some, spec, order=order, block=16)
    assert result.report.dead_columns == 4 and not result.report.fallback
    assert result.sparsity >= 0.5 and result.dequantize()[:, [3, 4, 5, 20]].any()
    if sparsity == "2:4":
        assert (zeros_of_groups(is_zero(result), 4) >= 2).all()
    nothing = solve(weight, torch.zeros(32, 32), spec, order=order, block=16)
    if sparsity == "2:4":  # no row was seen: by magnitude
        by_magnitude = solve(weight, hessian, spec, order="nearest")
        assert_same(nothing.codes, by_magnitude.codes)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("order", LOOPS)
def test_bad_hessians(order: Order, sparsity: str | float) -> None:
    """One problem that needs damping, one that is hopeless, and one that neither disturbs."""
    weight, good = problem(6, 24)
    spec, bad = QuantSpec(4, sparsity=sparsity), []
    for coupling in (1.05, 1e4):
        matrix = good / good.diagonal().mean()
        matrix[:2], matrix[:, :2] = 0, 0
        matrix[:2, :2] = torch.tensor([[1.0, coupling], [coupling, 1.0]])
        bad.append(matrix)
    batch = solve(weight.expand(3, 6, 24), torch.stack([*bad, good]), spec, order=order, block=8)
    assert batch.report.fallback.tolist() == [False, True, False]
    assert batch.report.damp[[0, 2]].tolist() == pytest.approx([0.1, DAMP])
    assert_same(batch.codes[1], solve(weight, good, spec, order="nearest").codes)
    assert_same(batch.codes[2], solve(weight, good, spec, order=order, block=8).codes)
    assert (batch.sparsity >= 0.5).all()
    if sparsity == "2:4":
        assert (zeros_of_groups(is_zero(batch), 4) >= 2).all()


# --- whole models ---------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers that share their input, and convolutions of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.left, self.right = nn.Linear(8, 12), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.stem(x).relu())).relu().mean((2, 3))
        return torch.cat([self.left(x), self.right(x)], 1)


def quantized(spec: QuantSpec, **options: Any) -> tuple[Net, Report, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(6, 3, 9, 9) for _ in range(2)]
    return model, quantize(model, batches, spec, **options), batches


def test_model_of_a_pattern() -> None:
    model, report, _ = quantized(QuantSpec(4, sparsity="2:4"))
    for name in ("grouped", "left", "right"):
        layer = report[name]
        window = layers.window_size(model.get_submodule(name))
        matrix = layers.weight_matrix(model.get_submodule(name))
        assert window == (9 if name == "grouped" else 1)
        assert (zeros_of_groups(matrix == 0, 4, window) >= 2).all()
        assert layer.spec.sparsity == "2:4"
        assert layer.sparsity == (matrix == 0).double().mean() >= 0.5
    note = "groups of sparsity 2:4 do not divide {} input channels: not pruned"
    for name, channels in (("stem", 3), ("depthwise", 1)):
        assert report[name].notes == (note.format(channels),)
        assert report[name].spec == QuantSpec(4) and report[name].sparsity < 0.5
    assert "solved together with right: one Hessian" in report["left"].notes
    assert str(report).count("of the weights are zero") == 3
    line = next(line for line in str(report).splitlines() if line.startswith("left"))
    assert f"{report['left'].sparsity:.1%} of the weights are zero" in line


def test_model_of_a_share() -> None:
    """Each layer has it, also those that share a Hessian, which are solved as if alone."""
    spec = QuantSpec(4, sparsity=0.5)
    # damping and drift correction are chosen for those together
    fixed: dict[str, Any] = dict(damp=0.01, drift_correction=0.0)
    _, report, _ = quantized(spec, batchnorm="keep", bias_correction=False, **fixed)
    assert report["left"].notes == ("shares the Hessian of right, solved by itself",)
    assert report["right"].notes == ("shares the Hessian of left, solved by itself",)
    for layer in report.layers:
        _, R, C = layer.codes.shape
        assert layer.sparsity >= round(0.5 * R * C) / (R * C)
    _, alone, _ = quantized(spec, batchnorm="keep", bias_correction=False, skip=["left"], **fixed)
    assert_same(report["right"].codes, alone["right"].codes)


def test_overrides_and_packed_codes(tmp_path: Any) -> None:
    overrides = {"right": QuantSpec(3), "left": QuantSpec(4, sparsity=0.75)}
    model, report, batches = quantized(
        QuantSpec(4, sparsity="1:4"), overrides=overrides, skip=["stem", "depthwise"], pack=True
    )
    assert report["left"].sparsity >= 0.75 > report["right"].sparsity
    assert report["grouped"].sparsity >= 0.75
    assert "of the weights are zero" not in str(report).splitlines()[-3]
    save(model, tmp_path / "out", "sapq")
    again = load(tmp_path / "out", Net())
    assert_same(again(batches[0]), model(batches[0]))


@pytest.mark.parametrize("where", ["spec", "overrides"])
def test_model_is_left_alone_where_the_order_does_not_prune(where: str) -> None:
    model, sparse = Net(), QuantSpec(4, sparsity="2:4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = sparse if where == "spec" else QuantSpec(4)
    overrides = {"left": sparse} if where == "overrides" else {}
    with pytest.raises(ValueError, match="order 'obq' does not prune"):
        quantize(model, [torch.randn(2, 3, 9, 9)], spec, overrides=overrides, order="obq")
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name])
