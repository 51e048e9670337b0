"""downdate: the inverse Hessian of the remaining columns after a tile."""

from typing import Any

import pytest
import torch

from benchmarks.measure import Case, record, size
from sapq_triton import ops
from sapq_triton.ops import Backend

SHAPES = [  # F, T
    pytest.param(200, 32, id="200"),
    pytest.param(3968, 128, id="3968", marks=pytest.mark.gpu),
    pytest.param(14208, 128, id="14208", marks=pytest.mark.gpu),
]


def case(columns: int, tile: int, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    shapes = (1, columns, columns), (1, tile, columns)
    inverse, rows = (torch.randn(s, generator=random, device=device) for s in shapes)
    inverse += inverse.mT.clone()

    def call(backend: Backend) -> None:
        ops.downdate(inverse, rows, backend=backend)

    def check(backend: Backend) -> None:
        actual = inverse.clone()
        ops.downdate(actual, rows, backend=backend)
        expected = inverse.double() - rows.double().mT @ rows.double()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)

    # both halves are read and written, one is computed
    moved, flops = size(inverse, inverse, rows), columns * (columns + 1) * tile
    return Case(call, check, moved=moved, flops=flops)


@pytest.mark.parametrize("F, T", SHAPES)
def bench_downdate(benchmark: Any, device: torch.device, backend: Backend, F: int, T: int) -> None:
    benchmark.group = f"downdate {F}x{F}, {T} columns"
    record(benchmark, case(F, T, device), backend, device, columns=F, tile=T)
