"""quantize_groups: a grid for each group, with and without a search for the scale."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.shapes import problem
from sapq_triton import ops
from sapq_triton.ops import Backend
from sapq_triton.spec import QuantSpec, ScaleSearch

TIE = 1e-3  # of a step: so close to the middle between two codes, either is right
SHAPES = [  # R, C, group_size
    pytest.param(64, 256, 128, id="64x256"),
    pytest.param(512, 4608, -1, id="512x4608", marks=pytest.mark.gpu),
    pytest.param(4096, 4096, 128, id="4096x4096", marks=pytest.mark.gpu),
    pytest.param(14336, 4096, 128, id="14336x4096", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, spec: QuantSpec, device: torch.device) -> Case:
    weight = problem(rows, columns, device=device)[0][None]
    each = spec.columns_per_group(columns)

    def call(backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        return ops.quantize_groups(
            weight, each, spec.qmax, spec.symmetric, spec.shrink, backend=backend
        )

    def check(backend: Backend) -> None:
        """In float64: the codes are the nearest, and no fraction of the range has a lower error."""
        codes, scale, zero_point = call(backend)
        w = weight.double().unflatten(2, (-1, each))  # [1, R, G, group_size]
        s, z = scale.double()[..., None], zero_point.double()[..., None]

        def rounded(s: Tensor) -> tuple[Tensor, Tensor]:
            code = ((w / s).round() + z).clamp(0, spec.qmax)
            return code, ((code - z) * s - w).square().sum(-1)

        expected, error = rounded(s)
        tied = ((w / s).frac().abs() - 0.5).abs() < TIE
        assert ((codes.unflatten(2, (-1, each)) == expected) | tied).all(), "not the nearest codes"
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        full = 2 * torch.maximum(high, -low) if spec.symmetric else high - low
        full = torch.where(full > 0, full / spec.qmax, 1.0)
        for fraction in spec.shrink:
            assert (error <= rounded(full * fraction)[1] * (1 + 1e-4)).all(), "not the best scale"

    return Case(call, check, moved=size(weight, *call("auto")))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("R, C, group_size", SHAPES)
def bench_quantize_groups(
    benchmark: Any, device: torch.device, backend: Backend,
    R: int, C: int, group_size: int, search: ScaleSearch,
) -> None:  # fmt: skip
    benchmark.group = f"quantize_groups {search} {R}x{C}"
    spec = QuantSpec(4, group_size, scale_search=search)
    record(benchmark, case(R, C, spec, device), backend, device, rows=R, columns=C)
