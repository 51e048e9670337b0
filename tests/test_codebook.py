"""Codebooks: rounding is that of literal search, in every kernel, and the solver compensates it."""

import math
from fractions import Fraction

import pytest
import torch
import triton
from torch import Tensor, nn

from sapq_triton import (
    QuantSpec,
    SolveResult,
    dequantize,
    layer_error,
    ops,
    quantize,
    reference,
    solve,
    solve_float_columns,
    solve_row_bits,
)
from sapq_triton.codebook import FP4, NF4, Codebook
from sapq_triton.kernels.rounding import constants
from sapq_triton.packed import QuantLinear, pack_weight, to_packed
from sapq_triton.refine import refit_scales
from sapq_triton.result import row_errors
from sapq_triton.spec import MSE_SHRINK, CodebookName, Order
from tests.test_rounding import _grid_kernel
from tests.test_solver import (
    DAMP,
    KNOWN_ORDERS,
    ORDERS,
    Grid,
    assert_same,
    check_known_order,
    check_obq,
    check_sensitivity,
    damped,
    grid_for,
    ill_conditioned,
    indefinite,
    problem,
    round_to_nearest,
    rounding_error,
    textbook_gptq,
)

# levels in no order, two of them twice; the codes of neighbours are even and odd in turn
MIXED = Codebook.of(
    -0.5, 0.25, 0.375, 2.0, 3.0, -2.0, -7.0, 5.0, -0.5, 0.0, 6.0, 8.0, 1.5, 5.0, 0.125, 1.0
)
BOOKS = pytest.mark.parametrize(
    "book",
    [pytest.param(NF4, id="nf4"), pytest.param(FP4, id="fp4"), pytest.param(MIXED, id="mixed")],
)
NAMES = pytest.mark.parametrize("name", ["nf4", "fp4"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def spec_of(name: CodebookName, group_size: int = -1) -> QuantSpec:
    return QuantSpec(4, group_size, symmetric=True, codebook=name)


def literal_code(x: float, levels: tuple[float, ...]) -> int:
    """Nearest level in exact arithmetic; of two as near that of the even code."""
    codes = {levels.index(level) for level in levels}
    return min(codes, key=lambda code: (abs(Fraction(x) - Fraction(levels[code])), code % 2))


def as_levels(book: Codebook, like: Tensor) -> Tensor:
    return torch.tensor(book.levels, device=like.device, dtype=like.dtype)


# --- the levels -----------------------------------------------------------------------------------


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n, dtype=torch.float64)) for n in (9, 8)
    )
    expected = torch.cat([-below[:-1], above]).sort()[0] / above[0]
    torch.testing.assert_close(torch.tensor(NF4.levels).double(), expected, rtol=0, atol=1e-6)


def test_fp4_codes_are_the_bits_of_e2m1() -> None:
    for code, level in enumerate(FP4.levels):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert level == (-size if sign else size)
        assert math.copysign(1, level) == (-1 if sign else 1)


@BOOKS
def test_levels_and_bounds_are_float32_numbers(book: Codebook) -> None:
    for numbers in (book.levels, book.bounds):
        assert torch.tensor(numbers, dtype=torch.float32).tolist() == list(numbers)
    assert list(book.bounds) == sorted(set(book.bounds))


# --- rounding, in the reference and in every kernel -----------------------------------------------


