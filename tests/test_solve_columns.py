"""solve_columns: bit for bit the reference where sums are exact, consistent in itself otherwise."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference
from sapq_triton.kernels import solve_columns as kernel

SHAPES = [  # B, R, T, G
    pytest.param(1, 1, 16, 1, id="one-row"),
    pytest.param(1, 5, 1, 1, id="one-column"),
    pytest.param(1, 32, 48, 2, id="full-blocks"),
    pytest.param(1, 37, 32, 3, id="ragged-rows"),
    pytest.param(2, 9, 21, 3, id="ragged-columns"),
    pytest.param(1, 40, 70, 4, id="ragged-both"),
    pytest.param(3, 33, 16, 2, id="batch"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def dyadic(B: int, R: int, T: int, G: int, device: torch.device) -> Arguments:
    """Weights are multiples of 2**-8 up to 2, feedback of 2**-4 up to 1/4, scales 2**-3 or 2**-2.

    A sum then is a multiple of 2**-12 below 2**7: exact in float32, in any order, fused or not.
    """
    weight = torch.randint(-512, 513, (B, R, T), device=device) / 256
    running = weight + torch.randint(-64, 65, (B, R, T), device=device) / 256
    feedback = torch.randint(-4, 5, (B, T, T), device=device) / 16
    feedback += torch.full((T, T), torch.nan, device=device).tril()  # must not be read
    scale = 0.5 ** torch.randint(2, 4, (B, R, G), device=device)
    zero_point = torch.randint(4, 12, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, T), device=device)
    return weight, running, feedback, scale, zero_point, group


@pytest.mark.parametrize("qmax", [3, 15, 255])
@pytest.mark.parametrize("B, R, T, G", SHAPES)
def test_dyadic_tiles_are_exact(
    B: int, R: int, T: int, G: int, qmax: int, device: torch.device
) -> None:
    arguments = dyadic(B, R, T, G, device)
    actual = ops.solve_columns(*arguments, qmax, backend="triton")
    assert_same(actual, reference.solve_columns(*arguments, qmax))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("B, R, T, G", [(2, 9, 70, 3), (1, 5, 64, 1)])
def test_one_launch_after_another(
    B: int, R: int, T: int, G: int, sparse: bool, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each takes up the errors of those before it."""
    monkeypatch.setattr(kernel, "SPAN", 32)
    arguments = dyadic(B, R, T, G, device)
    pruned = torch.rand(B, R, T, device=device) < 0.5 if sparse else None
    actual = ops.solve_columns(*arguments, 15, backend="triton", pruned=pruned)
    assert_same(actual, reference.solve_columns(*arguments, 15, pruned))


@pytest.mark.parametrize("B, R, T, G", [SHAPES[2], SHAPES[4], SHAPES[6]])
def test_pruned_weights_are_zero(B: int, R: int, T: int, G: int, device: torch.device) -> None:
    """And what they leave to the others is their whole weight."""
    arguments = dyadic(B, R, T, G, device)
    pruned = torch.rand(B, R, T, device=device) < 0.5
    codes, error = ops.solve_columns(*arguments, 15, backend="triton", pruned=pruned)
    assert_same((codes, error), reference.solve_columns(*arguments, 15, pruned))
    weight, zero_point, group = arguments[0], arguments[4], arguments[5]
    assert_same((error[pruned],), (weight[pruned],))
    zero = reference.per_column(zero_point, group).expand(B, R, T)
    assert_same((codes[pruned].float(),), (zero[pruned],))
    dense = reference.solve_columns(*arguments, 15)
    assert (codes != dense[0])[~pruned].any()  # others have taken it up
    assert_same(reference.solve_columns(*arguments, 15, torch.zeros_like(pruned)), dense)


@pytest.mark.parametrize("B, R, T, G", SHAPES)
def test_each_code_is_the_rounded_running_weight(
    B: int, R: int, T: int, G: int, device: torch.device
) -> None:
    """One code may differ near a tie, and all that follow with it: so check each step by itself."""
    weight = torch.randn(B, R, T, device=device)
    feedback = torch.randn(B, T, T, device=device).mul_(0.3).triu(1)
    scale = torch.rand(B, R, G, device=device) + 0.1
    zero_point = torch.randint(0, 16, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, T), device=device)
    running = weight + 0.1
    codes, error = ops.solve_columns(
        weight, running, feedback, scale, zero_point, group, 15, backend="triton"
    )
    s = reference.per_column(scale, group).double()
    z = reference.per_column(zero_point, group).double()
    value = (codes.double() - z) * s
    torch.testing.assert_close(error.double(), weight.double() - value, rtol=1e-6, atol=1e-6)
    exact = (running.double() + error.double() @ feedback.double()) / s
    near_tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    expected = (exact.round() + z).clamp(0, 15)
    assert ((codes == expected) | near_tie).all()
    assert near_tie.float().mean() < 0.01


