"""Whole models: every layer of ResNet-50, YOLOv5s and EfficientNet-Lite0, a block of Llama-3-8B.

bench_solves     all layers, Hessians given, errors not measured: the solver alone
bench_block      the block of Llama-3-8B with its four Hessians, summed over batches of tokens
bench_quantize   `quantize` as a whole: calibration on images, Hessians, solves, corrections

Layers that read the same input (q, k and v; gate and up) are one Hessian and one solve of all their
rows. Smoke sizes have a sixteenth of the rows and columns; that of bench_quantize is the first
stage of ResNet-50 on small images.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_hessian import relative_error
from benchmarks.bench_solve import in_same_order, tolerance
from benchmarks.measure import Case, record
from benchmarks.shapes import (
    Layer,
    counted,
    efficientnet_lite0,
    inputs,
    llama_3_8b_solves,
    problems,
    resnet50,
    yolov5s,
)
from sapq_triton import QuantSpec, Report, SolveResult, layer_error, models, quantize, solve
from sapq_triton.hessian import HessianSum
from sapq_triton.layers import weight_matrix
from sapq_triton.ops import Backend
from sapq_triton.spec import Order

MODELS = {
    "ResNet-50": (resnet50, QuantSpec(4)),
    "YOLOv5s": (yolov5s, QuantSpec(4)),
    "EfficientNet-Lite0": (efficientnet_lite0, QuantSpec(4)),
    "Llama-3-8B block": (llama_3_8b_solves, QuantSpec(4, 128)),
}
ORDERS: tuple[Order, ...] = ("natural", "activation", "sensitivity")
SMOKE = 16  # rows and columns are divided by this
CASES = [  # model, shrunk
    *(pytest.param(name, SMOKE, id=f"{name}/{SMOKE}") for name in list(MODELS)[:3]),
    *(pytest.param(name, 1, id=name, marks=pytest.mark.gpu) for name in MODELS),
]
BLOCKS = [  # shrunk, batches, tokens in each
    pytest.param(64, 2, 256, id="1/64 of the columns"),
    pytest.param(1, 16, 16384, id="262144 tokens", marks=pytest.mark.gpu),
]
IMAGES = [  # the whole network, side, images, batch
    pytest.param(False, 32, 4, 2, id="first stage, 4 images of 32x32"),
    pytest.param(True, 224, 1024, 64, id="1024 images of 224x224", marks=pytest.mark.gpu),
]
HESSIAN_TOLERANCE = 1e-4  # of sqrt(H_ii H_jj)


def shrink(layer: Layer, by: int) -> Layer:
    """A depthwise layer keeps its shape and loses groups."""
    if layer.groups > 1:
        groups = max(2, layer.groups // by)
        return Layer(layer.name, groups, layer.rows, layer.columns, layer.inputs)
    rows, columns = max(1, layer.rows // by), max(1, layer.columns // by)
    return Layer(layer.name, 1, rows, columns, (columns,))


def total_error(weight: Tensor, hessian: Tensor, result: SolveResult) -> Tensor:
    """Relative error of all groups together, on whatever device they are."""
    error = layer_error(weight, result.dequantize(), hessian).sum()
    return error / layer_error(weight, torch.zeros_like(weight), hessian).sum()


def case(
    layers: tuple[Layer, ...], spec: QuantSpec, order: Order, device: torch.device, shrunk: int = 1
) -> Case:
    counts = counted(shrink(layer, shrunk) for layer in layers)
    made = {layer: problems(layer, device=device) for layer in counts}

    def call(backend: Backend, order: Order = order) -> list[SolveResult]:
        """Layers of one shape solve the same problem, each anew."""
        return [
            solve(*made[layer], spec, order=order, measure=False, backend=backend)
            for layer, count in counts.items()
            for _ in range(count)
        ]

    def once(backend: Backend, order: Order = order) -> list[SolveResult]:
        return [solve(*made[x], spec, order=order, measure=False, backend=backend) for x in made]

    def check(backend: Backend) -> None:
        """Better than rounding to nearest, and each layer as good as on the reference path."""
        actual, nearest = once(backend), once("reference", "nearest")
        assert not any(x.report.fallback.any() for x in actual), "a layer was not solved"
        ours, theirs = (
            [total_error(*made[layer], x).item() for layer, x in zip(made, found, strict=True)]
            for found in (actual, nearest)
        )
        assert sum(ours) < sum(theirs), f"error {sum(ours):.4g}, of rounding {sum(theirs):.4g}"
        if backend != "triton":
            return
        for layer, a, error, e in zip(made, actual, ours, once("reference"), strict=True):
            ratio = error / total_error(*made[layer], e).item()
            # small groups each have an order of their own: none but a close call may differ
            allowed = tolerance(layer.groups * layer.rows, in_same_order(a, e))
            assert abs(ratio - 1) < allowed, f"{layer.name}: error is {ratio:.6f} of it"

    return Case(call, check)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model, shrunk", CASES)
def bench_solves(
    benchmark: Any, device: torch.device, backend: Backend, model: str, shrunk: int, order: Order
) -> None:
    benchmark.group = f"{model}, sizes divided by {shrunk}"
    find, spec = MODELS[model]
    made = case(find(), spec, order, device, shrunk)
    record(benchmark, made, backend, device, model=model, layers=len(find()), order=order)


# --- Hessians and solves of a transformer block ---------------------------------------------------


def block_case(order: Order, device: torch.device, shrunk: int, batches: int, tokens: int) -> Case:
    """The four inputs of the block, bfloat16; each is added `batches` times, as if it were new."""
    layers = [shrink(layer, shrunk) for layer in llama_3_8b_solves()]
    xs = [inputs(layer, tokens, dtype=torch.bfloat16, device=device) for layer in layers]
    weights = [
        torch.randn(x.rows, x.columns, generator=torch.Generator().manual_seed(0)).to(device)
        for x in layers
    ]
    spec = QuantSpec(4, 128 if shrunk == 1 else -1)

    def hessian(x: Tensor, backend: Backend) -> Tensor:
        total = HessianSum(1, x.shape[1], device)
        for _ in range(batches):
            total.add(x, backend=backend)
        return total.hessian()

    def call(backend: Backend, order: Order = order) -> list[SolveResult]:
        return [
            solve(w, hessian(x, backend)[0], spec, order=order, measure=False, backend=backend)
            for w, x in zip(weights, xs, strict=True)
        ]

    def check(backend: Backend) -> None:
        for layer, w, x, result in zip(layers, weights, xs, call(backend), strict=True):
            h = hessian(x, backend)
            off = relative_error(h, layer, [x])
            assert off < HESSIAN_TOLERANCE, f"{layer.name}: its Hessian is off by {off:.2g}"
            assert not result.report.fallback, f"{layer.name} was not solved"
            nearest = solve(w, h[0], spec, order="nearest", backend="reference")
            ratio = total_error(w, h[0], result) / nearest.report.relative_error
            assert ratio < 1, f"{layer.name}: {ratio:.4g} times the error of rounding"

    rows = batches * tokens
    flops = sum(rows * layer.columns * (layer.columns + 1) for layer in layers)
    return Case(call, check, flops=flops, dtype="bfloat16")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shrunk, batches, tokens", BLOCKS)
def bench_block(
    benchmark: Any, device: torch.device, backend: Backend,
    shrunk: int, batches: int, tokens: int, order: Order,
) -> None:  # fmt: skip
    benchmark.group = f"Llama-3-8B block, Hessians and solves, columns divided by {shrunk}"
    made = block_case(order, device, shrunk, batches, tokens)
    record(benchmark, made, backend, device, tokens=batches * tokens, order=order)


# --- with calibration -----------------------------------------------------------------------------


def network(whole: bool) -> nn.Module:
    """ResNet-50 with random weights, or what comes before its second stage."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.resnet50()
    if whole:
        return model
    return nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1).eval()


