"""solve_columns: the columns of a tile one after another, all rows in parallel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.shapes import problem
from sapq_triton import ops
from sapq_triton.hessian import feedback_factor
from sapq_triton.ops import Backend

TIE = 1e-3  # of a step: so close to the middle between two codes, either is right
SHAPES = [  # R, T
    pytest.param(64, 48, id="64x48"),
    pytest.param(512, 128, id="512x128", marks=pytest.mark.gpu),
    pytest.param(4096, 128, id="4096x128", marks=pytest.mark.gpu),
    pytest.param(14336, 128, id="14336x128", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, device: torch.device) -> Case:
    weight, hessian = (t[None] for t in problem(rows, columns, device=device))
    _, scale, zero_point = ops.quantize_groups(weight, columns, 15, False, (1.0,))
    feedback, _ = feedback_factor(hessian, 0.01)
    group = torch.zeros(1, columns, dtype=torch.int64, device=device)
    weight = weight.mT.contiguous().mT  # as the solver keeps it

    def call(backend: Backend) -> tuple[Tensor, Tensor]:
        return ops.solve_columns(
            weight, weight, feedback, scale, zero_point, group, 15, backend=backend
        )

    def check(backend: Backend) -> None:
        """In float64, all columns at once: each code is the nearest, given the errors before it."""
        codes, error = call(backend)
        w, s, z = weight.double(), scale.double(), zero_point.double()
        torch.testing.assert_close(error.double(), w - (codes - z) * s, rtol=0, atol=1e-5)
        steps = (w + error.double() @ feedback.double().triu(1)) / s
        tied = (steps.frac().abs() - 0.5).abs() < TIE
        assert ((codes == (steps.round() + z).clamp(0, 15)) | tied).all(), "not the nearest codes"

    # two multiplications and additions, of rows, for each pair of columns
    flops = rows * columns * (columns - 1)
    moved = size(weight, weight, scale, zero_point, *call("auto")) + size(feedback) // 2
    return Case(call, check, moved=moved, flops=flops)


@pytest.mark.parametrize("R, T", SHAPES)
def bench_solve_columns(
    benchmark: Any, device: torch.device, backend: Backend, R: int, T: int
) -> None:
    benchmark.group = f"solve_columns {R}x{T}"
    record(benchmark, case(R, T, device), backend, device, rows=R, columns=T)
