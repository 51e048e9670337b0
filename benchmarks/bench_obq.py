"""SAPQ against exact OBQ, with delayed updates and as published; `benchmarks.obq` has the table."""

from typing import Any

import pytest
import torch

from benchmarks.measure import Case, record
from benchmarks.obq import DAMP, SPEC, Problem, Setting, check, check_setting
from sapq_triton import solve
from sapq_triton.ops import Backend

METHODS = ["sapq", "obq", "literal"]
SHAPES = [  # R, C
    pytest.param(16, 96, id="16x96"),
    pytest.param(128, 512, id="128x512", marks=pytest.mark.gpu),
    pytest.param(512, 512, id="512x512", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, method: str, device: torch.device) -> Case:
    made = Problem.of(rows, columns, device)
    setting = Setting(rows, 64)

    def call(backend: Backend) -> object:
        if method == "sapq":
            return solve(made.weight, made.hessian, SPEC, damp=DAMP, backend=backend)
        if method == "obq":
            return made.obq(slice(rows), setting, backend=backend)
        return made.literal(slice(rows), columns)

    def both(backend: Backend) -> None:
        check(made)
        check_setting(made, setting)

    return Case(call, both)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("R, C", SHAPES)
def bench_obq(
    benchmark: Any, device: torch.device, backend: Backend, R: int, C: int, method: str
) -> None:
    benchmark.group = f"SAPQ and OBQ {R}x{C}"
    made = case(R, C, method, device)
    record(benchmark, made, backend, device, rows=R, columns=C, method=method)
