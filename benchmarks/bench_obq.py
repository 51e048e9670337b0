"""SAPQ against exact OBQ, with delayed updates and as published; `benchmarks.obq` has the table."""

from typing import Any

import pytest
import torch

from benchmarks.measure import Case, record
from benchmarks.obq import Problem, Setting, check, check_setting
from benchmarks.shapes import Layer
from sapq_triton.ops import Backend

METHODS = ["sapq", "obq", "literal"]
SHAPES = [  # groups, R, C
    pytest.param(1, 16, 96, id="16x96"),
    pytest.param(16, 1, 25, id="16 groups of 1x25"),
    pytest.param(1, 128, 512, id="128x512", marks=pytest.mark.gpu),
    pytest.param(1, 512, 512, id="512x512", marks=pytest.mark.gpu),
    pytest.param(1152, 1, 25, id="1152 groups of 1x25", marks=pytest.mark.gpu),
]


def case(layer: Layer, method: str, device: torch.device) -> Case:
    made = Problem.of(layer, device)
    rows, columns = made.weight.shape
    setting = Setting(rows, 64)

    def call(backend: Backend) -> object:
        if method == "sapq":
            return made.sapq(backend)
        if method == "obq":
            return made.obq(slice(rows), setting, backend=backend)
        return made.literal(slice(rows), columns)

    def both(backend: Backend) -> None:
        check(made)
        check_setting(made, setting)

    return Case(call, both)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups, R, C", SHAPES)
def bench_obq(
    benchmark: Any, device: torch.device, backend: Backend, groups: int, R: int, C: int, method: str
) -> None:
    benchmark.group = f"SAPQ and OBQ {groups}x{R}x{C}"
    made = case(Layer("", groups, R, C, (groups * C,)), method, device)
    record(benchmark, made, backend, device, groups=groups, rows=R, columns=C, method=method)
