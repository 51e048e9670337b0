"""Peak memory is measured as it is, and a solve keeps to 3 Hessians and 2 weights."""

import pytest
import torch

from benchmarks.measure import peak_memory
from benchmarks.shapes import problem
from sapq_triton import QuantSpec, solve
from sapq_triton.spec import Order

MIB = 2**20


def test_peak_memory_counts_what_lives_at_once(device: torch.device) -> None:
    x = torch.zeros(MIB // 4, device=device)

    def together() -> torch.Tensor:
        return (x + 1) + (x + 2)

    def one_by_one() -> None:
        for _ in range(5):
            x.add(1)

    def in_place() -> None:
        x.add_(1)

    scalar = 1024  # bytes, what a Python number may take
    assert 0 <= peak_memory(together, device) - 3 * MIB <= scalar
    assert 0 <= peak_memory(one_by_one, device) - MIB <= scalar
    assert peak_memory(in_place, device) <= scalar


def test_peak_memory_sees_inside_operators(device: torch.device) -> None:
    """One call, a result of one number, and temporaries as large as its arguments."""
    x = torch.zeros(1, MIB // 4, device=device)
    assert peak_memory(lambda: torch.nn.functional.cosine_similarity(x, x), device) >= MIB


@pytest.mark.parametrize("measure", [True, False], ids=["measured", "solver alone"])
@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("order", ["activation", "sensitivity-static", "sensitivity"])
@pytest.mark.parametrize("R, C", [(256, 1024), (1024, 512), (1536, 512)])
def test_solve_keeps_to_its_memory(
    R: int, C: int, order: Order, group_size: int, measure: bool, device: torch.device
) -> None:
    weight, hessian = problem(R, C, device=device)
    spec = QuantSpec(4, group_size)
    used = peak_memory(
        lambda: solve(weight, hessian, spec, order=order, measure=measure), weight.device
    )
    assert used <= 3 * 4 * C * C + 2 * 4 * R * C
