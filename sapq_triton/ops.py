"""The one place that checks tensors and chooses between a Triton kernel and the reference.

Every function takes `backend`: "triton", "reference", or "auto", which is Triton on a GPU and the
reference on a CPU. "triton" on a CPU needs the interpreter (TRITON_INTERPRET=1, set before triton
is imported). All shapes as in `reference`; the kernels compute in float32.
"""

import math
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import reference
from .window import Window

try:
    from .kernels import accumulate_hessian as _accumulate_hessian
    from .kernels import column_sensitivity as _column_sensitivity
    from .kernels import compensate as _compensate
    from .kernels import downdate as _downdate
    from .kernels import quantize_groups as _quantize_groups
    from .kernels import solve_columns as _solve_columns
    from .kernels import solve_rows as _solve_rows
except ModuleNotFoundError as missing:  # triton has no build for this platform
    if missing.name != "triton":
        raise
    HAS_TRITON = False
else:
    HAS_TRITON = True

Backend = Literal["auto", "triton", "reference"]
Precision = Literal["ieee", "tf32x3", "tf32"]  # of the kernels' products of float32


def uses_triton(tensor: Tensor, backend: Backend) -> bool:
    """Whether `backend` means Triton for this tensor; ValueError where it cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    on_gpu = tensor.device.type in ("cuda", "xpu")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend "triton" needs the triton package, which is not installed')
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend "triton" cannot run on a {tensor.device.type} tensor; move it to a GPU, '
                "or set TRITON_INTERPRET=1 before triton is imported"
            )
    return backend == "triton" or (backend == "auto" and on_gpu and HAS_TRITON)


def dot_precision(precision: Precision) -> str:
    """What a kernel's `tl.dot` takes: AMD's matrix cores multiply float32 as it is."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    return "ieee" if torch.version.hip else precision


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, its companion on {like.device}")


def _check_weight(weight: Tensor, dims: int = 3) -> tuple[int, ...]:
    if weight.ndim != dims or weight.numel() == 0:
        raise ValueError(
            f"weight must have {dims} dimensions and no empty one, got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}")
    return tuple(weight.shape)


def _check_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor) -> None:
    """weight [B, R, F] goes with group [B, F], a weight of rows [N, F] with group [N, F]."""
    _check("scale", scale, (*weight.shape[:-1], *scale.shape[-1:]), weight)
    _check("zero_point", zero_point, tuple(scale.shape), weight)
    _check("group", group, (weight.shape[0], weight.shape[-1]), weight)


def quantize_groups(
    weight: Tensor,
    group_size: int,
    qmax: int,
    symmetric: bool,
    shrink: tuple[float, ...],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on a grid per group; see `reference.quantize_groups`."""
    columns = _check_weight(weight)[2]
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide {columns} columns")
    implementation = _quantize_groups if uses_triton(weight, backend) else reference
    return implementation.quantize_groups(weight, group_size, qmax, symmetric, shrink)


def column_sensitivity(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    diagonal: Tensor,
    qmax: int,
    backend: Backend = "auto",
) -> Tensor:
    """Cost of rounding each column now; see `reference.column_sensitivity`."""
    B, _, F = _check_weight(weight)
    _check_grid(weight, scale, zero_point, group)
    _check("diagonal", diagonal, (B, F), weight)
    implementation = _column_sensitivity if uses_triton(weight, backend) else reference
    return implementation.column_sensitivity(weight, scale, zero_point, group, diagonal, qmax)


def solve_columns(
    weight: Tensor,
    running: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize columns with error feedback; see `reference.solve_columns`."""
    B, R, C = _check_weight(weight)
    _check("running", running, (B, R, C), weight)
    _check("feedback", feedback, (B, C, C), weight)
    _check_grid(weight, scale, zero_point, group)
    arguments = (weight, running, feedback, scale, zero_point, group, qmax)
    if uses_triton(weight, backend):
        return _solve_columns.solve_columns(*arguments, dot_precision(precision))
    return reference.solve_columns(*arguments)


def compensate(
    weight: Tensor,
    error: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
) -> Tensor:
    """W_F -= E V, in place, and what rounding then costs; see `reference.compensate`."""
    B, R, F = _check_weight(weight)
    T = rows.shape[1] if rows.ndim == 3 else 0
    _check("error", error, (B, R, T), weight)
    _check("rows", rows, (B, T, F), weight)
    _check_grid(weight, scale, zero_point, group)
    arguments = (weight, error, rows, scale, zero_point, group, qmax)
    if uses_triton(weight, backend):
        return _compensate.compensate(*arguments, dot_precision(precision))
    return reference.compensate(*arguments)


def downdate(
    inverse: Tensor, rows: Tensor, precision: Precision = "tf32x3", backend: Backend = "auto"
) -> None:
    """A_FF -= V^T V, in place; see `reference.downdate`."""
    if inverse.ndim != 3 or inverse.shape[1] != inverse.shape[2]:
        raise ValueError(f"inverse must be [B, F, F], got {list(inverse.shape)}")
    B, _, F = inverse.shape
    _check("rows", rows, (B, rows.shape[1] if rows.ndim == 3 else 0, F), inverse)
    if uses_triton(inverse, backend):
        _downdate.downdate(inverse, rows, dot_precision(precision))
    else:
        reference.downdate(inverse, rows)


def accumulate_hessian(
    total: Tensor,
    inputs: Tensor,
    window: Window | None = None,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
) -> int:
    """total += X^T X, in place, lower triangle; returns the number of rows of X.

    inputs: rows [N, C], or with a window images [N, channels, D, H, W] that are padded already.
    """
    if window is None:
        window = Window()
        inputs = inputs.reshape(*inputs.shape, 1, 1, 1)
    if inputs.ndim != 5:
        raise ValueError(
            f"inputs must be [N, C], or [N, channels, D, H, W] with a window, "
            f"got {list(inputs.shape)}"
        )
    if inputs.shape[1] % window.groups:
        raise ValueError(f"groups {window.groups} does not divide {inputs.shape[1]} channels")
    columns = inputs.shape[1] // window.groups * math.prod(window.size)
    _check("total", total, (window.groups, columns, columns), inputs)
    positions = window.positions(inputs.shape[2:])
    if min(positions) < 1:
        raise ValueError(
            f"a window of {window.size} with dilation {window.dilation} does not fit into inputs "
            f"of {list(inputs.shape[2:])}"
        )
    if len(inputs):
        if uses_triton(inputs, backend):
            _accumulate_hessian.accumulate_hessian(total, inputs, window, dot_precision(precision))
        else:
            reference.accumulate_hessian(total, inputs, window)
    return len(inputs) * math.prod(positions)


def solve_rows(
    weight: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int,
    steps: int,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy steps of exact OBQ, `weight` in place; see `reference.solve_rows`."""
    N, F = _check_weight(weight, dims=2)
    _check("inverse", inverse, (N, F, F), weight)
    _check_grid(weight, scale, zero_point, group)
    if not 1 <= steps <= F:
        raise ValueError(f"steps must be 1 to {F} (the columns left), got {steps}")
    implementation = _solve_rows if uses_triton(weight, backend) else reference
    return implementation.solve_rows(weight, inverse, scale, zero_point, group, qmax, steps)
