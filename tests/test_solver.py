"""The solver against literal float64 loops, its invariants, and what it does when H is bad."""

from collections.abc import Iterator
from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, SolveResult, dequantize, layer_error, ops, solve
from sapq_triton.spec import Order, ScaleDtype
from sapq_triton.tile import bring_both_forward, bring_forward, to_front

ORDERS = tuple(order for order in get_args(Order) if order != "nearest")
KNOWN_ORDERS = ("natural", "activation", "min-pivot")  # neither weight nor grid decides
ROW_ORDERS = (*KNOWN_ORDERS, "obq")  # one row does not change what happens to another
DAMP = 0.01

SHAPES = [  # R, C, group_size
    pytest.param(1, 32, -1, id="one-row"),
    pytest.param(5, 1, -1, id="one-column"),
    pytest.param(13, 45, 15, id="ragged-groups"),
    pytest.param(16, 160, 32, id="over-one-tile"),
    pytest.param(9, 137, -1, id="prime-columns"),
    pytest.param(12, 48, 1, id="group-of-one"),
]
GRIDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These matrices are so small that threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [R, C] and a well-conditioned Hessian [C, C] of correlated, unequal columns."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=random) / columns**0.5 / 2
    size = torch.logspace(-0.4, 0.4, columns)[torch.randperm(columns, generator=random)]
    x = torch.randn(6 * columns, columns, generator=random) @ mixing * size
    return torch.randn(rows, columns, generator=random), 2 / len(x) * x.T @ x


def ill_conditioned(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of low rank with a little noise: the Hessian has a condition number of about 1e6."""
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(4 * columns, columns // 4, generator=random).double()
    x = latent @ torch.randn(columns // 4, columns, generator=random).double()
    x += 0.02 * torch.randn(x.shape, generator=random)
    return torch.randn(rows, columns, generator=random), (2 / len(x) * x.T @ x).float()


class Grid(NamedTuple):
    """Scale and zero point of each weight, float64 [R, C]; levels of a codebook if any."""

    scale: Tensor
    zero_point: Tensor
    qmax: int
    levels: tuple[float, ...] = ()

    @classmethod
    def of(cls, result: SolveResult) -> "Grid":
        each = result.codes.shape[1] // result.scale.shape[1]
        grid = (result.scale, result.zero_point)
        scale, zero_point = (t.double().repeat_interleave(each, 1) for t in grid)
        levels = getattr(result.spec.levels, "levels", ())
        return cls(scale, zero_point, result.spec.qmax, levels)

    def at(self, columns: Tensor) -> "Grid":
        return self._replace(scale=self.scale[:, columns], zero_point=self.zero_point[:, columns])

    def distances(self, weight: Tensor) -> Tensor:
        """Of w / scale from each level, [R, C, 16]"""
        return ((weight / self.scale)[..., None] - torch.tensor(self.levels).double()).abs()

    def code(self, weight: Tensor) -> Tensor:
        if self.levels:
            return self.distances(weight).argmin(-1).double()  # of equal ones the first
        return ((weight / self.scale).round() + self.zero_point).clamp(0, self.qmax)

    def value(self, code: Tensor) -> Tensor:
        if self.levels:
            return torch.tensor(self.levels).double()[code.long()] * self.scale
        return (code - self.zero_point) * self.scale

    def from_tie(self, weight: Tensor) -> Tensor:
        """Distance of w / scale from the nearest tie: below float32 noise, either code is right."""
        if self.levels:
            kept = [code for code, level in enumerate(self.levels) if level or code < 8]  # one zero
            first, second = self.distances(weight)[..., kept].sort(-1)[0][..., :2].unbind(-1)
            return (second - first) / 2
        steps = weight / self.scale
        low = steps.floor() + self.zero_point
        inside = (low >= 0) & (low < self.qmax)  # beyond the grid both sides have the same code
        return torch.where(inside, 0.5 - (steps - steps.round()).abs(), 0.5)

    @property
    def half_step(self) -> float:
        """The largest error within the range of the grid of scale 1."""
        levels = torch.tensor(self.levels or range(2)).sort()[0]
        return (levels[1:] - levels[:-1]).max().item() / 2

    @property
    def noise(self) -> float:
        return 3e-5 + 2e-6 * self.qmax


def grid_for(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The grid that `solve` finds, a little wider: its largest weights are ties by construction."""
    group_size = spec.columns_per_group(weight.shape[1])
    _, scale, zero_point = ops.quantize_groups(
        weight[None], group_size, spec.levels, spec.symmetric, spec.shrink
    )
    return {"scale": 1.01 * scale[0], "zero_point": zero_point[0]}


RANK_NOISE = 1e-3  # columns whose sensitivities or pivots are as close may change places


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    h = hessian.double()
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    return grid.code(weight.double()).to(torch.uint8)


def textbook_gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, columns: Tensor, follow: Tensor | None = None
) -> Tensor:
    """GPTQ as published: three factorizations, then one column after another, without blocks.

    ->  codes [R, C]. `follow`: codes to take instead of its own, after asserting that they are the
    same; but for ties, where float32 may fall on the other side and all that comes after changes.
    """
    h = damped(hessian)[columns][:, columns]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = weight.double()[:, columns]
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for k, at in enumerate(columns.split(1)):
        now = w[:, k : k + 1]
        code = grid.at(at).code(now)
        if follow is not None:
            sure = grid.at(at).from_tie(now) > grid.noise
            own, code = code, follow[:, at].double()
            assert_same(code[sure], own[sure])
            assert (code - own).abs().max() <= 1
        codes[:, at] = code.to(torch.uint8)
        error = (now - grid.at(at).value(code)) / upper[k, k]
        w[:, k:] -= error * upper[k, k:]
    return codes


