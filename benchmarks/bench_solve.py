"""solve: a whole layer, its Hessian given; factorization, grid search and report included."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, record
from benchmarks.shapes import problem
from sapq_triton import QuantSpec, SolveResult, dequantize, layer_error, solve
from sapq_triton.ops import Backend
from sapq_triton.spec import Order

ORDERS = [order for order in get_args(Order) if order not in ("obq", "nearest")]
BLOCK, SWEEPS = 128, 2  # the defaults of solve
SHAPES = [  # R, C, group_size
    pytest.param(64, 192, -1, id="64x192"),
    pytest.param(512, 4608, -1, id="512x4608", marks=pytest.mark.gpu),
    pytest.param(2048, 512, -1, id="2048x512", marks=pytest.mark.gpu),
    pytest.param(4096, 4096, 128, id="4096x4096", marks=pytest.mark.gpu),
]


def textbook(weight: Tensor, hessian: Tensor, result: SolveResult, qmax: int) -> Tensor:
    """Codes of GPTQ as published (arXiv 2210.17323), in float64, on the order and grid of `result`.

    Three factorizations, and each column's error handed to the rest of its block: nothing in common
    with the solver but the mathematics. In order "sensitivity" coordinate descent on the error
    within each block follows. weight [R, C], hessian [C, C]
    """
    C = weight.shape[1]
    assert result.columns is not None
    columns = result.columns
    sweeps = SWEEPS if result.report.order == "sensitivity" else 0
    h = hessian.double()[columns][:, columns]
    h.diagonal().add_(result.report.damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w = weight.double()[:, columns]
    scale, zero_point = (
        grid.double().repeat_interleave(C // grid.shape[1], 1)[:, columns]
        for grid in (result.scale, result.zero_point)
    )
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, C, BLOCK):
        tile, behind = slice(start, start + BLOCK), slice(start + BLOCK, C)
        s, z, u = scale[:, tile], zero_point[:, tile], upper[tile, tile]
        running, code = w[:, tile].clone(), torch.empty_like(s)

        def put(k: int, now: Tensor, code: Tensor = code, s: Tensor = s, z: Tensor = z) -> Tensor:
            code[:, k] = ((now / s[:, k]).round() + z[:, k]).clamp(0, qmax)
            return (code[:, k] - z[:, k]) * s[:, k]

        for k in range(len(u)):
            error = (running[:, k] - put(k, running[:, k])) / u[k, k]
            running[:, k:] -= error[:, None] * u[k, k:]
        error = w[:, tile] - (code - z) * s
        curvature = torch.cholesky_inverse(u, upper=True)
        for k in [*range(len(u))] * sweeps:
            step = error @ curvature[k] / curvature[k, k] - error[:, k]
            error[:, k] = w[:, start + k] - put(k, w[:, start + k] + step)
        codes[:, columns[tile]] = code.to(torch.uint8)
        scaled = torch.linalg.solve_triangular(u, error, upper=True, left=False)
        w[:, behind] -= scaled @ upper[tile, behind]
    return codes


def error_ratio(weight: Tensor, hessian: Tensor, result: SolveResult, codes: Tensor) -> float:
    """Layer error of `result` over that of other codes on its grid, both in float64."""
    h = hessian.double()
    other = dequantize(codes, result.scale, result.zero_point)
    return (layer_error(weight, result.dequantize(), h) / layer_error(weight, other, h)).item()


def tolerance(rows: int, same_order: bool = True) -> float:
    """How far an error ratio may be from 1.

    A close call changes the rest of its row, and few rows average out less. Where one changes the
    ranking of columns, all rows change: a perturbation of the Hessian by 1e-6 moved errors by up to
    8e-4 so.
    """
    return max(1e-3 if same_order else 3e-3, 0.5 / rows)


def in_same_order(a: SolveResult, b: SolveResult) -> bool:
    """Whether both were quantized in one order of columns."""
    return a.columns is not None and b.columns is not None and torch.equal(a.columns, b.columns)


def case(rows: int, columns: int, spec: QuantSpec, order: Order, device: torch.device) -> Case:
    weight, hessian = problem(rows, columns, device=device)

    def call(backend: Backend) -> SolveResult:
        return solve(
            weight, hessian, spec, order=order, block=BLOCK, sweeps=SWEEPS, backend=backend
        )

    def check(backend: Backend) -> None:
        result = call(backend)
        codes = textbook(weight, hessian, result, spec.qmax)
        ratio = error_ratio(weight, hessian, result, codes)
        assert abs(ratio - 1) < tolerance(rows), f"layer error is {ratio:.6f} of that in float64"

    return Case(call, check, weight=4 * rows * columns, hessian=4 * columns**2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("R, C, group_size", SHAPES)
def bench_solve(
    benchmark: Any, device: torch.device, backend: Backend,
    R: int, C: int, group_size: int, order: Order,
) -> None:  # fmt: skip
    benchmark.group = f"solve {R}x{C}"
    made = case(R, C, QuantSpec(4, group_size), order, device)
    record(benchmark, made, backend, device, rows=R, columns=C, order=order)
