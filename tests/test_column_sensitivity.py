"""column_sensitivity: exact where every sum is, 1e-5 otherwise."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference

RTOL = 1e-5  # float32 sums over rows in another order; 2e-7 measured

SHAPES = [  # B, R, F, G
    pytest.param(1, 1, 5, 1, id="one-row"),
    pytest.param(1, 40, 1, 1, id="one-column"),
    pytest.param(1, 128, 32, 2, id="full-blocks"),
    pytest.param(1, 300, 37, 4, id="ragged"),
    pytest.param(3, 33, 18, 3, id="batch"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


def dyadic(B: int, R: int, F: int, G: int, device: torch.device) -> Arguments:
    """Multiples of 2**-4 and scales of 2**-2 to 1: every product and sum is exact in float32."""
    weight = torch.randint(-64, 65, (B, R, F), device=device) / 16
    scale = 0.5 ** torch.randint(0, 3, (B, R, G), device=device)
    zero_point = torch.randint(0, 16, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, F), device=device)
    diagonal = 2.0 ** torch.randint(-3, 4, (B, F), device=device)
    return weight, scale, zero_point, group, diagonal, 15


@pytest.mark.parametrize("B, R, F, G", SHAPES)
def test_dyadic_weights_are_exact(B: int, R: int, F: int, G: int, device: torch.device) -> None:
    arguments = dyadic(B, R, F, G, device)
    actual = ops.column_sensitivity(*arguments, backend="triton")
    torch.testing.assert_close(actual, reference.column_sensitivity(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("B, R, F, G", SHAPES)
def test_matches_reference(B: int, R: int, F: int, G: int, device: torch.device) -> None:
    weight = torch.randn(B, R, F, device=device)
    scale = torch.rand(B, R, G, device=device) + 0.1
    zero_point = torch.randint(0, 8, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, F), device=device)
    diagonal = torch.rand(B, F, device=device) + 0.1
    arguments = (weight, scale, zero_point, group, diagonal, 7)
    actual = ops.column_sensitivity(*arguments, backend="triton")
    expected = reference.column_sensitivity(
        *(t.double() for t in arguments[:3]), group, diagonal, 7
    )
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


def test_any_strides(device: torch.device) -> None:
    B, R, F, G = 2, 21, 19, 3
    *_, group, _, qmax = dyadic(B, R, F, G, device)
    weight = (torch.randint(-64, 65, (B, F + 2, R), device=device) / 16)[:, 1:-1].mT
    scale = (0.5 ** torch.randint(0, 3, (B, G, R), device=device)).mT
    zero_point = torch.randint(0, 16, (R, 2 * G), device=device).float()[:, ::2].expand(B, R, G)
    group = torch.stack((group, group), 2).flatten(1)[:, ::2]
    diagonal = (2.0 ** torch.randint(-3, 4, (F, F), device=device)).expand(B, F, F)
    arguments = (weight, scale, zero_point, group, diagonal.diagonal(dim1=1, dim2=2))
    assert not any(t.is_contiguous() for t in arguments)
    actual = ops.column_sensitivity(*arguments, qmax, backend="triton")
    contiguous = (t.contiguous() for t in arguments)
    torch.testing.assert_close(
        actual, reference.column_sensitivity(*contiguous, qmax), rtol=0, atol=0
    )


def test_by_hand(device: torch.device) -> None:
    # column 0: a tie that goes down to 2; column 1: above the grid; column 2: below it, other group
    weight = torch.tensor([[[2.5, 20.0, -3.0], [0.25, 0.0, 1.0]]], device=device)
    scale = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]], device=device)
    zero_point = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], device=device)
    group = torch.tensor([[0, 0, 1]], device=device)
    diagonal = torch.tensor([[2.0, 1.0, 4.0]], device=device)
    cost = ops.column_sensitivity(weight, scale, zero_point, group, diagonal, 15, backend="triton")
    assert cost.tolist() == [[(0.5**2 + 0.25**2) / 2, 5.0**2, (1.0**2 + 1.0**2) / 4]]