def traps(book: Codebook) -> Tensor:
    """Levels, middles of two, their float32 neighbours, what is beyond, and what is very small."""
    levels = torch.tensor(sorted(set(book.levels)), dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    points = torch.cat([levels.float(), middles, middles * 0.9, torch.tensor([1e-38, 100, 3e38])])
    around = [points, points.nextafter(points + 1), points.nextafter(points - 1)]
    return torch.cat([*around, -points, torch.randn(300) * levels.max().float()])


@BOOKS
def test_codes_are_those_of_literal_search(book: Codebook, device: torch.device) -> None:
    x = traps(book).to(device)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    expected = torch.tensor([literal_code(each, book.levels) for each in x.tolist()])
    code = reference.to_code(x, one, zero, book)
    assert_same(code.cpu(), expected.float())
    kernel_code, value = torch.empty_like(x), torch.empty_like(x)
    launch = triton.cdiv(len(x), 1024), 1, 1
    _grid_kernel[launch](x, one, zero, kernel_code, value, len(x), *constants(book), BLOCK=1024)
    assert_same(kernel_code, code)
    assert_same(value, as_levels(book, x)[code.long()])
    assert_same(value, reference.to_value(code, one, zero, book))


def test_ties_go_to_the_even_code(device: torch.device) -> None:
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    one, zero = torch.ones_like(halves), torch.zeros_like(halves)
    assert reference.to_code(halves, one, zero, FP4).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert reference.to_code(-halves, one, zero, FP4).tolist() == [0, 10, 10, 12, 12, 14, 14]


@BOOKS
def test_kernel_divides_as_the_reference_does(book: Codebook, device: torch.device) -> None:
    scale = torch.rand(5000, device=device) + 0.01
    w = torch.randn(5000, device=device) * scale * book.half_range
    zero, code, value = torch.zeros_like(w), torch.empty_like(w), torch.empty_like(w)
    launch = triton.cdiv(len(w), 1024), 1, 1
    _grid_kernel[launch](w, scale, zero, code, value, len(w), *constants(book), BLOCK=1024)
    expected = reference.to_code(w, scale, zero, book)
    assert_same(code, expected)
    assert_same(value, reference.to_value(expected, scale, zero, book))
    assert set(code.tolist()) == {float(code) for code in book.ascending}


@BOOKS
@pytest.mark.parametrize("B, R, C, group_size", [(1, 37, 96, 32), (2, 9, 5, 1), (1, 3, 600, 300)])
def test_absmax_is_the_reference_bit_for_bit(
    book: Codebook, B: int, R: int, C: int, group_size: int, device: torch.device
) -> None:
    weight = torch.randn(B, R, C, device=device)
    weight[0, 0, :group_size] = 0
    actual = ops.quantize_groups(weight, group_size, book, True, (1.0,), backend="triton")
    expected = reference.quantize_groups(weight, group_size, book, True, (1.0,))
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    codes, scale, zero_point = actual
    groups = weight.unflatten(2, (-1, group_size))
    largest = torch.tensor(max(map(abs, book.levels)), device=device)
    full = groups.abs().amax(3) / largest  # a GPU multiplies by the inverse of a number
    assert_same(scale, torch.where(full == 0, 1.0, full))
    assert not zero_point.any() and not as_levels(book, weight)[codes[0, 0, 0].long()]


@NAMES
@BACKENDS
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_finds_the_least_error(
    name: CodebookName, backend: ops.Backend, weighted: bool, device: torch.device
) -> None:
    book, shrink = {"nf4": NF4, "fp4": FP4}[name], MSE_SHRINK[::8]
    weight, importance = torch.randn(1, 21, 64, device=device), torch.ones(1, 64, device=device)
    if weighted:
        importance = torch.rand(1, 64, device=device)
    codes, scale, _ = ops.quantize_groups(
        weight, 16, book, True, shrink, importance if weighted else None, backend
    )
    cost = importance.view(4, 16).double()
    groups = weight.unflatten(2, (-1, 16)).double()
    full = groups.abs().amax(3) / book.half_range
    errors = torch.stack([
        ((groups / (full * f)[..., None])[..., None] - as_levels(book, groups)).abs().amin(-1)
        .square().mul(cost).sum(-1) * (full * f).square()
        for f in shrink
    ])  # fmt: skip
    value = as_levels(book, groups)[codes.long()].unflatten(2, (-1, 16)) * scale.double()[..., None]
    least = errors.amin(0)
    found = ((value - groups).square() * cost).sum(-1)
    torch.testing.assert_close(found, least, rtol=1e-4, atol=0)
    assert (errors.argmin(0) > 0).double().mean() > 0.1  # the search has something to find


def grid_of(B: int, R: int, F: int, G: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scale = 0.5 ** torch.randint(2, 4, (B, R, G), device=device)
    zero_point = torch.full_like(scale, torch.nan)  # counts for nothing
    return scale, zero_point, torch.randint(0, G, (B, F), device=device)


@NAMES
def test_costs(name: CodebookName, device: torch.device) -> None:
    """column_sensitivity and compensate; sums of FP4 are exact, those of NF4 are not."""
    book, B, R, F, T, G = {"nf4": NF4, "fp4": FP4}[name], 2, 21, 19, 5, 3
    grid = grid_of(B, R, F, G, device)
    weight, error = (torch.randint(-64, 65, (B, R, n), device=device) / 32 for n in (F, T))
    rows = torch.randint(-2, 3, (B, T, F), device=device).float()
    diagonal = 2.0 ** torch.randint(-3, 4, (B, F), device=device)
    tolerance = {"rtol": 0, "atol": 0} if name == "fp4" else {"rtol": 1e-5, "atol": 1e-5}

    def literal(w: Tensor) -> Tensor:
        s = reference.per_column(grid[0], grid[2]).double()
        x = w.double() / s
        return ((x[..., None] - as_levels(book, x)).abs().amin(-1) * s).square().sum(1)

    for backend in ("triton", "reference"):
        cost = ops.column_sensitivity(weight, *grid, diagonal, book, backend)
        expected = literal(weight) / diagonal
        torch.testing.assert_close(cost.double(), expected, **tolerance)
        updated = weight.clone()
        cost = ops.compensate(updated, error, rows, *grid, book, backend=backend)
        assert_same(updated, weight - error @ rows)
        torch.testing.assert_close(cost.double(), literal(updated), **tolerance)


@pytest.mark.parametrize("B, R, T, G", [(1, 37, 16, 3), (2, 9, 21, 3), (1, 5, 1, 1)])
@NAMES
def test_columns_are_the_reference_bit_for_bit(
    name: CodebookName, B: int, R: int, T: int, G: int, device: torch.device
) -> None:
    """FP4's sums are exact; of NF4 each column hears of one other, with a power of two."""
    book = {"nf4": NF4, "fp4": FP4}[name]
    scale, zero_point, group = grid_of(B, R, T, G, device)
    weight = torch.randint(-512, 513, (B, R, T), device=device) / 256
    running = weight + torch.randint(-64, 65, (B, R, T), device=device) / 256
    if name == "fp4":
        feedback = torch.randint(-4, 5, (B, T, T), device=device) / 16
    else:
        weight, running = torch.randn(2, B, R, T, device=device).unbind()
        feedback = torch.zeros(B, T, T, device=device)
        feedback.diagonal(min(1, T - 1), 1, 2).fill_(-0.5)
    arguments = (weight, running, feedback, scale, zero_point, group, book)
    codes, error = ops.solve_columns(*arguments, "ieee", backend="triton")
    expected_codes, expected_error = reference.solve_columns(*arguments)
    assert_same(codes, expected_codes)
    assert_same(error, expected_error)
    # and each step is literal rounding
    s = reference.per_column(scale, group).double()
    x = (running.double() + error.double() @ feedback.double().triu(1)) / s
    distances = (x[..., None] - as_levels(book, x)).abs()
    chosen = distances.gather(3, codes[..., None].long())[..., 0]
    torch.testing.assert_close(chosen, distances.amin(3), rtol=0, atol=1e-6)
    assert_same(error, weight - as_levels(book, weight)[codes.long()] * s.float())


def test_what_is_no_number_stays_none() -> None:
    """So that the solver sees it in the error."""
    running = torch.tensor([[[torch.nan], [torch.inf], [-torch.inf], [1.0]]])
    one, group = torch.ones(1, 4, 1), torch.zeros(1, 1, dtype=torch.int64)
    codes, error = reference.solve_columns(one, running, torch.zeros(1, 1, 1), one, one, group, FP4)
    assert error[0, 0].isnan() and error[0, 1:].tolist() == [[-5.0], [7.0], [0.0]]
    assert codes[0, 1:].tolist() == [[7], [15], [2]]


# --- the solver -----------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("R, C, group_size", [(14, 60, 12), (12, 24, -1)])
def test_solve_is_the_literal_loop(
    R: int, C: int, group_size: int, order: Order, name: CodebookName
) -> None:
    if order == "obq":
        C = 24  # of as many columns most rows come close to no tie
    (weight, hessian), spec = problem(R, C), spec_of(name, group_size)
    result = solve(weight, hessian, spec, order=order, block=16, **grid_for(weight, spec))
    if order == "obq":
        check_obq(weight, hessian, result, result.codes)
    elif order == "sensitivity":
        check_sensitivity(weight, hessian, result, block=16, sweeps=2)
    else:
        columns = result.columns
        if order in KNOWN_ORDERS:
            columns = check_known_order(order, hessian, columns)
        assert columns is not None
        textbook_gptq(weight, hessian, Grid.of(result), columns, follow=result.codes)


@NAMES
@pytest.mark.parametrize("order", ["activation", "sensitivity", "obq"])
def test_triton_gives_the_same_codes(
    order: Order, name: CodebookName, device: torch.device
) -> None:
    weight, hessian = (t.to(device) for t in problem(3, 16))
    spec = spec_of(name, 8)
    expected = solve(weight, hessian, spec, order=order, block=8, backend="reference")
    actual = solve(
        weight, hessian, spec, order=order, block=8, backend="triton", scale=expected.scale
    )
    assert_same(actual.codes, expected.codes)
    assert_same(actual.zero_point, expected.zero_point)


@NAMES
@pytest.mark.parametrize("order", ORDERS)
def test_errors_are_compensated(order: Order, name: CodebookName) -> None:
    weight, hessian = ill_conditioned(32, 96)
    result = solve(weight, hessian, spec_of(name, 32), order=order, block=32)
    assert result.report.error < 0.5 * rounding_error(weight, hessian, result)
    nearest = solve(weight, hessian, spec_of(name, 32), order="nearest")
    assert_same(nearest.codes, round_to_nearest(weight, Grid.of(result)))
    torch.testing.assert_close(
        nearest.report.error, rounding_error(weight, hessian, nearest), rtol=1e-4, atol=0
    )


@NAMES
def test_refit_of_scales_is_the_least_squares_solution(name: CodebookName) -> None:
    weight, hessian = (t.double()[None] for t in problem(6, 24))
    book = spec_of(name).levels
    codes, scale, zero_point = reference.quantize_groups(weight, 8, book, True, (0.7,))
    fitted = refit_scales(weight, hessian, codes, scale, zero_point, book)
    root = torch.linalg.cholesky(hessian[0])  # E = |(w - q) L|^2
    for r in range(6):
        levels = as_levels(book, weight)[codes[0, r].long()].view(3, 1, 8)
        design = torch.block_diag(*levels) @ root
        expected = torch.linalg.lstsq(design.T, weight[0, r] @ root).solution
        torch.testing.assert_close(fitted[0, r], expected, rtol=1e-4, atol=1e-6)


@NAMES
@pytest.mark.parametrize("order", ["sensitivity", "activation", "obq"])
def test_candidates_and_rounds_better_every_row(order: Order, name: CodebookName) -> None:
    weight, hessian = problem(12, 48)
    spec, h = spec_of(name, 16), damped(hessian)
    errors = [
        row_errors(weight, h, solve(weight, hessian, spec, order=order, **more).dequantize())
        for more in ({}, {"rounds": 1}, {"rounds": 3}, {"candidates": 4, "rounds": 2})
    ]
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[1].sum() < 0.99 * errors[0].sum() and errors[3].sum() < 0.95 * errors[0].sum()


@NAMES
def test_values_are_levels_times_scales(name: CodebookName) -> None:
    weight, hessian = problem(6, 24)
    result = solve(weight.repeat(2, 1, 1), hessian, spec_of(name, 8))
    levels = torch.tensor(result.spec.levels.levels)  # type: ignore[union-attr]
    expected = levels[result.codes.long()] * result.scale.repeat_interleave(8, 2)
    assert_same(result.dequantize(), expected)
    parts = result.codes, result.scale, result.zero_point, result.spec.levels
    assert_same(dequantize(*parts), expected)
    assert not result.zero_point.any()
    again = solve(expected, hessian, result.spec, scale=result.scale, zero_point=result.zero_point)
    assert_same(again.dequantize(), expected)
    assert again.report.error.sum() < 1e-9 * result.report.error.sum()


@NAMES
def test_zeros_and_hopeless_hessians(name: CodebookName) -> None:
    weight, hessian = problem(6, 24)
    weight[2] = 0
    result = solve(weight, hessian, spec_of(name, 8))
    assert not result.dequantize()[2].any() and result.scale[2].eq(1).all()
    fallen = solve(weight, indefinite(24, 1e4), spec_of(name, 8))
    assert fallen.report.fallback
    assert_same(fallen.codes, round_to_nearest(weight, Grid.of(fallen)))
    dead = solve(weight, torch.zeros(24, 24), spec_of(name, 8), damp=DAMP)
    assert_same(dead.codes, round_to_nearest(weight, Grid.of(dead)))


@NAMES
def test_rows_and_columns_of_mixed_precision(name: CodebookName) -> None:
    weight, hessian = problem(6, 24)
    alone = solve(weight, hessian, spec_of(name, 8))
    rows = solve_row_bits(weight, hessian, spec_of(name, 8), mean_bits=4, bits=[4])
    assert_same(rows.dequantize(), alone.dequantize())
    with pytest.raises(ValueError, match="has 16 levels: bits must be 4, got 3"):
        solve_row_bits(weight, hessian, spec_of(name, 8), mean_bits=4, bits=[3, 4])
    columns = solve_float_columns(weight, hessian, spec_of(name, 8), count=2)
    expected = layer_error(weight, columns.dequantize(), hessian)
    torch.testing.assert_close(columns.report.error, expected)
    assert columns.report.error < 0.9 * alone.report.error


def test_a_model_and_its_report() -> None:
    model = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 4))
    batches = [torch.randn(64, 24)]
    report = quantize(model, batches, spec_of("nf4", 8), progress=False)
    assert_same(report["0"].dequantize()[0], model[0].weight.detach())
    assert report["0"].bytes == 240 / 2 + 30 * 2
    assert {float(code) for code in report["0"].codes.unique()} <= set(range(16))
    assert "group_size 8 does not divide 10 columns" in report["2"].notes[0]
    assert_same(report["2"].dequantize()[0], model[2].weight.detach())


