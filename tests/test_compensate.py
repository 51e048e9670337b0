"""compensate: exact on small integers, elsewhere as close as float32 sums are."""

import pytest
import torch

from sapq_triton import ops, reference

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # absolute 2.5e-6 measured, sums up to 30

SHAPES = [  # B, R, F, T
    pytest.param(1, 1, 5, 3, id="one-row"),
    pytest.param(1, 7, 1, 1, id="one-column"),
    pytest.param(1, 64, 64, 32, id="full-blocks"),
    pytest.param(1, 70, 131, 17, id="ragged"),
    pytest.param(3, 9, 66, 40, id="batch"),
]


@pytest.mark.parametrize("B, R, F, T", SHAPES)
def test_integers_are_exact(B: int, R: int, F: int, T: int, device: torch.device) -> None:
    weight = torch.randint(-9, 10, (B, R, F), device=device).float()
    error = torch.randint(-9, 10, (B, R, T), device=device).float()
    rows = torch.randint(-9, 10, (B, T, F), device=device).float()
    expected = weight.clone()
    reference.compensate(expected, error, rows)
    ops.compensate(weight, error, rows, backend="triton")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("B, R, F, T", SHAPES)
def test_matches_reference(B: int, R: int, F: int, T: int, device: torch.device) -> None:
    weight, error = torch.randn(B, R, F, device=device), torch.randn(B, R, T, device=device)
    rows = torch.randn(B, T, F, device=device)
    expected = weight.double()
    reference.compensate(expected, error.double(), rows.double())
    ops.compensate(weight, error, rows, backend="triton")
    torch.testing.assert_close(weight.double(), expected, **TOLERANCE)


def test_writes_only_its_part_of_a_larger_matrix(device: torch.device) -> None:
    """As the solver calls it: columns outermost, behind the tile."""
    B, R, F, T = 2, 37, 21, 5
    whole = torch.randint(-9, 10, (B, F + 4, R + 3), device=device).float()
    error = torch.randint(-9, 10, (B, T, R), device=device).float().mT
    rows = torch.randint(-9, 10, (T, 2 * F), device=device).float()[:, ::2].expand(B, T, F)
    expected = whole.clone()
    expected[:, 4:, 2:-1] -= (error @ rows).mT
    ops.compensate(whole[:, 4:, 2:-1].mT, error, rows, backend="triton")
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