def test_any_strides(device: torch.device) -> None:
    """The layouts of the solver: columns outermost, tiles cut out of larger matrices."""
    B, R, T, G = 2, 37, 21, 3
    weight, running, feedback, scale, zero_point, group = dyadic(B, R, T, G, device)
    around = torch.full((B, T + 9, T + 9), torch.nan, device=device)
    around[:, 4 : T + 4, 5 : T + 5] = feedback.mT
    arguments = (
        weight.mT.contiguous().mT,
        torch.stack((running, running * torch.nan), 3)[..., 0],
        around[:, 4 : T + 4, 5 : T + 5].mT,
        scale.mT.contiguous().mT,
        zero_point[:, :1].expand(B, R, G),
        torch.stack((group, group), 2).flatten(1)[:1, ::2].expand(B, T),
    )
    assert not any(t.is_contiguous() for t in arguments)
    actual = ops.solve_columns(*arguments, 15, backend="triton")
    assert_same(actual, reference.solve_columns(*(t.contiguous() for t in arguments), 15))
    mask = torch.rand(B, 2 * T, R + 3, device=device) < 0.5
    pruned = mask[:, ::2, 3:].mT
    actual = ops.solve_columns(*arguments, 15, backend="triton", pruned=pruned)
    for given in (pruned, pruned.contiguous()):
        assert_same(actual, reference.solve_columns(*arguments, 15, given))


def test_by_hand(device: torch.device) -> None:
    weight = torch.tensor([[[0.5, 1.5, 2.5, 9.0, -4.0]]], device=device)
    feedback = torch.zeros(1, 5, 5, device=device)
    feedback[0, 0, 1], feedback[0, 0, 2], feedback[0, 1, 2] = 0.5, -1.0, 1.0
    feedback[0, 3, 4] = 1.0
    scale, zero_point = torch.ones(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device)
    group = torch.zeros(1, 5, dtype=torch.int64, device=device)
    codes, error = ops.solve_columns(
        weight, weight, feedback, scale, zero_point, group, 3, backend="triton"
    )
    # 0: tie, down to 0. 1: 1.5 + 0.5/2. 2: 2.5 - 0.5 - 0.5 = 1.5, tie, up to 2. 3: beyond the grid.
    # 4: -4 + 6
    assert codes.tolist() == [[[0, 2, 2, 3, 2]]]
    assert error.tolist() == [[[0.5, -0.5, 0.5, 6.0, -6.0]]]


def test_group_picks_the_grid_of_a_column(device: torch.device) -> None:
    weight = torch.full((1, 1, 4), 3.0, device=device)
    feedback = torch.zeros(1, 4, 4, device=device)
    scale = torch.tensor([[[1.0, 0.5, 2.0]]], device=device)
    zero_point = torch.tensor([[[0.0, 1.0, 2.0]]], device=device)
    group = torch.tensor([[2, 0, 1, 2]], device=device)
    codes, error = ops.solve_columns(
        weight, weight, feedback, scale, zero_point, group, 15, backend="triton"
    )
    assert codes.tolist() == [[[4, 3, 7, 4]]]  # 1.5 is a tie
    assert error.tolist() == [[[-1.0, 0.0, 0.0, -1.0]]]


@pytest.mark.parametrize("B, R, C, G", [(1, 40, 70, 4), (2, 9, 53, 1)])
def test_reference_on_several_threads(B: int, R: int, C: int, G: int, device: torch.device) -> None:
    """Where PyTorch has more than one thread, it multiplies instead of NumPy."""
    arguments = dyadic(B, R, C, G, device)
    expected = reference.solve_columns(*arguments, 15)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        actual = reference.solve_columns(*arguments, 15)
    finally:
        torch.set_num_threads(threads)
    assert threads == 1
    assert_same(actual, expected)