# --- what is refused ------------------------------------------------------------------------------


def solved() -> SolveResult:
    return solve(*problem(6, 24), spec_of("nf4", 8))


def test_a_codebook_has_no_zero_point() -> None:
    weight, hessian = problem(6, 24)
    scale, message = torch.ones(6, 3), "integers from 0 to 0, got 8.0"
    with pytest.raises(ValueError, match=message):
        solve(weight, hessian, spec_of("nf4", 8), scale=scale, zero_point=8 * scale)
    with pytest.raises(ValueError, match="a codebook has no zero point: symmetric must be True"):
        ops.quantize_groups(weight[None], 8, NF4, False, (1.0,))


def test_packed_layers_hold_integers() -> None:
    message, result = "packed layers hold integers, not the levels of codebook 'nf4'", solved()
    with pytest.raises(ValueError, match=message):
        pack_weight(result.codes, result.scale, result.zero_point, result.spec)
    with pytest.raises(ValueError, match=message):
        to_packed(nn.Linear(24, 6), result.spec)
    with pytest.raises(ValueError, match=message):
        QuantLinear(24, 6, spec=result.spec)
    model = nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize(
            model, [torch.randn(9, 24)], QuantSpec(4), overrides={"1": spec_of("nf4")}, pack=True
        )
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name])
