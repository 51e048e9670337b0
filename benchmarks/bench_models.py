"""Whole models: every layer of ResNet-50 and YOLOv5s solved, Hessians given.

On a GPU also the linear layers of one block of Llama-3-8B. Smoke sizes have the same layers with a
sixteenth of the rows and columns.
"""

from typing import Any

import pytest
import torch

from benchmarks.bench_solve import tolerance
from benchmarks.measure import Case, record
from benchmarks.shapes import Layer, llama_3_8b, problem, resnet50, yolov5s
from sapq_triton import QuantSpec, SolveResult, solve
from sapq_triton.ops import Backend
from sapq_triton.spec import Order

MODELS = {
    "ResNet-50": (resnet50, QuantSpec(4)),
    "YOLOv5s": (yolov5s, QuantSpec(4)),
    "Llama-3-8B block": (llama_3_8b, QuantSpec(4, 128)),
}
SMOKE = 16  # rows and columns are divided by this
CASES = [  # model, shrunk
    pytest.param("ResNet-50", SMOKE, id="ResNet-50/16"),
    pytest.param("YOLOv5s", SMOKE, id="YOLOv5s/16"),
    *(pytest.param(name, 1, id=name, marks=pytest.mark.gpu) for name in MODELS),
]


def case(
    layers: tuple[Layer, ...], spec: QuantSpec, order: Order, device: torch.device, shrunk: int = 1
) -> Case:
    assert all(layer.groups == 1 for layer in layers)
    sizes = [(max(1, x.rows // shrunk), max(1, x.columns // shrunk)) for x in layers]
    # layers of as many columns share a Hessian, which saves memory and changes no time
    rows = {C: max(R for R, other in sizes if other == C) for _, C in sizes}
    problems = {C: problem(rows[C], C, device=device) for C in rows}

    def call(backend: Backend, order: Order = order) -> list[SolveResult]:
        return [
            solve(problems[C][0][:R], problems[C][1], spec, order=order, backend=backend)
            for R, C in sizes
        ]

    def check(backend: Backend) -> None:
        """Better than rounding to nearest, and each layer as good as on the reference path."""
        actual, nearest = call(backend), call("reference", "nearest")
        assert not any(result.report.fallback for result in actual), "a layer was not solved"
        ours, others = (sum(x.report.relative_error for x in found) for found in (actual, nearest))
        assert ours < others, f"relative error {ours:.4g}, of rounding to nearest {others:.4g}"
        if backend == "triton":
            for layer, a, e in zip(layers, actual, call("reference"), strict=True):
                ratio = (a.report.error / e.report.error).item()
                allowed = tolerance(a.codes.shape[0], torch.equal(a.columns, e.columns))
                assert abs(ratio - 1) < allowed, f"{layer.name}: error is {ratio:.6f} of it"

    return Case(call, check)


@pytest.mark.parametrize("order", ["natural", "activation", "sensitivity"])
@pytest.mark.parametrize("model, shrunk", CASES)
def bench_models(
    benchmark: Any, device: torch.device, backend: Backend, model: str, shrunk: int, order: Order
) -> None:
    benchmark.group = f"{model}, sizes divided by {shrunk}"
    find, spec = MODELS[model]
    made = case(find(), spec, order, device, shrunk)
    record(benchmark, made, backend, device, model=model, layers=len(find()), order=order)
