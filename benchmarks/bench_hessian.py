"""The Hessian of a layer from calibration data in batches: accumulation and the final division."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_accumulate_hessian import CONVOLUTIONS, DEPTHWISE, LINEAR, SMALL, unfolded
from benchmarks.measure import Case, record, size
from benchmarks.shapes import Layer, inputs
from sapq_triton.hessian import HessianSum
from sapq_triton.ops import Backend

BATCHES = 4
CASES = [  # layer, tokens or images in each batch
    pytest.param(Layer("small", 1, 64, 128, (128,)), 256, id="128 columns"),
    pytest.param(SMALL, 8, id="72 columns, 3x3 stride 2"),
    pytest.param(DEPTHWISE, 2, id="9 columns, depthwise 3x3"),
    pytest.param(LINEAR["q_proj"], 65536, id="4096 columns", marks=pytest.mark.gpu),
    pytest.param(LINEAR["down_proj"], 65536, id="14336 columns", marks=pytest.mark.gpu),
    pytest.param(
        CONVOLUTIONS["layer3.1.conv2"], 256, id="2304 columns, 3x3", marks=pytest.mark.gpu
    ),
]


def case(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    batches = [inputs(layer, batch, dtype=dtype, device=device, seed=s) for s in range(BATCHES)]

    def call(backend: Backend) -> Tensor:
        total = HessianSum(layer.groups, layer.columns, device)
        for x in batches:
            total.add(x, layer.window, backend=backend)
        return total.hessian()

    def check(backend: Backend) -> None:
        """Against unfold and a float64 product, relative to what the diagonal allows."""
        error = relative_error(call(backend), layer, batches)
        assert error < 1e-4, f"the Hessian is off by {error:.2g} of its diagonal"

    positions = 1
    if layer.window is not None:
        d, h, w = layer.window.positions(layer.inputs[1:])
        positions = d * h * w
    rows = BATCHES * batch * positions
    flops = layer.groups * rows * layer.columns * (layer.columns + 1)
    hessian = 4 * layer.groups * layer.columns**2
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return Case(call, check, moved=size(*batches) + hessian, flops=flops, dtype=name)


def relative_error(hessian: Tensor, layer: Layer, batches: list[Tensor]) -> float:
    """max |H_ij - exact H_ij| / sqrt(H_ii H_jj), of both halves"""
    expected, rows = torch.zeros_like(hessian, dtype=torch.float64), 0
    for x in batches:
        x = unfolded(x, layer)
        expected += x @ x.mT
        rows += x.shape[2]
    expected *= 2 / rows
    root = expected.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-30)
    return ((hessian - expected).abs() / (root[:, :, None] * root[:, None, :])).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer, batch", CASES)
def bench_hessian(
    benchmark: Any, device: torch.device, backend: Backend,
    layer: Layer, batch: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    benchmark.group = f"Hessian of {layer.name} {layer.columns} columns {dtype}"
    info = {"columns": layer.columns, "groups": layer.groups, "batch": BATCHES * batch}
    record(benchmark, case(layer, batch, dtype, device), backend, device, **info)
