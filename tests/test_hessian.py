"""Hessians: sums over batches, dead columns, damping, the two factorizations, pivot order."""

import pytest
import torch
from torch import Tensor

from sapq_triton.hessian import (
    HessianSum,
    damped,
    drifted,
    feedback_factor,
    inverse,
    is_paired,
    permuted,
    revive,
)
from sapq_triton.order import min_pivot_order
from sapq_triton.window import Window

# float64 holds the algebra to its last digits; float32 needs room for the condition number
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-3, "atol": 1e-4},
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def spd(batch: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Well-conditioned symmetric matrices [batch, columns, columns] of different scales."""
    x = torch.randn(batch, 4 * columns, columns, dtype=torch.float64)
    size = torch.logspace(0, 1, batch, dtype=torch.float64)[:, None, None]
    return (size * x.mT @ x / len(x[0])).to(dtype)


def exactly_singular(columns: int) -> Tensor:
    """A pivot that is zero without rounding, whichever end the factorization starts from."""
    h = torch.eye(columns, dtype=torch.float64)
    h[:2, :2] = 1
    return h[None]


# --- the sum --------------------------------------------------------------------------------------


@DTYPES
def test_sum_is_two_over_n_times_x_squared(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(37, 12, dtype=dtype)
    total = HessianSum(1, 12, device, dtype)
    total.add(x.to(device))
    expected = 2 / 37 * x.double().T @ x.double()
    hessian = total.hessian().cpu()
    assert (hessian.shape, hessian.dtype, total.rows) == ((1, 12, 12), dtype, 37)
    assert torch.equal(hessian, hessian.mT)
    torch.testing.assert_close(hessian[0].double(), expected, rtol=1e-5, atol=1e-5)
    if dtype == torch.float64 and device.type == "cpu":
        torch.testing.assert_close(hessian[0], expected, rtol=1e-12, atol=1e-12)


@DTYPES
def test_sum_of_parts_is_the_whole(dtype: torch.dtype) -> None:
    x = torch.randn(50, 8, dtype=dtype)
    whole, parts, other = (HessianSum(1, 8, dtype=dtype) for _ in range(3))
    whole.add(x)
    for part in x[:30].split(7):
        parts.add(part)
    other.add(x[30:])
    parts.total += other.total
    parts.rows += other.rows
    torch.testing.assert_close(parts.hessian(), whole.hessian())
    assert parts.rows == whole.rows == 50


def test_hessian_may_be_read_before_the_end() -> None:
    total, x = HessianSum(1, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    total.add(x[:10])
    first = total.hessian()
    torch.testing.assert_close(first[0], 2 / 10 * x[:10].T @ x[:10])
    assert torch.equal(total.hessian(), first)
    total.add(x[10:])
    torch.testing.assert_close(total.hessian()[0], 2 / 20 * x.T @ x)


def test_no_rows_give_zero() -> None:
    total = HessianSum(2, 3)
    total.add(torch.empty(0, 6, 1, 4, 4), Window((1, 1, 1), groups=2))
    assert total.rows == 0
    assert torch.equal(total.hessian(), torch.zeros(2, 3, 3))


def test_only_the_lower_triangle_of_the_total_counts() -> None:
    total = HessianSum(1, 3)
    total.total[:] = torch.tensor([[1.0, 7.0, 7.0], [2.0, 3.0, 7.0], [4.0, 5.0, 6.0]])
    total.rows = 2
    expected = [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [4.0, 5.0, 6.0]]
    assert total.hessian()[0].tolist() == expected


def test_float64_keeps_what_float32_would_lose() -> None:
    x = torch.tensor([[1.0], [1e-5]], dtype=torch.float64)
    total = HessianSum(1, 1, dtype=torch.float64)
    total.add(x)
    assert total.hessian().item() == 1 + 1e-10


def test_windows_are_rows() -> None:
    """A 2x2 window with stride 2 over 4x4: four positions, each a row of channel, height, width."""
    images = torch.randn(3, 4, 1, 4, 4, dtype=torch.float64)
    total = HessianSum(2, 8, dtype=torch.float64)
    total.add(images, Window((1, 2, 2), stride=(1, 2, 2), groups=2))
    assert total.rows == 12
    for group, channels in enumerate(images[:, :, 0].split(2, dim=1)):
        corners = [channels[:, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
        x = torch.cat([corner.reshape(3, 8) for corner in corners])
        torch.testing.assert_close(total.hessian()[group], 2 / 12 * x.T @ x)


# --- dead columns and damping ---------------------------------------------------------------------


def test_revive_gives_dead_columns_the_mean_of_the_live() -> None:
    h = torch.diag_embed(torch.tensor([[2.0, 0.0, 4.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    before = h.clone()
    revived, count = revive(h)
    assert count.tolist() == [1, 0, 3]
    expected = [[2.0, 3.0, 4.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    assert revived.diagonal(dim1=1, dim2=2).tolist() == expected
    assert torch.equal(h, before)


def test_revive_uncouples_dead_columns_only() -> None:
    h = spd(1, 4)
    h[0, 1, 1] = 0
    revived, _ = revive(h)
    assert not revived[0, 1, [0, 2, 3]].any() and not revived[0, [0, 2, 3], 1].any()
    live = torch.tensor([0, 2, 3])
    assert torch.equal(revived[0, live][:, live], h[0, live][:, live])
    assert torch.equal(revive(spd(2, 5))[1], torch.zeros(2, dtype=torch.int64))


def test_damped_adds_a_fraction_of_each_mean_diagonal() -> None:
    h = spd(3, 5)
    before = h.clone()
    mean = h.diagonal(dim1=1, dim2=2).mean(1)
    expected = h + 0.25 * mean[:, None, None] * torch.eye(5)
    torch.testing.assert_close(damped(h, 0.25), expected)
    assert torch.equal(damped(h, 0.0), h)
    assert torch.equal(h, before)


# --- factorizations -------------------------------------------------------------------------------


def test_permuted() -> None:
    h = spd(2, 6)
    columns = torch.stack([torch.randperm(6) for _ in range(2)])
    for result, matrix, order in zip(permuted(h, columns), h, columns, strict=True):
        assert torch.equal(result, matrix[order][:, order])


@DTYPES
@pytest.mark.parametrize("columns", [1, 2, 33])
def test_feedback_factor(columns: int, dtype: torch.dtype) -> None:
    """H = M D M^T with M unit upper triangular and D diagonal and positive."""
    h = spd(3, columns, dtype)
    before = h.clone()
    m, solved = feedback_factor(h)
    assert solved.all() and torch.equal(h, before)
    assert not m.tril(-1).any()
    assert (m.diagonal(dim1=1, dim2=2) == 1).all()
    d = torch.linalg.solve(m, torch.linalg.solve(m, h).mT)
    diagonal = d.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all()
    torch.testing.assert_close(d, torch.diag_embed(diagonal), **TOLERANCE[dtype])


def test_feedback_factor_by_hand() -> None:
    m = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    h = m @ torch.diag(torch.tensor([4.0, 1.0, 16.0])) @ m.T
    assert torch.equal(feedback_factor(h[None])[0][0], m)


@DTYPES
@pytest.mark.parametrize("columns", [1, 2, 33])
def test_inverse(columns: int, dtype: torch.dtype) -> None:
    h = spd(3, columns, dtype)
    before = h.clone()
    a, solved = inverse(h)
    assert solved.all() and torch.equal(h, before)
    assert torch.equal(a, a.mT)
    identity = torch.eye(columns, dtype=dtype).expand_as(h)
    torch.testing.assert_close(a @ h, identity, **TOLERANCE[dtype])


@pytest.mark.parametrize("factor", [feedback_factor, inverse])
def test_failure_is_told_for_each_problem(factor: type[feedback_factor]) -> None:
    good, bad = spd(1, 6), exactly_singular(6)
    out, solved = factor(torch.cat([good, bad, -good, good]))
    assert solved.tolist() == [True, False, False, True]
    alone, _ = factor(good)
    torch.testing.assert_close(out[[0, 3]], alone.expand(2, 6, 6))


# --- pivots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 64, 65, 150])
def test_min_pivot_order(columns: int) -> None:
    """Pivoted LDL, one Schur complement after another: the first eliminated is quantized last."""
    h = spd(2, columns)
    before = h.clone()
    orders = min_pivot_order(h)
    assert torch.equal(h, before)
    for rest, order in zip(h, orders, strict=True):
        left = list(range(columns))
        for j in reversed(order.tolist()):
            assert j == min(left, key=rest.diagonal().__getitem__)
            left.remove(j)
            rest = rest - torch.outer(rest[j], rest[j]) / rest[j, j]


def test_min_pivot_order_of_a_diagonal_is_activation_order() -> None:
    h = torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]]))
    assert min_pivot_order(h).tolist() == [[0, 2, 1], [1, 2, 0]]


def test_min_pivot_order_is_a_permutation_even_if_singular() -> None:
    x = torch.randn(3, 10)
    h = torch.stack([x.T @ x, torch.ones(10, 10), torch.zeros(10, 10)])
    for order in min_pivot_order(h):
        assert sorted(order.tolist()) == list(range(10))


# --- drift ----------------------------------------------------------------------------------------


def drifting(rows: int = 200, columns: int = 10) -> tuple[Tensor, Tensor]:
    """Inputs of a layer, and what they were in the full-precision model."""
    original = torch.randn(rows, columns, dtype=torch.float64)
    return original + 0.3 * torch.randn(rows, columns).double() + 0.1, original


def test_drift_sums_what_is_between_the_models() -> None:
    inputs, original = drifting()
    total = HessianSum(1, 10, dtype=torch.float64, drift=True)
    for x, y in zip(inputs.split(70), original.split(70), strict=True):
        total.add(x)
        total.add_drift(x, y)
    expected = 2 / 200 * inputs.T @ (original - inputs)
    drift = total.drift()
    assert drift is not None and not torch.equal(drift[0], drift[0].T)
    torch.testing.assert_close(drift[0], expected)
    assert HessianSum(1, 10).drift() is None


@pytest.mark.parametrize("groups", [1, 3])
def test_drift_of_images_is_that_of_their_patches(groups: int) -> None:
    window = Window((1, 3, 2), (1, 2, 1), (1, 1, 2), groups)
    x, y = torch.randn(2, 4, 6, 1, 9, 8, dtype=torch.float64)
    total = HessianSum(groups, 6 // groups * 6, dtype=torch.float64, drift=True)
    total.add(x, window)
    total.add_drift(x, y, window)
    before, change = window.patches(x), window.patches(y - x)
    drift = total.drift()
    assert drift is not None
    torch.testing.assert_close(drift, 2 / total.rows * before @ change.mT)


def test_drifted_weight_is_the_ridge_regression_on_the_original_outputs() -> None:
    inputs, original = drifting()
    weight = torch.randn(1, 4, 10, dtype=torch.float64)
    hessian, drift = (2 / 200 * inputs.T @ t for t in (inputs, original - inputs))
    damp = 0.05
    ridge = (damp * hessian.diagonal().mean()).sqrt()
    # the ridge as rows of data that ask for the old weight
    design = torch.cat([inputs * (2 / 200) ** 0.5, ridge * torch.eye(10).double()])
    wanted = torch.cat([original @ weight[0].T * (2 / 200) ** 0.5, ridge * weight[0].T])
    expected = torch.linalg.lstsq(design, wanted).solution.T
    found = drifted(weight, hessian[None], drift[None], damp)
    torch.testing.assert_close(found[0], expected)
    before, after = (
        (inputs @ w[0].T - original @ weight[0].T).square().sum() for w in (weight, found)
    )
    assert after < 0.9 * before
    half = drifted(weight, hessian[None], drift[None], damp, 0.5)
    torch.testing.assert_close(half, (weight + found) / 2)


def test_no_drift_leaves_the_weight() -> None:
    weight, hessian = torch.randn(2, 3, 5), spd(2, 5, torch.float32)
    assert torch.equal(drifted(weight, hessian, torch.zeros(2, 5, 5), 0.01), weight)


def test_drifted_where_the_hessian_cannot_be_solved() -> None:
    bad = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    hessian = torch.stack([bad, torch.eye(2)])
    weight, drift = torch.randn(2, 3, 2), torch.randn(2, 2, 2)
    found = drifted(weight, hessian, drift, 0.01)
    assert torch.equal(found[0], weight[0]) and not torch.equal(found[1], weight[1])


def test_drift_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="made without drift"):
        HessianSum(1, 3).add_drift(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"must be \[2, 3\], got \[1, 3\]"):
        HessianSum(1, 3, drift=True).add_drift(torch.ones(2, 3), torch.ones(1, 3))


def test_rows_of_other_tokens_are_told_apart() -> None:
    original = torch.randn(600, 24) + 3  # all in one direction
    inputs = original + 0.3 * torch.randn(600, 24)
    assert is_paired(inputs, original).all()
    assert is_paired(original.half(), original).all()
    assert is_paired(original[:1].repeat(5, 1), original[:1].repeat(5, 1)).all()  # equal rows
    shifted = torch.cat([inputs[:200], inputs[201:], torch.randn(1, 24) + 3])
    paired = is_paired(shifted, original)
    assert paired[:200].all() and not paired[200:599].any()
    assert is_paired(inputs[:0], original[:0]).shape == (0,)