def quantize_case(
    order: Order, device: torch.device, whole: bool, side: int, images: int, batch: int
) -> Case:
    model = network(whole).to(device)
    random = torch.Generator(device).manual_seed(0)
    pixels = torch.randn(images, 3, side, side, generator=random, device=device)
    batches = list(pixels.split(batch))

    def run(backend: Backend, order: Order = order) -> tuple[nn.Module, Report]:
        quantized = copy.deepcopy(model)
        found = quantize(
            quantized, batches, QuantSpec(4), order=order, backend=backend, progress=False
        )
        return quantized, found

    def check(backend: Backend) -> None:
        """The model holds what the report says, and that is better than rounding to nearest."""
        quantized, report = run(backend)
        assert not report.skipped and not any(x.fallbacks for x in report.layers)
        for layer in report.layers:
            held = weight_matrix(quantized.get_submodule(layer.name))
            assert torch.equal(held.cpu(), layer.dequantize()), f"{layer.name} holds other weights"
        _, nearest = run(backend, "nearest")
        ratio = report.relative_error / nearest.relative_error
        assert ratio < 1, f"{ratio:.4g} times the error of rounding to nearest"

    return Case(run, check)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("whole, side, images, batch", IMAGES)
def bench_quantize(
    benchmark: Any, device: torch.device, backend: Backend,
    whole: bool, side: int, images: int, batch: int, order: Order,
) -> None:  # fmt: skip
    benchmark.group = f"ResNet-50 {'whole' if whole else 'first stage'}, {images} images of {side}"
    made = quantize_case(order, device, whole, side, images, batch)
    record(benchmark, made, backend, device, images=images, side=side, order=order)
