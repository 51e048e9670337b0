"""Refinement over whole rows, against literal loops, and the choice between candidates."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sapq_triton import QuantSpec, ops, reference, solve
from sapq_triton.grids import search_grids
from sapq_triton.hessian import damped
from sapq_triton.memory import Rows
from sapq_triton.refine import curvature, refine, refit_scales, sweep
from sapq_triton.result import dequantize, row_errors

B, R, C, G, QMAX = 2, 5, 24, 3, 7
EXACT: dict[str, Any] = dict(rtol=0, atol=0)


@pytest.fixture
def solved() -> dict[str, Tensor]:
    """Rows rounded to nearest on a grid of three groups, and a Hessian of correlated columns."""
    mixing = torch.eye(C, dtype=torch.float64) + torch.randn(B, C, C).double() / C**0.5
    x = torch.randn(B, 4 * C, C).double() @ mixing
    weight = torch.randn(B, R, C).double()
    codes, scale, zero_point = reference.quantize_groups(weight, C // G, QMAX, False, (1.0,))
    return dict(
        weight=weight, hessian=x.mT @ x / len(x), codes=codes, scale=scale, zero_point=zero_point,
        columns=torch.stack([torch.randperm(C) for _ in range(B)]),
    )  # fmt: skip


def value(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """In the dtype of the scale: `dequantize` computes in float32"""
    s, z = (t.repeat_interleave(C // scale.shape[-1], -1) for t in (scale, zero_point))
    return (codes.to(scale) - z) * s


def swept(problem: dict[str, Tensor], backend: ops.Backend = "reference") -> Tensor:
    p = problem
    quantized = value(p["codes"], p["scale"], p["zero_point"])
    return sweep(
        p["weight"], curvature(p["hessian"], p["columns"]), quantized,
        p["scale"], p["zero_point"], p["columns"], QMAX, "ieee", backend,
    )  # fmt: skip


def error(problem: dict[str, Tensor], codes: Tensor) -> Tensor:
    return row_errors(
        problem["weight"],
        problem["hessian"],
        value(codes, problem["scale"], problem["zero_point"]),
    )


def literal_sweep(problem: dict[str, Tensor], b: int, r: int) -> Tensor:
    """One row, one code after another, each the best there is while all others stand."""
    w, h = problem["weight"][b, r], problem["hessian"][b]
    codes = problem["codes"][b, r].clone()
    scale, zero = problem["scale"][b, r], problem["zero_point"][b, r]
    for k in problem["columns"][b].tolist():
        trials = []
        for code in range(QMAX + 1):
            codes[k] = code
            e = w - value(codes, scale, zero)
            trials.append((e @ h @ e).item())
        codes[k] = trials.index(min(trials))
    return codes


def test_sweep_takes_the_best_code_of_each_column_in_turn(solved: dict[str, Tensor]) -> None:
    codes = swept(solved)
    assert codes.dtype == torch.uint8
    for b in range(B):
        for r in range(R):
            torch.testing.assert_close(codes[b, r], literal_sweep(solved, b, r), **EXACT)
    assert (error(solved, codes) < 0.9 * error(solved, solved["codes"])).all()


def test_sweeps_end_where_no_single_code_can_be_better(solved: dict[str, Tensor]) -> None:
    for _ in range(20):
        codes = swept(solved)
        if torch.equal(codes, solved["codes"]):
            break
        solved["codes"] = codes
    else:
        raise AssertionError("sweeps did not come to rest")
    best = error(solved, codes)
    for k in range(C):
        for step in (-1, 1):
            other = codes.int()
            other[..., k] = (other[..., k] + step).clamp(0, QMAX)
            assert (error(solved, other) >= best - 1e-9 * best).all()


def test_sweep_is_the_same_in_triton(solved: dict[str, Tensor], device: torch.device) -> None:
    problem = {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in solved.items()
    }
    assert torch.equal(swept(problem, "triton").cpu(), swept(problem, "reference").cpu())


def test_refit_is_the_least_squares_solution(solved: dict[str, Tensor]) -> None:
    scale = refit_scales(
        *(solved[k] for k in ("weight", "hessian", "codes", "scale", "zero_point")), QMAX
    )
    root = torch.linalg.cholesky(solved["hessian"])  # E = |(w - q) L|^2
    for b in range(B):
        for r in range(R):
            z = value(solved["codes"][b, r], torch.ones(G).double(), solved["zero_point"][b, r])
            design = torch.block_diag(*z.view(G, 1, -1)) @ root[b]  # [G, C]
            expected = torch.linalg.lstsq(design.T, solved["weight"][b, r] @ root[b]).solution
            torch.testing.assert_close(scale[b, r], expected, rtol=1e-4, atol=1e-6)


def test_refit_leaves_a_group_of_zeros_and_refuses_negative_scales(
    solved: dict[str, Tensor],
) -> None:
    codes = solved["codes"].clone()
    first = solved["zero_point"][0, 0, 0]
    codes[0, 0, : C // G] = first.to(torch.uint8)  # worth nothing
    weight = solved["weight"].clone()
    weight[1, 2] = -value(codes, solved["scale"], solved["zero_point"])[1, 2]
    grid = solved["scale"], solved["zero_point"], QMAX
    scale = refit_scales(weight, solved["hessian"], codes, *grid)
    assert scale[0, 0, 0] == solved["scale"][0, 0, 0]
    assert (scale[0, 0, 1:] != solved["scale"][0, 0, 1:]).all()
    torch.testing.assert_close(scale[1, 2], solved["scale"][1, 2], **EXACT)
    assert (scale > 0).all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_many_groups_are_refitted_few_rows_at_a_time(
    width: int, solved: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their systems, G x G for each row, never take more memory than the weight; C = 24, R = 5."""
    groups, held = C // width, []
    scale, zero_point = (
        t.repeat_interleave(groups // G, -1) for t in (solved["scale"], solved["zero_point"])
    )
    each = [solved["weight"], solved["codes"], scale, zero_point]

    def refit(w: Tensor, codes: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return refit_scales(w, solved["hessian"], codes, s, z, QMAX)

    solve_ex = torch.linalg.solve_ex

    def watched(normal: Tensor, target: Tensor) -> Any:
        held.append(normal.numel())
        return solve_ex(normal, target)

    monkeypatch.setattr("torch.linalg.solve_ex", watched)
    whole = refit(*each)
    assert max(held) <= max(B * R * C / 2, B * groups**2)
    assert len(held) > 1
    rows = [refit(*(t[:, r : r + 1] for t in each)) for r in range(R)]
    torch.testing.assert_close(whole, torch.cat(rows, 1), rtol=1e-9, atol=1e-12)


def refined(problem: dict[str, Tensor], rounds: int, snap: Any) -> tuple[Tensor, Tensor]:
    p = {k: t.float() if t.is_floating_point() else t for k, t in problem.items()}
    steps = curvature(p["hessian"], p["columns"])
    return refine(
        p["weight"], p["hessian"], steps, p["codes"],
        p["scale"], p["zero_point"], p["columns"], QMAX,
        rounds=rounds, snap=snap, precision="ieee", backend="auto",
    )  # fmt: skip


def test_each_round_keeps_or_betters_every_row(solved: dict[str, Tensor]) -> None:
    weight, hessian = solved["weight"].float(), solved["hessian"].float()
    zero_point = solved["zero_point"].float()
    errors = []
    for rounds in range(4):
        codes, scale = refined(solved, rounds, lambda scale: scale)
        errors.append(row_errors(weight, hessian, dequantize(codes, scale, zero_point)))
        if rounds == 0:
            assert torch.equal(codes, solved["codes"])
            assert torch.equal(scale, solved["scale"].float())
    assert (errors[1] < errors[0]).all()
    assert (errors[2] <= errors[1]).all() and (errors[3] <= errors[2]).all()


def test_a_round_that_makes_a_row_worse_is_not_kept(solved: dict[str, Tensor]) -> None:
    """Snapped to scales far too large: no row is better on them."""
    codes, scale = refined(solved, 2, lambda scale: torch.full_like(scale, 1e3))
    assert torch.equal(codes, solved["codes"]) and torch.equal(scale, solved["scale"].float())


def test_a_grid_without_snap_stays(solved: dict[str, Tensor]) -> None:
    codes, scale = refined(solved, 2, None)
    assert torch.equal(scale, solved["scale"].float())
    assert (codes != solved["codes"]).any()


# --- in the solver --------------------------------------------------------------------------------


def layer(rows: int = 12, columns: int = 48) -> tuple[Tensor, Tensor]:
    x = torch.randn(6 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / 9)
    return torch.randn(rows, columns), 2 / len(x) * x.T @ x


def damped_errors(weight: Tensor, hessian: Tensor, result: Any) -> Tensor:
    return row_errors(weight, damped(hessian[None], 0.01)[0], result.dequantize())


@pytest.mark.parametrize("order", ["sensitivity", "activation", "obq"])
@pytest.mark.parametrize("bits, group_size", [(4, -1), (2, 16)])
def test_rounds_better_every_order(order: Any, bits: int, group_size: int) -> None:
    weight, hessian = layer()
    spec = QuantSpec(bits, group_size)
    errors = [
        damped_errors(weight, hessian, solve(weight, hessian, spec, order=order, rounds=rounds))
        for rounds in (0, 1, 3)
    ]
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[2].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_candidates_are_the_best_of_solves_on_each_grid(order: Any, symmetric: bool) -> None:
    """In an order that the weights do not decide, rows of other candidates change nothing."""
    weight, hessian = layer()
    spec = QuantSpec(3, 16, symmetric)
    first = solve(weight, hessian, spec, order=order)
    weighted = solve(weight, hessian, replace(spec, scale_search="hessian"), order=order)
    results = [first, weighted]
    changes = [(1, 1), (1, -1), (0.94, 0), (1.06, 0), (0.88, 0)]
    for stretch, step in changes if not symmetric else changes[2:]:
        scale, zero = weighted.scale * stretch, (weighted.zero_point + step).clamp(0, 7)
        results.append(solve(weight, hessian, spec, order=order, scale=scale, zero_point=zero))
    errors = torch.stack([damped_errors(weight, hessian, result) for result in results])
    assert len(set(errors.argmin(0).tolist())) > 2  # all sorts of them win
    for count in range(1, len(results) + 1):
        found = solve(weight, hessian, spec, order=order, candidates=count)
        best = errors[:count].argmin(0).tolist()
        for name in ("codes", "scale", "zero_point"):
            expected = torch.stack([getattr(results[n], name)[r] for r, n in enumerate(best)])
            torch.testing.assert_close(getattr(found, name), expected, rtol=1e-6, atol=0)


def test_a_hessian_search_comes_first_where_it_is_asked_for() -> None:
    weight, hessian = layer()
    spec = QuantSpec(3, symmetric=True, scale_search="hessian")
    plain = solve(weight, hessian, spec, order="natural")
    two = solve(weight, hessian, spec, order="natural", candidates=2)
    ratio = two.scale / plain.scale
    near = (ratio - 0.94).abs() < 1e-6
    assert ((ratio == 1) | near).all() and near.any()


def test_what_is_not_searched_has_no_candidates() -> None:
    weight, hessian = layer()
    scale, zero = torch.full((12, 1), 0.3), torch.full((12, 1), 4.0)
    many: dict[str, Any] = dict(candidates=6, rounds=2)
    given = solve(weight, hessian, QuantSpec(3), scale=scale, zero_point=zero, **many)
    assert torch.equal(given.scale, scale) and torch.equal(given.zero_point, zero)
    nearest = QuantSpec(3), "nearest"
    plain = solve(weight, hessian, nearest[0], order="nearest")
    also = solve(weight, hessian, nearest[0], order="nearest", **many)
    assert torch.equal(plain.codes, also.codes) and torch.equal(plain.scale, also.scale)
    absmax = QuantSpec(3, scale_search="absmax")
    plain, also = (solve(weight, hessian, absmax, candidates=n) for n in (1, 6))
    assert torch.equal(plain.codes, also.codes) and torch.equal(plain.scale, also.scale)


def test_scales_stay_what_a_file_can_hold() -> None:
    weight, hessian = layer()
    result = solve(weight, hessian, QuantSpec(4, scale_dtype="float16"), candidates=4, rounds=2)
    assert torch.equal(result.scale, result.scale.half().float())


def test_a_problem_without_a_solution_is_rounded_to_its_first_grid() -> None:
    """One of two problems has a Hessian that no damping makes positive definite."""
    weight, good = layer(rows=6, columns=16)
    bad = good.diagonal().diag()
    bad[0, 1] = bad[1, 0] = 1e6 * bad.max()
    weights, hessians = torch.stack([weight, weight]), torch.stack([good, bad])
    result = solve(weights, hessians, QuantSpec(3), candidates=4, rounds=2)
    nearest = solve(weight, good, QuantSpec(3), order="nearest")
    assert result.report.fallback.tolist() == [False, True]
    assert torch.equal(result.codes[1], nearest.codes)
    assert torch.equal(result.scale[1], nearest.scale)
    alone = solve(weight, good, QuantSpec(3), candidates=4, rounds=2)
    assert torch.equal(result.codes[0], alone.codes)


def test_batched_problems_are_refined_as_if_alone() -> None:
    layers = [layer(seed_rows, 24) for seed_rows in (7, 7, 7)]
    weights, hessians = (torch.stack(t) for t in zip(*layers, strict=True))
    many: dict[str, Any] = dict(candidates=5, rounds=2)
    together = solve(weights, hessians, QuantSpec(4, 8), **many)
    for b, (weight, hessian) in enumerate(layers):
        alone = solve(weight, hessian, QuantSpec(4, 8), **many)
        torch.testing.assert_close(together.dequantize()[b], alone.dequantize())


def test_search_weighted_by_the_hessian_is_the_literal_search() -> None:
    weight, hessian = layer(rows=4, columns=16)
    spec = QuantSpec(3, 8, scale_search="hessian")
    result = solve(weight, hessian, spec)
    inverse = torch.linalg.inv(damped(hessian[None].double(), 0.01)[0])
    importance = 1 / inverse.diagonal()
    groups, costs = weight.double().view(4, 2, 8), importance.view(2, 8)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    full, zero = (high - low) / 7, (-low / ((high - low) / 7)).round()
    errors = []
    for fraction in spec.shrink:
        scale, z = (full * fraction)[..., None], zero[..., None]
        q = ((groups / scale).round() + z).clamp(0, 7).sub(z) * scale
        errors.append(((groups - q).square() * costs).sum(-1))
    fraction = torch.tensor(spec.shrink)[torch.stack(errors).argmin(0)]
    torch.testing.assert_close(result.scale, (full * fraction).float(), rtol=1e-5, atol=0)
    plain = solve(weight, hessian, QuantSpec(3, 8))
    assert not torch.equal(plain.scale, result.scale)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_refinement_keeps_what_is_pruned(sparsity: Any) -> None:
    weight, hessian = layer()
    spec = QuantSpec(3, sparsity=sparsity)
    plain = solve(weight, hessian, spec)
    best = solve(weight, hessian, spec, candidates=4, rounds=2)
    assert damped_errors(weight, hessian, best).sum() < damped_errors(weight, hessian, plain).sum()
    assert best.sparsity >= 0.5
    zeros = best.codes == best.zero_point.to(torch.uint8)
    if sparsity == "2:4":
        assert (zeros.unflatten(1, (-1, 4)).sum(2) >= 2).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_zero_points_of_candidates_are_codes(sign: int) -> None:
    """Of rows of one sign they are the first or the last code, and there is none beyond."""
    weight, hessian = layer()
    weight = sign * (weight.abs() + 0.1)
    found = search_grids(
        weight[None], hessian[None], QuantSpec(3), "sensitivity", 8, 0.01, "reference", Rows()
    )[1]
    assert found.shape[1] == 8 * len(weight)
    assert found.min() == (0 if sign > 0 else 6) and found.max() == (1 if sign > 0 else 7)
    solved = solve(weight, hessian, QuantSpec(3), candidates=8)
    assert ((solved.zero_point >= 0) & (solved.zero_point <= 7)).all()
