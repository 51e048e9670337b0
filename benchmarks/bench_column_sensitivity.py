"""column_sensitivity: what rounding each of the remaining columns would cost."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.shapes import problem
from sapq_triton import dequantize, ops
from sapq_triton.ops import Backend

SHAPES = [  # R, F
    pytest.param(64, 256, id="64x256"),
    pytest.param(512, 4608, id="512x4608", marks=pytest.mark.gpu),
    pytest.param(4096, 4096, id="4096x4096", marks=pytest.mark.gpu),
    pytest.param(14336, 4096, id="14336x4096", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, group_size: int, device: torch.device) -> Case:
    weight, hessian = (t[None] for t in problem(rows, columns, device=device))
    codes, scale, zero_point = ops.quantize_groups(weight, group_size, 15, False, (1.0,))
    group = torch.arange(columns, device=device)[None] // group_size
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # its size is what matters
    weight = weight.mT.contiguous().mT  # as the solver keeps it

    def call(backend: Backend) -> Tensor:
        return ops.column_sensitivity(weight, scale, zero_point, group, diagonal, 15, backend)

    def check(backend: Backend) -> None:
        error = weight.double() - dequantize(codes, scale, zero_point).double()
        expected = error.square().sum(1) / diagonal.double()
        torch.testing.assert_close(call(backend).double(), expected, rtol=1e-4, atol=0)

    return Case(call, check, moved=size(weight, scale, zero_point, call("auto")) + 4 * columns)


@pytest.mark.parametrize("R, F", SHAPES)
def bench_column_sensitivity(
    benchmark: Any, device: torch.device, backend: Backend, R: int, F: int
) -> None:
    benchmark.group = f"column_sensitivity {R}x{F}"
    record(benchmark, case(R, F, 128, device), backend, device, rows=R, columns=F)