def check_sensitivity(
    weight: Tensor, hessian: Tensor, result: SolveResult, block: int, sweeps: int = 0
) -> None:
    """The literal loop, tile after tile, with a new inverse of what remains for each.

    Follows the order and the codes of `result`, and asserts that it would have chosen them, but
    where float32 may see another order or the other side of a tie.
    """
    columns, whole = result.columns, Grid.of(result)
    assert columns is not None and columns.sort()[0].tolist() == list(range(weight.shape[1]))
    w, h, compared = weight.double().clone(), damped(hessian), 0.0
    for start in range(0, len(columns), block):
        rest, tile = columns[start:], columns[start : start + block]
        a = torch.linalg.inv(h[rest][:, rest])
        now, grid = w[:, rest], whole.at(rest)
        cost = (now - grid.value(grid.code(now))).square().sum(0) / a.diagonal()
        T = len(tile)
        assert (cost[:T].min() >= (1 - RANK_NOISE) * cost[T:]).all()
        curvature = torch.linalg.inv(a[:T, :T])
        ranks = curvature.diagonal()
        assert (ranks[:-1] >= (1 - RANK_NOISE) * ranks[1:]).all()

        # one column after another, with the error so far in the later ones of the tile
        now, grid = w[:, tile], whole.at(tile)
        codes, margin = torch.zeros_like(now), torch.full((len(w),), 0.5, dtype=torch.float64)
        running, a_tile = now.clone(), a[:T, :T].clone()
        for k in range(T):
            at = torch.tensor([k])
            codes[:, at] = grid.at(at).code(running[:, at])
            margin = margin.minimum(grid.at(at).from_tie(running[:, at])[:, 0])
            left = running[:, at] - grid.at(at).value(codes[:, at])
            running -= left / a_tile[k, k] * a_tile[k]
            a_tile = a_tile - torch.outer(a_tile[k], a_tile[k]) / a_tile[k, k]
        # coordinate descent on e K e^T
        for k in list(range(T)) * sweeps:
            at, error = torch.tensor([k]), now - grid.value(codes)
            error[:, k] = 0
            best = now[:, at] + (error @ curvature[:, at]) / curvature[k, k]
            codes[:, at] = grid.at(at).code(best)
            margin = margin.minimum(grid.at(at).from_tie(best)[:, 0])
        sure = margin > whole.noise
        compared += sure.double().mean().item() * T / len(columns)
        assert_same(result.codes[:, tile][sure].double(), codes[sure])

        error = now - grid.value(result.codes[:, tile].double())
        w[:, rest] -= error @ curvature @ a[:T]
    assert compared > 0.7


def check_obq(weight: Tensor, hessian: Tensor, result: SolveResult, codes: Tensor) -> None:
    """OBC's loop for one row after another, each with an inverse of its own.

    Asserts that it finds `codes` in all rows, but for those in which two columns or two codes were
    so close at some step that float32 may choose the other one.
    """
    grid, sure = Grid.of(result), 0
    for r in range(len(weight)):
        row = grid._replace(scale=grid.scale[r : r + 1], zero_point=grid.zero_point[r : r + 1])
        w, a = weight[r : r + 1].double().clone(), torch.linalg.inv(damped(hessian))
        rest = torch.arange(w.shape[1])
        expected = torch.zeros(w.shape[1], dtype=torch.uint8)
        closest = torch.tensor(torch.inf, dtype=torch.float64)
        while len(rest):
            code = row.at(rest).code(w[:, rest])
            error = (w[:, rest] - row.at(rest).value(code))[0].square()
            steps = error.sqrt() / row.scale[0, rest]
            outlier = bool((steps > row.half_step).any())  # off the grid: the worst one goes first
            score = -error if outlier else error / a.diagonal()[rest]
            ranked, order = score.sort()
            gap = (ranked[1:2] - ranked[:1]) / ranked[:2].abs().max()
            tie, edge = row.at(rest).from_tie(w[:, rest])[0], (steps - row.half_step).abs()
            close = torch.cat([tie, edge]).min() / (2 * row.half_step)
            closest = torch.cat([closest[None], close[None], gap]).min()
            j = int(rest[order[0]])
            expected[j] = int(code[0, order[0]])
            left = w[0, j] - row.value(expected[None].double())[0, j]
            w -= left / a[j, j] * a[j]
            a = a - torch.outer(a[j], a[j]) / a[j, j]
            rest = rest[rest != j]
        if closest > 1e-4:
            assert_same(codes[r], expected)
            sure += 1
    assert sure > 0.7 * len(weight)


def check_known_order(order: str, hessian: Tensor, columns: Tensor | None) -> Tensor:
    """`columns`, after asserting that they are the order of this name."""
    assert columns is not None
    h = damped(hessian)
    if order == "natural":
        assert_same(columns, torch.arange(len(h)))
    elif order == "activation":
        assert_same(columns, h.diagonal().argsort(descending=True))
    else:  # pivoted LDL: the smallest diagonal of the Schur complement is eliminated first
        assert columns.sort()[0].tolist() == list(range(len(h)))
        for k in range(len(h) - 1, -1, -1):
            j, rest = columns[k], columns[: k + 1]
            assert h[j, j] <= (1 + RANK_NOISE) * h.diagonal()[rest].min()
            h = h - torch.outer(h[j], h[j]) / h[j, j]
    return columns


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- the loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", KNOWN_ORDERS)
@pytest.mark.parametrize("R, C, group_size", SHAPES)
def test_known_orders_are_gptq(
    R: int, C: int, group_size: int, order: Order, bits: int, symmetric: bool
) -> None:
    (weight, hessian), spec = problem(R, C), QuantSpec(bits, group_size, symmetric)
    result = solve(weight, hessian, spec, order=order, **grid_for(weight, spec))
    columns = check_known_order(order, hessian, result.columns)
    textbook_gptq(weight, hessian, Grid.of(result), columns, follow=result.codes)


