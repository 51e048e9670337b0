"""Every ValueError of the solver and of the operations below it, by its message."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapq_triton import QuantSpec, ops, solve
from sapq_triton.hessian import HessianSum
from sapq_triton.solver import _finite
from sapq_triton.window import Window

ROOT = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")


def changed(tensor: Tensor, value: float, *at: int) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


# --- solve ----------------------------------------------------------------------------------------

WEIGHT, HESSIAN = torch.linspace(-1, 1, 24).reshape(4, 6), torch.eye(6)
BATCH = WEIGHT.expand(2, 4, 6)
SCALE, ZERO_POINT = torch.full((4, 2), 0.1), torch.full((4, 2), 7.0)
GROUPED, SYMMETRIC = QuantSpec(4, 3), QuantSpec(4, 3, symmetric=True)
GRID = {"spec": GROUPED, "scale": SCALE, "zero_point": ZERO_POINT}

SOLVE: dict[str, tuple[dict[str, Any], str]] = {  # arguments that differ from a good call, message
    "1d": ({"weight": torch.ones(6)}, r"weight must be \[R, C\] or .* got \[6\]"),
    "4d": ({"weight": torch.ones(1, 1, 4, 6)}, r"weight must be .* \[1, 1, 4, 6\]"),
    "no-rows": ({"weight": torch.ones(0, 6)}, r"weight must .* none empty, got \[0, 6\]"),
    "no-columns": ({"weight": torch.ones(4, 0)}, r"weight must .* none empty, got \[4, 0\]"),
    "int-weight": ({"weight": WEIGHT.long()}, r"weight must be floating point, got torch\.int64"),
    "complex-weight": (
        {"weight": WEIGHT + 0j},
        r"weight must be floating point, got torch\.complex64",
    ),
    "int-hessian": (
        {"hessian": HESSIAN.long()},
        r"hessian must be floating point, got torch\.int64",
    ),
    "size": (
        {"hessian": torch.eye(5)},
        r"hessian must be \[6, 6\] for a weight of \[4, 6\], got \[5, 5\]",
    ),
    "not-square": ({"hessian": torch.ones(6, 4)}, r"hessian must be .* got \[6, 4\]"),
    "diagonal-only": ({"hessian": torch.ones(6)}, r"hessian must be .* got \[6\]"),
    "batch-of-hessians": ({"hessian": HESSIAN[None]}, r"hessian must be .* got \[1, 6, 6\]"),
    "other-batch": (
        {"weight": BATCH, "hessian": HESSIAN.expand(3, 6, 6)},
        r"hessian must be \[6, 6\] or \[2, 6, 6\] for a weight of \[2, 4, 6\], got \[3, 6, 6\]",
    ),
    "device": ({"hessian": HESSIAN.to("meta")}, "hessian is on meta, weight on cpu"),
    "nan-weight": (
        {"weight": changed(WEIGHT, NAN, 2, 5)},
        r"weight must be finite .* nan at \[2, 5\]",
    ),
    "inf-weight": (
        {"weight": changed(WEIGHT, -INF, 0, 1)},
        r"weight must be finite .* -inf at \[0, 1\]",
    ),
    "beyond-float32": (
        {"weight": changed(WEIGHT.double(), 1e300, 3, 0)},
        r"weight must be finite in torch\.float32, got 1e\+300 at \[3, 0\]",
    ),
    "nan-batch": (
        {"weight": changed(BATCH, NAN, 1, 2, 3)},
        r"weight must be finite .* nan at \[1, 2, 3\]",
    ),
    "nan-hessian": (
        {"hessian": changed(HESSIAN, NAN, 1, 4)},
        r"hessian must be finite .* nan at \[1, 4\]",
    ),
    "inf-hessian": (
        {"hessian": changed(HESSIAN, INF, 3, 3)},
        r"hessian must be finite .* inf at \[3, 3\]",
    ),
    "span": (
        {"weight": torch.tensor([[3e38, -3e38, 0, 0, 0, 0]])},
        "weight spans more than float32 can hold",
    ),
    "span-float16": (
        {"weight": WEIGHT * 1e9, "spec": QuantSpec(2, scale_dtype="float16")},
        r"scales reach .* beyond float16; choose another scale_dtype",
    ),
    "negative-diagonal": (
        {"hessian": changed(HESSIAN, -2.0, 2, 2)},
        r"negative diagonal \(-2\.0\)",
    ),
    "skew": (
        {"hessian": changed(HESSIAN, 0.5, 2, 4)},
        r"must be symmetric, but H - H\^T reaches 0\.5",
    ),
    "order": ({"order": "random"}, r"order must be one of \('sensitivity', .* got 'random'"),
    "order-none": ({"order": None}, r"order must be one of .* got None"),
    "backend": ({"backend": "cuda"}, r"backend must be one of \('auto', .* got 'cuda'"),
    "backend-unused": ({"backend": "cuda", "order": "nearest", **GRID}, "backend must be one of"),
    "block-0": ({"block": 0}, r"block must be an integer of at least 1, got 0"),
    "block--1": ({"block": -1}, r"block must be .* got -1"),
    "block-float": ({"block": 16.0}, r"block must be .* got 16\.0"),
    "block-bool": ({"block": True}, r"block must be .* got True"),
    "starts-0": ({"starts": 0}, r"starts must be an integer of at least 1, or 'obq', got 0"),
    "starts-bool": ({"starts": True}, r"starts must be .* got True"),
    "starts-text": ({"starts": "best"}, r"starts must be .* got 'best'"),
    "starts-obq-sparsity": (
        {"starts": "obq", "spec": QuantSpec(4, sparsity=0.5)},
        "starts 'obq' does not prune",
    ),
    "sweeps-negative": ({"sweeps": -1}, r"sweeps must be an integer of at least 0, got -1"),
    "sweeps-float": ({"sweeps": 2.0}, r"sweeps must be .* got 2\.0"),
    "sweeps-bool": ({"sweeps": True}, r"sweeps must be .* got True"),
    "damp-negative": ({"damp": -0.01}, r"damp must be a finite number, not negative, got -0\.01"),
    "damp-nan": ({"damp": NAN}, r"damp must be .* got nan"),
    "damp-inf": ({"damp": INF}, r"damp must be .* got inf"),
    "damp-bool": ({"damp": True}, r"damp must be .* got True"),
    "damp-text": ({"damp": "0.01"}, r"damp must be .* got '0\.01'"),
    "group": (
        {"spec": QuantSpec(4, 4)},
        r"group_size 4 does not divide 6 columns; legal are -1 and \[1, 2, 3, 6\]",
    ),
    "sparsity-groups": (
        {"spec": QuantSpec(4, sparsity="2:4")},
        r"sparsity '2:4' needs a multiple of 4 columns, got 6",
    ),
    "sparsity-window": (
        {"spec": QuantSpec(4, sparsity="1:2"), "window": 2},
        r"sparsity '1:2' needs a multiple of 4 columns, 2 for each channel, got 6",
    ),
    "sparsity-obq": (
        {"spec": QuantSpec(4, sparsity=0.5), "order": "obq"},
        "order 'obq' does not prune, as the sparsity of the spec asks for: choose another one",
    ),
    "window": ({"window": 4}, r"window must be a divisor of 6 columns, got 4"),
    "window-0": ({"window": 0}, r"window must be .* got 0"),
    "window-float": ({"window": 2.0}, r"window must be .* got 2\.0"),
    "window-bool": ({"window": True}, r"window must be .* got True"),
    "zero-alone": (
        {"zero_point": ZERO_POINT, "spec": GROUPED},
        "zero_point was given without a scale",
    ),
    "scale-alone": (
        {"scale": SCALE, "spec": GROUPED},
        "asymmetric spec with an external scale needs",
    ),
    "scale-rows": (
        {**GRID, "scale": SCALE[:3]},
        r"scale must be \[\.\.\., 2\] for each of 4 rows, got \[3, 2\]",
    ),
    "scale-transposed": ({**GRID, "scale": SCALE.T}, r"scale must be .* got \[2, 4\]"),
    "scale-scalar": ({**GRID, "scale": SCALE[0, 0]}, r"scale must be .* got \[\]"),
    "scale-scalar-of-one": (
        {
            "weight": WEIGHT[:1, :3],
            "hessian": HESSIAN[:3, :3],
            **GRID,
            "scale": SCALE[0, 0],
            "zero_point": ZERO_POINT[0, 0],
        },
        r"scale must be \[\.\.\., 1\] for each of 1 rows, got \[\]",
    ),
    "zero-shape": (
        {**GRID, "zero_point": ZERO_POINT[:, :1]},
        r"zero_point must be .* got \[4, 1\]",
    ),
    "scale-device": ({**GRID, "scale": SCALE.to("meta")}, "scale is on meta, weight on cpu"),
    "zero-device": (
        {**GRID, "zero_point": ZERO_POINT.to("meta")},
        "zero_point is on meta, weight on cpu",
    ),
    "scale-0": (
        {**GRID, "scale": changed(SCALE, 0.0, 1, 1)},
        r"scale must be positive and finite, got 0\.0",
    ),
    "scale-negative": ({**GRID, "scale": -SCALE}, r"scale must be positive and finite, got -0\.1"),
    "scale-inf": ({**GRID, "scale": changed(SCALE, INF, 2, 0)}, r"scale must be .* got inf"),
    "scale-nan": ({**GRID, "scale": changed(SCALE, NAN, 2, 0)}, r"scale must be .* got nan"),
    "scale-underflow": ({**GRID, "scale": SCALE.double() * 1e-60}, r"scale must be .* got 0\.0"),
    "scale-symmetric": ({"scale": -SCALE, "spec": SYMMETRIC}, r"scale must be positive"),
    "zero-fraction": (
        {**GRID, "zero_point": changed(ZERO_POINT, 1.5, 0, 1)},
        r"zero_point must hold integers from 0 to 15, got 1\.5",
    ),
    "zero-negative": (
        {**GRID, "zero_point": changed(ZERO_POINT, -1, 0, 1)},
        r"zero_point must .* got -1\.0",
    ),
    "zero-beyond": (
        {**GRID, "zero_point": changed(ZERO_POINT, 16, 3, 0)},
        r"zero_point must .* got 16\.0",
    ),
    "zero-nan": (
        {**GRID, "zero_point": changed(ZERO_POINT, NAN, 3, 0)},
        r"zero_point must .* got nan",
    ),
}


@pytest.mark.parametrize("changes, message", SOLVE.values(), ids=SOLVE)
def test_solve_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(**{"weight": WEIGHT, "hessian": HESSIAN, "spec": QuantSpec(), **changes})


def test_the_call_that_the_cases_change_is_good() -> None:
    solve(WEIGHT, HESSIAN, QuantSpec())
    solve(WEIGHT, HESSIAN, **GRID)
    solve(WEIGHT, HESSIAN, SYMMETRIC, scale=SCALE)
    solve(WEIGHT, changed(HESSIAN, 5e-4, 2, 4), QuantSpec())  # symmetric up to rounding
    solve(WEIGHT, HESSIAN, QuantSpec(), damp=0, block=1)


# --- operations -----------------------------------------------------------------------------------

TILE, GROUP = torch.ones(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
S = Z = torch.ones(2, 3, 1)
A = torch.eye(4).expand(2, 4, 4)
ROWS, ROW_GROUP, ROW_GRID = torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 1)
ROW_A = torch.eye(4).expand(3, 4, 4)
IMAGES = torch.ones(2, 4, 1, 5, 5)
META = torch.device("meta")

OPS: dict[str, tuple[Callable[[], object], str]] = {  # call, message
    "quantize_groups-dimensions": (
        lambda: ops.quantize_groups(TILE[0], 2, 15, True, (1.0,)),
        r"weight must have 3 dimensions and no empty one, got \[3, 4\]",
    ),
    "quantize_groups-empty": (
        lambda: ops.quantize_groups(TILE[:, :0], 2, 15, True, (1.0,)),
        r"weight must have 3 dimensions and no empty one, got \[2, 0, 4\]",
    ),
    "quantize_groups-dtype": (
        lambda: ops.quantize_groups(TILE.int(), 2, 15, True, (1.0,)),
        r"weight must be floating point, got torch\.int32",
    ),
    "quantize_groups-group": (
        lambda: ops.quantize_groups(TILE, 3, 15, True, (1.0,)),
        "group_size 3 does not divide 4 columns",
    ),
    "quantize_groups-no-group": (
        lambda: ops.quantize_groups(TILE, 0, 15, True, (1.0,)),
        "group_size 0 does not divide 4 columns",
    ),
    "column_sensitivity-scale": (
        lambda: ops.column_sensitivity(TILE, S[:, :2], Z, GROUP, TILE[:, 0], 15),
        r"scale must be \[2, 3, 1\], got \[2, 2, 1\]",
    ),
    "column_sensitivity-scalar": (
        lambda: ops.column_sensitivity(TILE, S[0, 0, 0], Z, GROUP, TILE[:, 0], 15),
        r"scale must be \[2, 3\], got \[\]",
    ),
    "column_sensitivity-zero_point": (
        lambda: ops.column_sensitivity(TILE, S, Z.expand(2, 3, 2), GROUP, TILE[:, 0], 15),
        r"zero_point must be \[2, 3, 1\], got \[2, 3, 2\]",
    ),
    "column_sensitivity-group": (
        lambda: ops.column_sensitivity(TILE, S, Z, GROUP[0], TILE[:, 0], 15),
        r"group must be \[2, 4\], got \[4\]",
    ),
    "column_sensitivity-diagonal": (
        lambda: ops.column_sensitivity(TILE, S, Z, GROUP, TILE[0], 15),
        r"diagonal must be \[2, 4\], got \[3, 4\]",
    ),
    "column_sensitivity-device": (
        lambda: ops.column_sensitivity(TILE, S, Z, GROUP, TILE[:, 0].to(META), 15),
        "diagonal is on meta, its companion on cpu",
    ),
    "solve_columns-running": (
        lambda: ops.solve_columns(TILE, TILE[:1], A, S, Z, GROUP, 15),
        r"running must be \[2, 3, 4\], got \[1, 3, 4\]",
    ),
    "solve_columns-feedback": (
        lambda: ops.solve_columns(TILE, TILE, A[:, :3], S, Z, GROUP, 15),
        r"feedback must be \[2, 4, 4\], got \[2, 3, 4\]",
    ),
    "solve_columns-pruned": (
        lambda: ops.solve_columns(TILE, TILE, A, S, Z, GROUP, 15, pruned=TILE[:, :2] > 0),
        r"pruned must be \[2, 3, 4\], got \[2, 2, 4\]",
    ),
    "solve_columns-pruned-dtype": (
        lambda: ops.solve_columns(TILE, TILE, A, S, Z, GROUP, 15, pruned=TILE),
        r"pruned must be bool, got torch\.float32",
    ),
    "solve_columns-device": (
        lambda: ops.solve_columns(TILE, TILE, A, S, Z.to(META), GROUP, 15),
        "zero_point is on meta, its companion on cpu",
    ),
    "solve_columns-precision": (
        lambda: ops.solve_columns(
            TILE, TILE, A, S, Z, GROUP, 15, precision="fp8", backend="triton"
        ),
        r"precision must be one of \('ieee', 'tf32x3', 'tf32'\), got 'fp8'",
    ),
    "compensate-error": (
        lambda: ops.compensate(TILE, torch.ones(2, 3, 5), torch.ones(2, 6, 4), S, Z, GROUP, 15),
        r"error must be \[2, 3, 6\], got \[2, 3, 5\]",
    ),
    "compensate-rows": (
        lambda: ops.compensate(TILE, torch.ones(2, 3, 5), torch.ones(2, 5, 7), S, Z, GROUP, 15),
        r"rows must be \[2, 5, 4\], got \[2, 5, 7\]",
    ),
    "compensate-flat-rows": (
        lambda: ops.compensate(TILE, torch.ones(2, 3, 5), torch.ones(5, 4), S, Z, GROUP, 15),
        r"error must be \[2, 3, 0\], got \[2, 3, 5\]",
    ),
    "downdate-inverse": (
        lambda: ops.downdate(torch.ones(2, 4, 3), torch.ones(2, 5, 4)),
        r"inverse must be \[B, F, F\], got \[2, 4, 3\]",
    ),
    "downdate-flat-inverse": (
        lambda: ops.downdate(torch.eye(4), torch.ones(5, 4)),
        r"inverse must be \[B, F, F\], got \[4, 4\]",
    ),
    "downdate-rows": (
        lambda: ops.downdate(torch.ones(2, 4, 4), torch.ones(2, 5, 3)),
        r"rows must be \[2, 5, 4\], got \[2, 5, 3\]",
    ),
    "accumulate_hessian-rows": (
        lambda: ops.accumulate_hessian(torch.zeros(1, 4, 4), torch.ones(7, 3, 4)),
        r"inputs must be \[N, C\], or \[N, channels, D, H, W\] with a window",
    ),
    "accumulate_hessian-images": (
        lambda: ops.accumulate_hessian(torch.zeros(1, 4, 4), torch.ones(7, 4), Window()),
        r"inputs must be .* got \[7, 4\]",
    ),
    "accumulate_hessian-groups": (
        lambda: ops.accumulate_hessian(torch.zeros(3, 4, 4), IMAGES, Window(groups=3)),
        "groups 3 does not divide 4 channels",
    ),
    "accumulate_hessian-total": (
        lambda: ops.accumulate_hessian(torch.zeros(2, 4, 4), IMAGES, Window((1, 3, 3), groups=2)),
        r"total must be \[2, 18, 18\], got \[2, 4, 4\]",
    ),
    "accumulate_hessian-device": (
        lambda: ops.accumulate_hessian(torch.zeros(1, 4, 4, device=META), torch.ones(7, 4)),
        "total is on meta, its companion on cpu",
    ),
    "accumulate_hessian-window": (
        lambda: ops.accumulate_hessian(
            torch.zeros(1, 36, 36), IMAGES, Window((1, 3, 3), dilation=(1, 3, 3))
        ),
        r"a window of \(1, 3, 3\) with dilation \(1, 3, 3\) does not fit into .* \[1, 5, 5\]",
    ),
    "solve_rows-weight": (
        lambda: ops.solve_rows(TILE, ROW_A, ROW_GRID, ROW_GRID, ROW_GROUP, 15, 1),
        r"weight must have 2 dimensions and no empty one, got \[2, 3, 4\]",
    ),
    "solve_rows-inverse": (
        lambda: ops.solve_rows(ROWS, A, ROW_GRID, ROW_GRID, ROW_GROUP, 15, 1),
        r"inverse must be \[3, 4, 4\], got \[2, 4, 4\]",
    ),
    "solve_rows-group": (
        lambda: ops.solve_rows(ROWS, ROW_A, ROW_GRID, ROW_GRID, GROUP, 15, 1),
        r"group must be \[3, 4\], got \[2, 4\]",
    ),
    "solve_rows-no-steps": (
        lambda: ops.solve_rows(ROWS, ROW_A, ROW_GRID, ROW_GRID, ROW_GROUP, 15, 0),
        r"steps must be 1 to 4 \(the columns left\), got 0",
    ),
    "solve_rows-steps": (
        lambda: ops.solve_rows(ROWS, ROW_A, ROW_GRID, ROW_GRID, ROW_GROUP, 15, 5),
        r"steps must be 1 to 4 \(the columns left\), got 5",
    ),
    "HessianSum-dtype": (
        lambda: HessianSum(1, 4, dtype=torch.float16),
        r"a Hessian is summed in float32 or float64, got torch\.float16",
    ),
}


@pytest.mark.parametrize("call, message", OPS.values(), ids=OPS)
def test_operation_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- backends -------------------------------------------------------------------------------------


def test_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with pytest.raises(ValueError, match='backend "triton" needs the triton package'):
        solve(WEIGHT, HESSIAN, QuantSpec(), backend="triton")
    assert not ops.uses_triton(WEIGHT, "auto")


def test_auto_is_the_reference_on_a_cpu() -> None:
    assert not ops.uses_triton(WEIGHT, "auto")
    assert not ops.uses_triton(WEIGHT, "reference")


def test_triton_on_a_cpu_without_the_interpreter() -> None:
    """In a fresh process, since Triton reads the variable when it is imported."""
    code = """
import torch
from sapq_triton import QuantSpec, solve
try:
    solve(torch.ones(2, 4), torch.eye(4), QuantSpec(), backend="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'backend "triton" cannot run on a cpu tensor' in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def test_what_is_finite() -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([
        [0.0, 1.0], [largest, -largest], [torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, 1.0],
        [torch.inf, -torch.inf], [torch.inf, torch.inf], [-torch.inf, torch.nan],
    ])  # fmt: skip
    assert _finite(rows[:, :, None]).tolist() == [True, True] + 6 * [False]
