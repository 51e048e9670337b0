"""refine_tile: coordinate descent on the codes of a tile, all rows in parallel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record, size
from benchmarks.shapes import problem
from sapq_triton import ops
from sapq_triton.hessian import damped
from sapq_triton.ops import Backend

TIE = 1e-3  # of a step: so close to the middle between two codes, either is right
SHAPES = [  # R, T
    pytest.param(64, 48, id="64x48"),
    pytest.param(512, 128, id="512x128", marks=pytest.mark.gpu),
    pytest.param(4096, 128, id="4096x128", marks=pytest.mark.gpu),
    pytest.param(14336, 128, id="14336x128", marks=pytest.mark.gpu),
]


def case(rows: int, columns: int, sweeps: int, device: torch.device) -> Case:
    weight, hessian = (t[None] for t in problem(rows, columns, device=device))
    codes, scale, zero_point = ops.quantize_groups(weight, columns, 15, False, (1.0,))
    curvature = damped(hessian, 0.01)
    feedback = curvature / curvature.diagonal(dim1=1, dim2=2)[:, None]
    group = torch.zeros(1, columns, dtype=torch.int64, device=device)
    error = weight - (codes - zero_point) * scale
    # as the solver keeps them
    weight, codes, error = (t.mT.contiguous().mT for t in (weight, codes, error))

    def refined(backend: Backend, sweeps: int, codes: Tensor, error: Tensor) -> None:
        ops.refine_tile(
            weight, weight, feedback, scale, zero_point, group, 15, codes, error, sweeps, backend
        )

    def call(backend: Backend) -> None:
        refined(backend, sweeps, codes, error)

    def check(backend: Backend) -> None:
        """In float64, a sweep at once: given new errors before it and old ones behind, each code
        is the nearest."""
        c, e = codes.clone(), error.clone()
        w, s, z, f = (t.double() for t in (weight, scale, zero_point, feedback))
        for _ in range(sweeps):
            before = e.double()
            refined(backend, 1, c, e)
            torch.testing.assert_close(e.double(), w - (c - z) * s, rtol=0, atol=1e-5)
            steps = (w + e.double() @ f.triu(1) + before @ f.tril(-1)) / s
            tied = (steps.frac().abs() - 0.5).abs() < TIE
            assert ((c == (steps.round() + z).clamp(0, 15)) | tied).all(), "not the nearest codes"
        at_once = codes.clone()
        refined(backend, sweeps, at_once, error.clone())
        same = (at_once == c).double().mean().item()
        assert same > 0.999, f"{sweeps} sweeps and {sweeps} times one agree on {same:.4f} only"

    # two multiplications and additions, of rows, for each pair of columns and sweep
    flops = 2 * rows * columns * (columns - 1) * sweeps
    moved = size(weight, weight, scale, zero_point, codes, error, error, feedback)
    return Case(call, check, moved=moved, flops=flops)


@pytest.mark.parametrize("R, T", SHAPES)
def bench_refine_tile(
    benchmark: Any, device: torch.device, backend: Backend, R: int, T: int
) -> None:
    benchmark.group = f"refine_tile {R}x{T}, 2 sweeps"
    record(benchmark, case(R, T, 2, device), backend, device, rows=R, columns=T, sweeps=2)
