"""downdate: exact on small integers, symmetric always."""

import pytest
import torch

from sapq_triton import ops, reference

TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}  # absolute 8e-6 measured, sums up to 70

SHAPES = [  # B, F, T
    pytest.param(1, 1, 1, id="one-column"),
    pytest.param(1, 5, 3, id="part-of-a-block"),
    pytest.param(1, 128, 32, id="full-blocks"),
    pytest.param(1, 131, 17, id="ragged"),
    pytest.param(3, 66, 40, id="batch"),
]


@pytest.mark.parametrize("B, F, T", SHAPES)
def test_integers_are_exact(B: int, F: int, T: int, device: torch.device) -> None:
    inverse = torch.randint(-9, 10, (B, F, F), device=device).float()
    inverse = inverse + inverse.mT
    rows = torch.randint(-9, 10, (B, T, F), device=device).float()
    expected = inverse.clone()
    reference.downdate(expected, rows)
    ops.downdate(inverse, rows, backend="triton")
    torch.testing.assert_close(inverse, expected, rtol=0, atol=0)


@pytest.mark.parametrize("B, F, T", SHAPES)
def test_stays_symmetric_and_matches_reference(
    B: int, F: int, T: int, device: torch.device
) -> None:
    inverse = torch.randn(B, F, F, device=device)
    inverse = inverse + inverse.mT
    rows = torch.randn(B, T, F, device=device)
    expected = inverse.double()
    reference.downdate(expected, rows.double())
    ops.downdate(inverse, rows, backend="triton")
    assert torch.equal(inverse, inverse.mT)
    torch.testing.assert_close(inverse.double(), expected, **TOLERANCE)


def test_writes_only_its_part_of_a_larger_matrix(device: torch.device) -> None:
    """As the solver calls it: what remains of the inverse, behind the tile."""
    B, F, T = 2, 70, 5
    whole = torch.randint(-9, 10, (B, F + 4, F + 7), device=device).float()
    part = whole[:, 4:, 3:-4]
    part += part.mT.clone()
    rows = torch.randint(-9, 10, (B, F, 2 * T), device=device).float()[..., ::2].mT
    expected = whole.clone()
    expected[:, 4:, 3:-4] -= rows.mT @ rows
    ops.downdate(part, rows, backend="triton")
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
