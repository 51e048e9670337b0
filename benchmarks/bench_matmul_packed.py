"""matmul_packed: a linear layer on packed codes, beside the product with a weight of 16 bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_dequantize_packed import packed_weight
from benchmarks.measure import Case, record, size
from sapq_triton import ops, reference
from sapq_triton.ops import Backend

SHAPES = [  # M, N, K
    pytest.param(1, 64, 512, id="1x64x512"),
    *[
        pytest.param(M, N, K, id=f"{M}x{N}x{K}", marks=pytest.mark.gpu)
        for N, K in ((4096, 4096), (14336, 4096), (4096, 14336))
        for M in (1, 16, 4096)
    ],
]


def inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(1)
    return torch.randn(rows, columns, generator=random, device=device).to(dtype)


def case(
    M: int, N: int, K: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> Case:
    x, tensors = inputs(M, K, dtype, device), packed_weight(N, K, bits, group_size, device)

    def call(backend: Backend) -> Tensor:
        return ops.matmul_packed(x, *tensors, bits, backend=backend)

    def check(backend: Backend) -> None:
        """As far from float64 as the rounding of y and of all weights may bring it."""
        weight = reference.dequantize_packed(*tensors, bits, K, torch.float64)
        largest = x.double().abs() @ torch.full_like(weight, 1.5 * 2**bits).T
        step = torch.finfo(dtype).eps
        expected = x.double() @ weight.T
        bound = step * (largest / 2 + expected.abs()) + 1e-5 * largest
        assert ((call(backend).double() - expected).abs() <= bound).all()

    y = torch.empty(M, N, dtype=dtype, device="meta")
    name = "float32" if dtype == torch.float32 else "bfloat16"  # no faster than float16
    return Case(call, check, moved=size(x, *tensors, y), flops=2 * M * N * K, dtype=name)


def plain(M: int, N: int, K: int, device: torch.device) -> Case:
    """torch.matmul with a weight of 16 bits"""
    x = inputs(M, K, torch.float16, device)
    weight = inputs(N, K, torch.float16, device)

    def call(backend: Backend) -> Tensor:
        return x @ weight.T

    def check(backend: Backend) -> None:
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(call(backend).double(), expected, rtol=2**-8, atol=K**0.5 / 16)

    moved = size(x, weight) + 2 * M * N
    return Case(call, check, moved=moved, flops=2 * M * N * K, dtype="bfloat16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("M, N, K", SHAPES)
def bench_matmul_packed(
    benchmark: Any, device: torch.device, backend: Backend, M: int, N: int, K: int, bits: int
) -> None:
    benchmark.group = f"matmul {M}x{N}x{K}"
    info = {"rows": M, "outputs": N, "columns": K, "bits": bits}
    record(benchmark, case(M, N, K, bits, 128, torch.float16, device), backend, device, **info)


@pytest.mark.parametrize("M, N, K", SHAPES)
def bench_matmul_16_bit(benchmark: Any, device: torch.device, M: int, N: int, K: int) -> None:
    benchmark.group = f"matmul {M}x{N}x{K}"
    info = {"rows": M, "outputs": N, "columns": K, "bits": 16}
    record(benchmark, plain(M, N, K, device), "reference", device, **info)
