"""solve_rows: greedy steps of exact OBQ, each row with an inverse Hessian of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.obq import literal_obq
from benchmarks.shapes import problem
from sapq_triton import ops
from sapq_triton.hessian import inverse
from sapq_triton.ops import Backend

SHAPES = [  # N, F, steps
    pytest.param(8, 96, 24, id="8x96"),
    pytest.param(1024, 512, 32, id="1024x512", marks=pytest.mark.gpu),
    pytest.param(64, 4608, 32, id="64x4608", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, steps: int, device: torch.device) -> Case:
    weight, hessian = problem(rows, columns, device=device)
    _, scale, zero_point = ops.quantize_groups(weight[None], columns, 15, False, (1.0,))
    scale, zero_point = scale[0], zero_point[0]
    shared = inverse(hessian[None], 0.01)[0]
    each = shared.repeat(rows, 1, 1)
    group = torch.zeros(rows, columns, dtype=torch.int64, device=device)

    def call(backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        return ops.solve_rows(weight.clone(), each, scale, zero_point, group, 15, steps, backend)

    def check(backend: Backend) -> None:
        """A few rows against the literal algorithm: the same choices but for close calls."""
        picked, codes, _ = (t[:8] for t in call(backend))
        expected = literal_obq(weight[:8], shared[0], scale[:8], zero_point[:8], 15, steps)
        same = (picked == expected.picked) & (codes == expected.codes)
        assert same.double().mean() > 0.95, f"{same.double().mean():.3f} of the choices are OBQ's"

    # of each inverse its diagonal and one row for each step, which is written again as `rows`
    return Case(call, check, moved=size(weight) * (2 * steps + 3))


@pytest.mark.parametrize("N, F, steps", SHAPES)
def bench_solve_rows(
    benchmark: Any, device: torch.device, backend: Backend, N: int, F: int, steps: int
) -> None:
    benchmark.group = f"solve_rows {N}x{F}, {steps} steps"
    record(benchmark, case(N, F, steps, device), backend, device, rows=N, columns=F, steps=steps)
