"""compensate: the remaining weights take up the error of a tile."""

from typing import Any

import pytest
import torch

from benchmarks.measure import Case, record, size
from sapq_triton import ops
from sapq_triton.ops import Backend

SHAPES = [  # R, F, T
    pytest.param(64, 200, 32, id="64x200"),
    pytest.param(512, 4480, 128, id="512x4480", marks=pytest.mark.gpu),
    pytest.param(4096, 3968, 128, id="4096x3968", marks=pytest.mark.gpu),
    pytest.param(14336, 3968, 128, id="14336x3968", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, tile: int, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    shapes = (1, columns, rows), (1, rows, tile), (1, tile, columns)
    weight, error, row = (torch.randn(s, generator=random, device=device) for s in shapes)
    weight = weight.mT  # as the solver keeps it
    scale = torch.full((1, rows, 1), 0.5, device=device)
    grid = (scale, scale * 16, torch.zeros(1, columns, dtype=torch.int64, device=device), 15)

    def call(backend: Backend) -> None:
        ops.compensate(weight, error, row, *grid, backend=backend)

    def check(backend: Backend) -> None:
        actual = weight.clone()
        cost = ops.compensate(actual, error, row, *grid, backend=backend)
        expected = weight.double() - error.double() @ row.double()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
        w = actual.double()
        delta = w - ((w / 0.5).round() + 8).clamp(0, 15).sub(8).mul(0.5)
        torch.testing.assert_close(cost.double(), delta.square().sum(1), rtol=1e-4, atol=0)

    moved = size(weight, weight, error, row)
    return Case(call, check, moved=moved, flops=2 * rows * columns * tile)


@pytest.mark.parametrize("R, F, T", SHAPES)
def bench_compensate(
    benchmark: Any, device: torch.device, backend: Backend, R: int, F: int, T: int
) -> None:
    benchmark.group = f"compensate {R}x{F}, {T} columns"
    record(benchmark, case(R, F, T, device), backend, device, rows=R, columns=F, tile=T)
