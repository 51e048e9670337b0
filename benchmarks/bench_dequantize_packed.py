"""dequantize_packed: the weight of a convolution, or of a product with many rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from sapq_triton import ops, reference
from sapq_triton.ops import Backend
from sapq_triton.packing import words

SHAPES = [  # R, C
    pytest.param(64, 512, id="64x512"),
    pytest.param(512, 4608, id="512x4608", marks=pytest.mark.gpu),
    pytest.param(4096, 4096, id="4096x4096", marks=pytest.mark.gpu),
    pytest.param(4096, 14336, id="4096x14336", marks=pytest.mark.gpu),
]


def packed_weight(
    rows: int, columns: int, bits: int, group_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, scale, qzeros of random bits: any word is codes"""
    random = torch.Generator(device).manual_seed(0)
    groups = columns // group_size
    qweight, qzeros = (
        torch.randint(2**32, (rows, words(n, bits)), generator=random, device=device)
        .sub_(2**31)
        .int()
        for n in (columns, groups)
    )
    scale = torch.rand(rows, groups, generator=random, device=device).add_(0.5).half()
    return qweight, scale, qzeros


def case(
    rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> Case:
    tensors = packed_weight(rows, columns, bits, group_size, device)

    def call(backend: Backend) -> Tensor:
        return ops.dequantize_packed(*tensors, bits, columns, dtype, backend)

    def check(backend: Backend) -> None:
        expected = reference.dequantize_packed(*tensors, bits, columns, dtype)
        torch.testing.assert_close(call(backend), expected, rtol=0, atol=0)

    weight = torch.empty(rows, columns, dtype=dtype, device="meta")
    return Case(call, check, moved=size(*tensors, weight))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("R, C", SHAPES)
def bench_dequantize_packed(
    benchmark: Any, device: torch.device, backend: Backend, R: int, C: int, bits: int
) -> None:
    benchmark.group = f"dequantize_packed {R}x{C}, {bits} bits"
    info = {"rows": R, "columns": C, "bits": bits}
    record(benchmark, case(R, C, bits, 128, torch.float16, device), backend, device, **info)
