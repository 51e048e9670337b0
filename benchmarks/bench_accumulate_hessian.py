"""accumulate_hessian: X^T X of linear layers, and of convolutions with patches gathered inside."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.shapes import Layer, inputs, llama_3_8b, resnet50
from sapq_triton import ops
from sapq_triton.ops import Backend
from sapq_triton.window import Window

LINEAR = {layer.name: layer for layer in llama_3_8b()}
CONVOLUTIONS = {layer.name: layer for layer in resnet50()}
DEPTHWISE = Layer(
    "depthwise", 32, 1, 9, (32, 1, 18, 18), Window((1, 3, 3), (1, 1, 1), (1, 1, 1), 32)
)
SMALL = Layer("small", 1, 16, 72, (8, 1, 9, 9), Window((1, 3, 3), (1, 2, 2)))
CASES = [  # layer, tokens or images
    pytest.param(Layer("small", 1, 64, 96, (96,)), 512, id="96 columns"),
    pytest.param(SMALL, 16, id="72 columns, 3x3 stride 2"),
    pytest.param(DEPTHWISE, 4, id="9 columns, depthwise 3x3"),
    pytest.param(LINEAR["q_proj"], 65536, id="4096 columns", marks=pytest.mark.gpu),
    pytest.param(LINEAR["down_proj"], 16384, id="14336 columns", marks=pytest.mark.gpu),
    pytest.param(CONVOLUTIONS["layer1.0.conv2"], 64, id="576 columns, 3x3", marks=pytest.mark.gpu),
    pytest.param(
        CONVOLUTIONS["layer4.1.conv2"], 256, id="4608 columns, 3x3", marks=pytest.mark.gpu
    ),
]


def unfolded(x: Tensor, layer: Layer) -> Tensor:
    """Rows of X per group, float64: [groups, columns, N * positions]"""
    if layer.window is None:
        return x.double().T[None]
    _, dilation, stride = (
        w[1:] for w in (layer.window.size, layer.window.dilation, layer.window.stride)
    )
    patches = F.unfold(x[:, :, 0].double(), layer.window.size[1:], dilation, 0, stride)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def case(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = inputs(layer, batch, dtype=dtype, device=device)
    total = torch.zeros(layer.groups, layer.columns, layer.columns, device=device)
    rows = ops.accumulate_hessian(total, x, layer.window)

    def call(backend: Backend) -> None:
        ops.accumulate_hessian(total, x, layer.window, backend=backend)

    def check(backend: Backend) -> None:
        """Against unfold and a float64 product, relative to what the diagonal allows."""
        error = relative_error(layer, x, backend)
        assert error < 1e-4, f"X^T X is off by {error:.2g} of its diagonal"

    # half of the square, and its diagonal
    flops = layer.groups * rows * layer.columns * (layer.columns + 1)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return Case(call, check, moved=size(x, total), flops=flops, dtype=name)


def relative_error(layer: Layer, x: Tensor, backend: Backend) -> float:
    """max |H_ij - exact H_ij| / sqrt(H_ii H_jj) over the lower triangle"""
    actual = torch.zeros(layer.groups, layer.columns, layer.columns, device=x.device)
    ops.accumulate_hessian(actual, x, layer.window, backend=backend)
    rows = unfolded(x, layer)
    expected = rows @ rows.mT
    root = expected.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-30)
    error = (actual.double() - expected).abs() / (root[:, :, None] * root[:, None, :])
    return error.tril().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer, batch", CASES)
def bench_accumulate_hessian(
    benchmark: Any, device: torch.device, backend: Backend,
    layer: Layer, batch: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    benchmark.group = f"accumulate_hessian {layer.name} {layer.columns} columns {dtype}"
    info = {"columns": layer.columns, "groups": layer.groups, "batch": batch}
    record(benchmark, case(layer, batch, dtype, device), backend, device, **info)