@pytest.mark.parametrize("order", KNOWN_ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_ill_conditioned_layer_error_is_that_of_gptq(order: Order, bits: int) -> None:
    weight, hessian = ill_conditioned(64, 128)
    result = solve(weight, hessian, QuantSpec(bits), order=order)
    columns = check_known_order(order, hessian, result.columns)
    codes = textbook_gptq(weight, hessian, Grid.of(result), columns)
    quantized = dequantize(codes, result.scale, result.zero_point)
    expected = layer_error(weight, quantized, hessian.double()).item()
    assert result.report.error.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("symmetric", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "block, sweeps", [(1, 0), (1, 2), (7, 0), (32, 0), (32, 1), (32, 3), (400, 0), (400, 2)]
)
@pytest.mark.parametrize(
    "R, C, group_size",
    [
        pytest.param(1, 32, -1, id="one-row"),
        pytest.param(14, 60, 12, id="ragged-groups"),
        pytest.param(20, 96, -1, id="three-tiles"),
    ],
)
def test_sensitivity_is_the_literal_loop(
    R: int, C: int, group_size: int, block: int, sweeps: int, bits: int, symmetric: bool
) -> None:
    (weight, hessian), spec = problem(R, C), QuantSpec(bits, group_size, symmetric)
    result = solve(weight, hessian, spec, block=block, sweeps=sweeps, **grid_for(weight, spec))
    check_sensitivity(weight, hessian, result, block, sweeps)


def test_sensitivity_ranked_once_is_gptq_in_that_order() -> None:
    (weight, hessian), spec = problem(20, 64), QuantSpec(3, 16)
    result = solve(
        weight, hessian, spec, order="sensitivity-static", block=16, **grid_for(weight, spec)
    )
    columns, grid, w = result.columns, Grid.of(result), weight.double()
    assert columns is not None and columns.sort()[0].tolist() == list(range(64))
    error = (w - grid.value(grid.code(w))).square().sum(0)
    cost = (error / torch.linalg.inv(damped(hessian)).diagonal())[columns]
    assert (cost[:-1] >= (1 - RANK_NOISE) * cost[1:]).all()
    textbook_gptq(weight, hessian, grid, columns, follow=result.codes)


def test_one_tile_of_all_columns_is_activation_order() -> None:
    """Then (A_TT^-1)_cc is H_cc."""
    (weight, hessian), spec = problem(20, 64), QuantSpec(3, 16)
    grid = grid_for(weight, spec)
    result = solve(weight, hessian, spec, block=64, sweeps=0, **grid)
    columns = check_known_order("activation", hessian, result.columns)
    textbook_gptq(weight, hessian, Grid.of(result), columns, follow=result.codes)


def test_sweeps_end_where_no_single_code_can_be_better() -> None:
    """One tile of all columns: coordinate descent on the whole error of the damped Hessian."""
    (weight, hessian), spec = problem(6, 24), QuantSpec(3, 8)
    h, errors = damped(hessian), []
    for sweeps in (0, 1, 2, 3, 50):
        result = solve(weight, hessian, spec, block=24, sweeps=sweeps)
        errors.append(layer_error(weight, result.dequantize(), h).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    grid, codes = Grid.of(result), result.codes.double()
    for c in range(24):
        for step in (-1, 1):
            other = codes.clone()
            other[:, c] = (other[:, c] + step).clamp(0, spec.qmax)
            delta = [weight.double() - grid.value(each) for each in (codes, other)]
            before, after = (((d @ h) * d).sum(1) for d in delta)
            assert (after >= before * (1 - 1e-6)).all()


@pytest.mark.parametrize("symmetric", GRIDS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block", [1, 5, 24, 128])
def test_obq_is_the_literal_loop_whatever_the_block(block: int, bits: int, symmetric: bool) -> None:
    (weight, hessian), spec = problem(12, 24), QuantSpec(bits, 12, symmetric)
    weight[3] *= 1 + torch.arange(24) // 12 * 9  # two groups of very different scale
    grid = grid_for(weight, spec)
    result = solve(weight, hessian, spec, order="obq", block=block, **grid)
    assert result.columns is None
    check_obq(weight, hessian, result, result.codes)


def test_obq_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(7, 20)
    whole = solve(weight, hessian, QuantSpec(3), order="obq", block=6)
    monkeypatch.setattr("sapq_triton.obq.MEMORY", 4 * 20 * 20 * 3)
    assert_same(solve(weight, hessian, QuantSpec(3), order="obq", block=6).codes, whole.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_triton_gives_the_same_codes(order: Order, device: torch.device) -> None:
    weight, hessian = (t.to(device) for t in problem(7, 26))
    spec = QuantSpec(3, 13)
    expected = solve(weight, hessian, spec, order=order, block=10, backend="reference")
    actual = solve(
        weight, hessian, spec, order=order, block=10, backend="triton",
        scale=expected.scale, zero_point=expected.zero_point,
    )  # fmt: skip
    assert_same(actual.codes, expected.codes)
    if expected.columns is not None:
        assert_same(actual.columns, expected.columns)


# --- the algebra of a tile ------------------------------------------------------------------------


def test_any_choice_in_a_tile_is_compensated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With random Q_T, the next tile starts from the W_F of least tr((W - Q) H (W - Q)^T)."""
    (weight, hessian), block = problem(6, 25), 10
    scale, zero_point = torch.full((6, 1), 0.3), torch.full((6, 1), 4.0)
    started = []

    def random_choice(weight: Tensor, running: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        started.append(running[0].clone())
        codes = torch.randint(0, 8, weight.shape)
        return codes.to(torch.uint8), weight - (codes - 4) * 0.3

    monkeypatch.setattr(ops, "solve_columns", random_choice)
    result = solve(
        weight, hessian, QuantSpec(3), block=block, sweeps=0,
        scale=scale, zero_point=zero_point,
    )  # fmt: skip
    assert result.columns is not None and len(started) == 3
    x = torch.linalg.cholesky(damped(hessian)).T  # a matrix of inputs with this Hessian
    outputs = weight.double() @ x.T
    for number, running in enumerate(started):
        done, rest = result.columns.split((block * number, 25 - block * number))
        wanted = outputs - result.dequantize()[:, done].double() @ x[:, done].T
        best = torch.linalg.lstsq(x[:, rest], wanted.T).solution.T
        torch.testing.assert_close(
            running[:, :block].double(), best[:, :block], rtol=1e-4, atol=1e-4
        )


def test_downdate_leaves_the_inverse_of_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(6, 30)
    left = []

    def recorded(inverse: Tensor, *rest: object) -> None:
        ops_downdate(inverse, *rest)
        left.append(inverse[0].double())

    ops_downdate = ops.downdate
    monkeypatch.setattr(ops, "downdate", recorded)
    columns = solve(weight, hessian, QuantSpec(3), block=12).columns
    assert columns is not None and [len(a) for a in left] == [18, 6]
    for a in left:
        rest = columns[-len(a) :]
        expected = torch.linalg.inv(damped(hessian)[rest][:, rest])
        # the columns lie in another order: sort both by their diagonals
        a, expected = (m[i][:, i] for m in (a, expected) for i in [m.diagonal().argsort()])
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "picked",
    [
        pytest.param([[6, 2], [0, 1]], id="front-and-behind"),
        pytest.param([[1, 0], [6, 5]], id="swap"),
        pytest.param([[6, 5, 4, 3, 2, 1, 0], [2, 0, 6, 1, 3, 5, 4]], id="all"),
        pytest.param([[4], [0]], id="one"),
    ],
)
def test_bring_forward(picked: list[list[int]]) -> None:
    front = len(picked[0])
    move = to_front(torch.tensor(picked), 7)
    columns = torch.arange(7).repeat(2, 1)
    matrix = torch.randn(2, 7, 7)
    moved = matrix.clone()
    for dim in (1, 2):
        bring_forward(moved, move, dim)
    symmetric = matrix + matrix.mT
    both = symmetric.clone()
    bring_both_forward(both, move)
    assert_same(both, moved + moved.mT)
    bring_forward(columns, move, 1)
    for chosen, order, before, after in zip(picked, columns, matrix, moved, strict=True):
        assert order[:front].tolist() == chosen
        assert sorted(order.tolist()) == list(range(7))
        untouched = [i for i in range(front, 7) if i not in chosen]
        assert order[untouched].tolist() == untouched
        assert_same(after, before[order][:, order])


# --- invariants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*KNOWN_ORDERS, "sensitivity-static"])
@pytest.mark.parametrize("block", [1, 7, 32, 96, 1000])
def test_block_does_not_matter_for_static_orders(order: Order, block: int) -> None:
    (weight, hessian), spec = problem(24, 96), QuantSpec(4, 24)
    grid = grid_for(weight, spec)
    default = solve(weight, hessian, spec, order=order, **grid)
    other = solve(weight, hessian, spec, order=order, block=block, **grid)
    assert default.columns is not None and other.columns is not None
    assert_same(other.columns, default.columns)
    textbook_gptq(weight, hessian, Grid.of(default), default.columns, follow=other.codes)
    assert (other.codes != default.codes).double().mean() < 0.01  # none, but for ties
    assert (other.report.block, other.report.order) == (block, order)


@pytest.mark.parametrize("order", ROW_ORDERS)
def test_rows_may_be_split(order: Order) -> None:
    (weight, hessian), spec = problem(16, 40), QuantSpec(4, 8)
    grid = grid_for(weight, spec)
    whole = solve(weight, hessian, spec, order=order, **grid)
    parts = []
    for rows in (slice(5), slice(5, 15), slice(15, 16)):
        part = {name: tensor[rows] for name, tensor in grid.items()}
        parts.append(solve(weight[rows], hessian, spec, order=order, **part).codes)
    codes = torch.cat(parts)
    if order == "obq":
        check_obq(weight, hessian, whole, codes)
    else:
        columns = check_known_order(order, hessian, whole.columns)
        textbook_gptq(weight, hessian, Grid.of(whole), columns, follow=codes)
    assert (codes != whole.codes).double().mean() < 0.01  # none, but for ties


@pytest.mark.parametrize("symmetric", GRIDS)
@pytest.mark.parametrize("order", ORDERS)
def test_identity_rounds_to_nearest(order: Order, symmetric: bool) -> None:
    weight, _ = problem(11, 36)
    result = solve(weight, torch.eye(36), QuantSpec(3, 12, symmetric), order=order, block=8)
    codes, scale, zero_point = ops.quantize_groups(
        weight[None], 12, 7, symmetric, result.spec.shrink
    )
    assert_same(result.codes, codes[0])
    assert_same(result.scale, scale[0])
    assert_same(result.zero_point, zero_point[0])


@pytest.mark.parametrize("order", ORDERS)
def test_ties_round_to_even(order: Order) -> None:
    steps = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -7.5, -9.5, 3.0]])
    result = solve(
        steps * 0.25, torch.eye(9), QuantSpec(4), order=order, block=4,
        scale=torch.tensor([[0.25]]), zero_point=torch.tensor([[8.0]]),
    )  # fmt: skip
    assert result.codes.tolist() == [[8, 10, 10, 8, 6, 15, 0, 0, 11]]


@pytest.mark.parametrize("order", ORDERS)
def test_batch_is_one_by_one(order: Order) -> None:
    cases = [problem(8, 30, seed) for seed in range(3)]
    weight, hessian = (torch.stack(tensors) for tensors in zip(*cases, strict=True))
    spec = QuantSpec(4, 10)
    batch = solve(weight, hessian, spec, order=order, block=8)
    for b, (w, h) in enumerate(cases):
        alone = solve(w, h, spec, order=order, block=8)
        assert_same(batch.codes[b], alone.codes)
        assert_same(batch.scale[b], alone.scale)
        assert_same(batch.zero_point[b], alone.zero_point)
        for name in ("error", "relative_error"):
            torch.testing.assert_close(getattr(batch.report, name)[b], getattr(alone.report, name))
        assert (batch.columns is None) == (order == "obq")
        if batch.columns is not None:
            assert_same(batch.columns[b], alone.columns)


@pytest.mark.parametrize("order", ORDERS)
def test_shared_hessian_is_more_rows(order: Order) -> None:
    weight, hessian = problem(12, 30)
    spec = QuantSpec(4, 10)
    together = solve(weight, hessian, spec, order=order, block=8)
    batch = solve(weight.view(3, 4, 30), hessian, spec, order=order, block=8)
    for name in ("codes", "scale", "zero_point"):
        assert_same(getattr(batch, name).flatten(0, 1), getattr(together, name))
    assert batch.scale.shape == (3, 4, 3)
    assert batch.report.error.shape == batch.report.damp.shape == (3,)
    assert batch.report.dead_columns.shape == batch.report.fallback.shape == (3,)
    torch.testing.assert_close(batch.report.error.sum(), together.report.error)
    if batch.columns is not None and together.columns is not None:
        assert_same(batch.columns, together.columns.expand(3, 30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_weight_of_any_dtype_is_computed_in_float32(order: Order, dtype: torch.dtype) -> None:
    weight, hessian = problem(6, 24)
    weight = weight.to(dtype)
    result = solve(weight, hessian, QuantSpec(4), order=order, block=8)
    assert_same(
        result.codes, solve(weight.float(), hessian, QuantSpec(4), order=order, block=8).codes
    )
    assert (
        result.scale.dtype == result.zero_point.dtype == result.dequantize().dtype == torch.float32
    )
    assert result.codes.dtype == torch.uint8
    assert result.report.error.dtype == torch.float64


def nearly_singular(columns: int) -> Tensor:
    """A condition number of 1e12: too much for float32, and harmless in float64."""
    _, vectors = torch.linalg.eigh(problem(1, columns)[1].double())
    return vectors * torch.logspace(-12, 0, columns, dtype=torch.float64) @ vectors.T


@pytest.mark.parametrize("order", KNOWN_ORDERS)
def test_float64_hessian_is_factored_in_float64(order: Order) -> None:
    (weight, _), hessian = problem(6, 32), nearly_singular(32)
    assert solve(weight, hessian, QuantSpec(4), order=order, damp=0.0).report.damp == 0
    assert solve(weight, hessian.float(), QuantSpec(4), order=order, damp=0.0).report.damp > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_hessian_is_taken_as_float32(dtype: torch.dtype) -> None:
    weight, hessian = problem(6, 24)
    narrow = hessian.to(dtype)
    expected = solve(weight, narrow.float(), QuantSpec(4))
    assert_same(solve(weight, narrow, QuantSpec(4)).codes, expected.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_strides_do_not_matter(order: Order) -> None:
    weight, hessian = problem(8, 24)
    spec = QuantSpec(4, 8)
    scattered = torch.zeros(16, 72)[::2, ::3].copy_(weight)
    transposed = torch.zeros(24, 24, 2)[..., 0].copy_(hessian).T
    expected = solve(weight, hessian, spec, order=order, block=8)
    grid = {
        "scale": torch.zeros(3, 8).copy_(expected.scale.T).T,
        "zero_point": torch.zeros(3, 8).copy_(expected.zero_point.T).T,
    }
    assert not any(t.is_contiguous() for t in (scattered, transposed, *grid.values()))
    actual = solve(scattered, transposed, spec, order=order, block=8, **grid)
    assert_same(actual.codes, expected.codes)
    batch = solve(weight.expand(2, 8, 24), hessian.expand(2, 24, 24), spec, order=order, block=8)
    assert_same(batch.codes, expected.codes.expand(2, 8, 24))


@pytest.mark.parametrize("R, C", [(3, 13), (1, 24), (8, 24)])
def test_strides_do_not_matter_to_refits(R: int, C: int) -> None:
    """Whose products of matrices may sum in another order for a transposed Hessian."""
    for seed in range(5):
        weight, hessian = problem(R, C, seed)
        transposed = hessian.T.contiguous().T
        assert not transposed.is_contiguous()
        expected = solve(weight, hessian, QuantSpec(2), rounds=2)
        actual = solve(weight.T.contiguous().T, transposed, QuantSpec(2), rounds=2)
        assert_same(actual.codes, expected.codes)
        assert_same(actual.scale, expected.scale)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("exponent", [-40, 40])
def test_size_of_the_hessian_does_not_matter(order: Order, exponent: int) -> None:
    weight, hessian = problem(8, 24)
    expected = solve(weight, hessian, QuantSpec(4), order=order, block=8)
    actual = solve(weight, hessian * 2.0**exponent, QuantSpec(4), order=order, block=8)
    assert_same(actual.codes, expected.codes)
    torch.testing.assert_close(actual.report.error, expected.report.error * 2.0**exponent)
    torch.testing.assert_close(actual.report.relative_error, expected.report.relative_error)


@pytest.mark.parametrize("order", ORDERS)
def test_runs_are_identical(order: Order) -> None:
    weight, hessian = problem(16, 96)
    first = solve(weight, hessian, QuantSpec(3, 32), order=order, block=32)
    for _ in range(9):
        again = solve(weight, hessian, QuantSpec(3, 32), order=order, block=32)
        assert_same(again.codes, first.codes)
        assert_same(again.scale, first.scale)
        assert_same(again.report.error, first.report.error)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_inputs_are_left_alone(order: Order, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    weight, hessian = (t.to(dtype).repeat(*batch, 1, 1) for t in problem(6, 24))
    hessian[..., 3, :] = hessian[..., :, 3] = 0
    weight, hessian = nn.Parameter(weight), nn.Parameter(hessian)
    scale = nn.Parameter(torch.full((*batch, 6, 2), 0.25))
    zero_point = nn.Parameter(torch.full((*batch, 6, 2), 5.0))
    inputs = (weight, hessian, scale, zero_point)
    before = [t.detach().clone() for t in inputs]
    result = solve(
        weight, hessian, QuantSpec(4, 12), order=order, block=8, scale=scale, zero_point=zero_point
    )
    for now, then in zip(inputs, before, strict=True):
        assert_same(now.detach(), then)
    assert not result.scale.requires_grad and not result.report.error.requires_grad


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 12, 1])
def test_external_grid_is_honoured_bit_for_bit(order: Order, group_size: int) -> None:
    weight, hessian = problem(6, 24)
    groups = 1 if group_size == -1 else 24 // group_size
    scale = 0.1 + torch.rand(6, groups) / 3
    zero_point = torch.randint(0, 16, (6, groups), dtype=torch.int32)
    result = solve(
        weight, hessian, QuantSpec(4, group_size), order=order, block=8,
        scale=scale, zero_point=zero_point,
    )  # fmt: skip
    assert_same(result.scale, scale)
    assert_same(result.zero_point, zero_point.float())
    for c in range(24):  # groups lie in the original column order
        g = c * groups // 24
        expected = (result.codes[:, c].float() - zero_point[:, g]) * scale[:, g]
        assert_same(result.dequantize()[:, c], expected)
    if order == "natural":
        textbook_gptq(weight, hessian, Grid.of(result), torch.arange(24), follow=result.codes)


def test_external_scale_of_a_symmetric_spec_needs_no_zero_point() -> None:
    weight, hessian = problem(6, 24)
    found = solve(weight, hessian, QuantSpec(3, 12, symmetric=True))
    given = solve(weight, hessian, QuantSpec(3, 12, symmetric=True), scale=found.scale)
    assert_same(given.codes, found.codes)
    assert_same(given.zero_point, torch.full((6, 2), 4.0))


@pytest.mark.parametrize("symmetric", GRIDS)
@pytest.mark.parametrize("order", ORDERS)
def test_zero_rows_and_groups_stay_zero(order: Order, symmetric: bool) -> None:
    weight, hessian = problem(6, 24)
    weight[2], weight[4, 8:16] = 0, 0
    result = solve(weight, hessian, QuantSpec(4, 8, symmetric), order=order, block=8)
    assert not result.dequantize()[2].any()
    assert result.scale[4, 1] == 1 and result.scale[2].eq(1).all()
    assert result.report.error.isfinite()
    nothing = solve(torch.zeros(3, 24), hessian, QuantSpec(4, 8, symmetric), order=order)
    assert not nothing.dequantize().any()
    assert nothing.report.error == nothing.report.relative_error == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("R, C", [(1, 1), (1, 17), (4, 1)])
def test_smallest_shapes(order: Order, R: int, C: int) -> None:
    weight, hessian = problem(R, C)
    result = solve(weight, hessian, QuantSpec(4), order=order, block=1)
    large = solve(weight, hessian, QuantSpec(4), order=order, block=10_000)
    assert result.codes.shape == large.codes.shape == (R, C)
    if C == 1:
        assert_same(result.codes, round_to_nearest(weight, Grid.of(result)))
    if order != "sensitivity":  # whose tiles decide when it ranks
        assert_same(result.codes, large.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_block_beyond_the_last_column(order: Order) -> None:
    weight, hessian = problem(5, 20)
    exact = solve(weight, hessian, QuantSpec(4), order=order, block=20)
    assert_same(solve(weight, hessian, QuantSpec(4), order=order, block=21).codes, exact.codes)


@pytest.mark.parametrize("hessian", ["good", "hopeless", "zero"])
def test_nearest_does_not_look_at_the_hessian(hessian: str) -> None:
    weight, good = problem(5, 24)
    matrix = {"good": good, "hopeless": indefinite(24, 1e4), "zero": torch.zeros(24, 24)}[hessian]
    result = solve(weight, matrix, QuantSpec(4, 8), order="nearest")
    assert result.columns is not None
    assert_same(result.codes, round_to_nearest(weight, Grid.of(result)))
    assert_same(result.columns, torch.arange(24))
    assert (result.report.damp, result.report.fallback) == (DAMP, False)
    torch.testing.assert_close(
        result.report.error, rounding_error(weight, matrix, result), rtol=1e-5, atol=0
    )


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale, zero_point = (
        torch.tensor([[1.0, 0.5], [2.0, 4.0]]),
        torch.tensor([[0.0, 3.0], [1.0, 2.0]]),
    )
    expected = [[0.0, 1.0, -0.5, 0.0], [4.0, 2.0, -4.0, -8.0]]
    assert dequantize(codes, scale, zero_point).tolist() == expected


# --- the report -----------------------------------------------------------------------------------


def rounding_error(weight: Tensor, hessian: Tensor, like: SolveResult) -> Tensor:
    """Layer error of round-to-nearest on the same grid."""
    grid = Grid.of(like)
    return layer_error(weight, grid.value(grid.code(weight.double())), hessian.double())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_error_is_at_most_that_of_rounding(order: Order, bits: int) -> None:
    for make, seed in ((problem, 1), (problem, 2), (ill_conditioned, 3), (ill_conditioned, 4)):
        weight, hessian = make(16, 64, seed)
        result = solve(weight, hessian, QuantSpec(bits), order=order, block=16)
        assert result.report.error <= rounding_error(weight, hessian, result)


@pytest.mark.parametrize("order", ORDERS)
def test_error_is_that_of_the_dequantized_weight(order: Order) -> None:
    weight, hessian = problem(12, 40)
    result = solve(weight, hessian, QuantSpec(3, 20), order=order, block=16)
    delta, w, h = weight.double() - result.dequantize().double(), weight.double(), hessian.double()
    error, energy = torch.trace(delta @ h @ delta.T), torch.trace(w @ h @ w.T)
    torch.testing.assert_close(result.report.error, error, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.report.relative_error, error / energy, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        layer_error(weight, result.dequantize(), hessian), error, rtol=1e-5, atol=0
    )
    assert result.report.error.shape == result.report.relative_error.shape == ()
    assert (result.report.damp, result.report.dead_columns, result.report.fallback) == (
        DAMP,
        0,
        False,
    )
    assert (result.report.order, result.report.block) == (order, 16)


# --- bad Hessians ---------------------------------------------------------------------------------


def indefinite(columns: int, coupling: float) -> Tensor:
    """Positive diagonal, and one pair whose coupling is larger than its diagonal."""
    hessian = problem(1, columns)[1]
    hessian /= hessian.diagonal().mean()
    hessian[:2], hessian[:, :2] = 0, 0
    hessian[:2, :2] = torch.tensor([[1.0, coupling], [coupling, 1.0]])
    return hessian


LADDER = [  # coupling of the pair, damp asked for, damp used
    pytest.param(1.0, 0.0, 1e-3, id="singular"),
    pytest.param(1.05, 0.01, 0.1, id="one-rung"),
    pytest.param(1.5, 0.01, 1.0, id="two-rungs"),
    pytest.param(50.0, 0.01, 100.0, id="last-rung"),
]


@pytest.mark.parametrize("coupling, asked, used", LADDER)
@pytest.mark.parametrize("order", ORDERS)
def test_damping_is_raised_where_needed(
    order: Order, coupling: float, asked: float, used: float
) -> None:
    """In a batch only the problem that needs it, which then is as if that had been asked for."""
    (weight, good), bad = problem(8, 24), indefinite(24, coupling)
    spec = QuantSpec(4)
    batch = solve(
        torch.stack([weight, -weight, weight]), torch.stack([good, bad, good]), spec,
        order=order, block=8, damp=asked,
    )  # fmt: skip
    assert batch.report.damp.tolist() == pytest.approx([asked, used, asked], rel=1e-12)
    assert batch.report.fallback.tolist() == [False, False, False]
    alone = solve(weight, good, spec, order=order, block=8, damp=asked)
    raised = solve(-weight, bad, spec, order=order, block=8, damp=used)
    for b, expected in enumerate((alone, raised, alone)):
        assert_same(batch.codes[b], expected.codes)
        if batch.columns is not None:
            assert_same(batch.columns[b], expected.columns)


@pytest.mark.parametrize("order", ["sensitivity", "obq"])
def test_inverse_that_does_not_survive_float32_is_damped(order: Order) -> None:
    """The updates of the inverse are float32: what float64 could invert may still be lost there."""
    (weight, _), hessian = problem(6, 32), nearly_singular(32)
    both = torch.stack([hessian, torch.eye(32, dtype=torch.float64)])
    result = solve(weight.repeat(2, 1, 1), both, QuantSpec(4), order=order, block=8, damp=0.0)
    assert result.report.damp[0] > 0 and result.report.damp[1] == 0
    first = solve(
        weight, hessian, QuantSpec(4), order=order, block=8, damp=result.report.damp[0].item()
    )
    assert_same(result.codes[0], first.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_hopeless_hessian_rounds_to_nearest(order: Order) -> None:
    (weight, good), bad = problem(8, 24), indefinite(24, 1e4)
    spec = QuantSpec(4, 8)
    batch = solve(
        torch.stack([weight, weight]), torch.stack([bad, good]), spec, order=order, block=8
    )
    assert batch.report.fallback.tolist() == [True, False]
    assert batch.report.damp[1] == DAMP
    alone = solve(weight, good, spec, order=order, block=8)
    assert_same(batch.codes[0], round_to_nearest(weight, Grid.of(alone)))
    assert_same(batch.codes[1], alone.codes)
    if batch.columns is not None:
        assert_same(batch.columns[0], torch.arange(24))
    assert batch.report.error.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 8, 31])
def test_rank_deficient_inputs_without_damping(order: Order, rank: int) -> None:
    """Rounding may leave such a matrix barely definite: whatever happens, the codes are sound."""
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(rank, 32, generator=random)
    weight, hessian = torch.randn(8, 32, generator=random), 2 / rank * x.T @ x
    result = solve(weight, hessian, QuantSpec(3), order=order, block=8, damp=0.0)
    assert not result.report.fallback
    assert result.codes.max() <= 7
    assert result.report.error <= 2 * rounding_error(weight, hessian, result)


@pytest.mark.parametrize(
    "order, group_size",
    [(order, size) for order in ORDERS for size in (-1, 7) if (order, size) != ("obq", 7)],
)
def test_dead_columns_do_not_disturb_the_others(order: Order, group_size: int) -> None:
    """H_cc = 0: rounded to nearest; the live columns are solved as if they were all there is."""
    weight, hessian = problem(10, 28)
    dead = torch.zeros(28, dtype=torch.bool)
    dead[[0, 5, 13, 27]] = True
    hessian[dead], hessian[:, dead] = 0, 0
    # ranking is by tile, and dead columns take places in tiles: column by column they do not
    result = solve(weight, hessian, QuantSpec(4, group_size), order=order, block=1)
    assert result.report.dead_columns == 4
    assert not result.report.fallback
    grid = Grid.of(result)
    assert_same(result.codes[:, dead], round_to_nearest(weight, grid)[:, dead])
    alone = solve(
        weight[:, ~dead], hessian[~dead][:, ~dead], QuantSpec(4, 1), order=order, block=1,
        scale=grid.scale[:, ~dead], zero_point=grid.zero_point[:, ~dead],
    )  # fmt: skip
    assert_same(result.codes[:, ~dead], alone.codes)
    torch.testing.assert_close(result.report.error, alone.report.error)


def test_dead_columns_are_counted_for_each_problem() -> None:
    weight, hessian = problem(4, 12)
    hessian = hessian.repeat(3, 1, 1)
    hessian[1, 2], hessian[1, :, 2] = 0, 0
    hessian[2] = 0
    result = solve(weight.repeat(3, 1, 1), hessian, QuantSpec(4))
    assert result.report.dead_columns.tolist() == [0, 1, 12]


@pytest.mark.parametrize("order", ORDERS)
def test_column_that_underflowed_is_coupled_to_no_other(order: Order) -> None:
    """Inputs so small that their squares are zero, and their products with others are not."""
    weight, hessian = problem(5, 12)
    hessian[4], hessian[:, 4] = 1e-25, 1e-25
    hessian[4, 4] = 0
    without = hessian.clone()
    without[4], without[:, 4] = 0, 0
    expected = solve(weight, without, QuantSpec(4), order=order)
    actual = solve(weight, hessian * 1e3, QuantSpec(4), order=order)
    assert actual.report.dead_columns == 1
    assert_same(actual.codes, expected.codes)


@pytest.mark.parametrize("damp", [0.0, DAMP])
@pytest.mark.parametrize("order", ORDERS)
def test_all_zero_hessian_rounds_to_nearest(order: Order, damp: float) -> None:
    weight, _ = problem(5, 12)
    result = solve(weight, torch.zeros(12, 12), QuantSpec(4, 6), order=order, block=4, damp=damp)
    assert_same(result.codes, round_to_nearest(weight, Grid.of(result)))
    report = result.report
    assert (report.dead_columns, report.fallback, report.damp) == (12, False, damp)
    assert report.error == report.relative_error == 0


def test_errors_are_measured_only_if_asked_for() -> None:
    weight, hessian = problem(5, 12)
    measured = solve(weight, hessian, QuantSpec(3))
    report = solve(weight, hessian, QuantSpec(3), measure=False).report
    assert report.row_error is None and report.row_energy is None
    for name in ("error", "energy", "relative_error"):
        with pytest.raises(ValueError, match=r"not measured: solve\(..., measure=True\)"):
            getattr(report, name)
    row_error, row_energy = measured.report.row_error, measured.report.row_energy
    assert row_error is not None and row_energy is not None
    assert row_error.shape == row_energy.shape == (5,)
    torch.testing.assert_close(row_error.sum(), measured.report.error)
    expected = layer_error(weight, measured.dequantize(), hessian)
    torch.testing.assert_close(measured.report.error, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
def test_scales_are_rounded_before_the_first_column(order: Order, dtype: ScaleDtype) -> None:
    """The codes are those of an external grid that was rounded so."""
    weight, hessian = problem(5, 12)
    exact = solve(weight, hessian, QuantSpec(3, 6), order=order)
    rounded = exact.scale.to(getattr(torch, dtype)).float()
    assert not rounded.equal(exact.scale)
    actual = solve(weight, hessian, QuantSpec(3, 6, scale_dtype=dtype), order=order)
    assert_same(actual.scale, rounded)
    grid = {"scale": rounded, "zero_point": exact.zero_point}
    expected = solve(weight, hessian, QuantSpec(3, 6), order=order, **grid)
    assert_same(actual.codes, expected.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_scale_that_float16_would_round_to_zero(order: Order) -> None:
    weight, hessian = problem(5, 12)
    spec = QuantSpec(4, scale_dtype="float16")
    result = solve(weight * 1e-9, hessian, spec, order=order)
    assert_same(result.scale, torch.full((5, 1), 2.0**-24))
    assert result.dequantize().isfinite().all()
