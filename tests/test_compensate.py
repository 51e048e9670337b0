"""compensate: exact on small integers, elsewhere as close as float32 sums are."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # absolute 2.5e-6 measured, sums up to 30

SHAPES = [  # B, R, F, T, G
    pytest.param(1, 1, 5, 3, 1, id="one-row"),
    pytest.param(1, 7, 1, 1, 1, id="one-column"),
    pytest.param(1, 64, 64, 32, 2, id="full-blocks"),
    pytest.param(1, 70, 131, 17, 3, id="ragged"),
    pytest.param(3, 9, 66, 40, 2, id="batch"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def integers(B: int, R: int, F: int, T: int, G: int, device: torch.device) -> Arguments:
    """Weights, errors, rows, and a grid of half steps: all sums are exact in float32."""
    weight, error, rows = (
        torch.randint(-9, 10, shape, device=device).float()
        for shape in ((B, R, F), (B, R, T), (B, T, F))
    )
    scale = 2.0 ** torch.randint(1, 4, (B, R, G), device=device)
    zero_point = torch.randint(4, 12, (B, R, G), device=device).float()
    return weight, error, rows, scale, zero_point, torch.randint(0, G, (B, F), device=device)


@pytest.mark.parametrize("B, R, F, T, G", SHAPES)
def test_integers_are_exact(B: int, R: int, F: int, T: int, G: int, device: torch.device) -> None:
    weight, *rest = integers(B, R, F, T, G, device)
    expected = weight.clone()
    expected_cost = reference.compensate(expected, *rest, 15)
    cost = ops.compensate(weight, *rest, 15, backend="triton")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    torch.testing.assert_close(cost, expected_cost, rtol=0, atol=0)


@pytest.mark.parametrize("B, R, F, T, G", SHAPES)
def test_matches_reference(B: int, R: int, F: int, T: int, G: int, device: torch.device) -> None:
    weight, error = torch.randn(B, R, F, device=device), torch.randn(B, R, T, device=device)
    rows = torch.randn(B, T, F, device=device)
    scale = torch.rand(B, R, G, device=device) + 0.1
    zero_point = torch.randint(0, 16, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, F), device=device)
    expected = weight.double() - error.double() @ rows.double()
    cost = ops.compensate(
        weight, error, rows, scale, zero_point, group, 15, "ieee", backend="triton"
    )
    torch.testing.assert_close(weight.double(), expected, **TOLERANCE)
    # what it then costs to round the weights that were written
    ones = torch.ones(B, F, dtype=torch.float64, device=device)
    grid = scale.double(), zero_point.double(), group
    expected_cost = reference.column_sensitivity(weight.double(), *grid, ones, 15)
    torch.testing.assert_close(cost.double(), expected_cost, **TOLERANCE)


def test_writes_only_its_part_of_a_larger_matrix(device: torch.device) -> None:
    """As the solver calls it: columns outermost, behind the tile."""
    B, R, F, T, G = 2, 37, 21, 5, 3
    weight, error, _, scale, zero_point, group = integers(B, R, F, T, G, device)
    whole = torch.randint(-9, 10, (B, F + 4, R + 3), device=device).float()
    whole[:, 4:, 2:-1] = weight.mT
    rows = torch.randint(-9, 10, (T, 2 * F), device=device).float()[:, ::2].expand(B, T, F)
    expected = whole.clone()
    expected[:, 4:, 2:-1] -= (error @ rows).mT
    arguments = (
        error.mT.contiguous().mT, rows, scale.mT.contiguous().mT,
        zero_point[:, :1].expand(B, R, G), group.T.contiguous().T, 15,
    )  # fmt: skip
    cost = ops.compensate(whole[:, 4:, 2:-1].mT, *arguments, backend="triton")
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    expected_cost = reference.compensate(weight, *arguments)
    torch.testing.assert_close(cost, expected_cost, rtol=0, atol=0)
