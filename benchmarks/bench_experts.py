"""Solves of the experts of a block: one after another, and in one batch.

Shapes are those of Qwen3-30B-A3B, up and gate as one matrix, with as many experts as
`sapq_triton.solving` puts in a batch; smoke sizes have a sixteenth of the rows and columns.
"""

from typing import Any, Literal

import pytest
import torch

from benchmarks.measure import Case, record
from benchmarks.shapes import Layer, problems
from sapq_triton import QuantSpec, SolveResult, layer_error, solve
from sapq_triton.ops import Backend

Way = Literal["one by one", "in one batch"]
PROJECTIONS = {"up and gate": (1536, 2048), "down": (2048, 768)}  # rows, columns
SIZES = [  # experts, divided by
    pytest.param(8, 16, id="8 experts/16"),
    pytest.param(8, 1, id="8 experts", marks=pytest.mark.gpu),
]


def case(experts: int, rows: int, columns: int, way: Way, device: torch.device) -> Case:
    weight, hessian = problems(Layer("expert", experts, rows, columns, (columns,)), device=device)

    def call(backend: Backend, way: Way = way) -> list[SolveResult]:
        parts = (
            [slice(None)] if way == "in one batch" else [slice(n, n + 1) for n in range(experts)]
        )
        return [solve(weight[p], hessian[p], QuantSpec(4), measure=False, backend=backend)
                for p in parts]  # fmt: skip

    def check(backend: Backend) -> None:
        """Each expert is as good as by itself, but for close calls."""
        errors = [
            layer_error(weight, torch.cat([x.dequantize() for x in call(backend, each)]), hessian)
            for each in ("one by one", "in one batch")
        ]
        worst = (errors[1] / errors[0] - 1).abs().max()
        assert worst < 1e-2, f"an expert's error changes by {worst:.2g}"

    return Case(call, check)


@pytest.mark.parametrize("way", ["one by one", "in one batch"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("experts, shrunk", SIZES)
def bench_experts(
    benchmark: Any, device: torch.device, backend: Backend,
    experts: int, shrunk: int, projection: str, way: Way,
) -> None:  # fmt: skip
    rows, columns = (side // shrunk for side in PROJECTIONS[projection])
    benchmark.group = f"{experts} experts, {projection}, {rows}x{columns}"
    made = case(experts, rows, columns, way, device)
    record(benchmark, made, backend, device, experts=experts, rows=rows, columns=columns, way=way)
