"""The one place that checks tensors and chooses between a Triton kernel and the reference.

Every function takes `backend`: "triton", "reference", or "auto", which is Triton on a GPU and the
reference on a CPU. "triton" on a CPU needs the interpreter (TRITON_INTERPRET=1, set before triton
is imported). All shapes as in `reference`; the kernels compute in float32.
"""

import math
import os
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from . import reference
from .codebook import Codebook
from .packing import words
from .window import Window

try:
    from .kernels import accumulate_hessian as _accumulate_hessian
    from .kernels import column_sensitivity as _column_sensitivity
    from .kernels import compensate as _compensate
    from .kernels import dequantize_packed as _dequantize_packed
    from .kernels import downdate as _downdate
    from .kernels import matmul_packed as _matmul_packed
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
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what the kernels for packed codes take
FEW_ROWS = 32  # of x in `matmul_packed`: for more of them a weight in its dtype is worth making


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
    qmax: int | Codebook,
    symmetric: bool,
    shrink: tuple[float, ...],
    importance: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on a grid per group; see `reference.quantize_groups`."""
    batch, _, columns = _check_weight(weight)
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide {columns} columns")
    if isinstance(qmax, Codebook) and not symmetric:
        raise ValueError("a codebook has no zero point: symmetric must be True, got False")
    if importance is not None:
        _check("importance", importance, (batch, columns), weight)
    implementation = _quantize_groups if uses_triton(weight, backend) else reference
    return implementation.quantize_groups(weight, group_size, qmax, symmetric, shrink, importance)


def column_sensitivity(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    diagonal: Tensor,
    qmax: int | Codebook,
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
    qmax: int | Codebook,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
    pruned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize columns with error feedback; see `reference.solve_columns`."""
    B, R, C = _check_weight(weight)
    _check("running", running, (B, R, C), weight)
    _check("feedback", feedback, (B, C, C), weight)
    _check_grid(weight, scale, zero_point, group)
    if pruned is not None:
        _check("pruned", pruned, (B, R, C), weight)
        if pruned.dtype != torch.bool:
            raise ValueError(f"pruned must be bool, got {pruned.dtype}")
    arguments = (weight, running, feedback, scale, zero_point, group, qmax)
    if uses_triton(weight, backend):
        return _solve_columns.solve_columns(*arguments, dot_precision(precision), pruned)
    return reference.solve_columns(*arguments, pruned)


def compensate(
    weight: Tensor,
    error: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
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
    qmax: int | Codebook,
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


def _check_packed(
    qweight: Tensor, scale: Tensor, qzeros: Tensor | None, bits: int, columns: int
) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if scale.ndim != 2 or 0 in (columns, scale.shape[1]) or columns % scale.shape[1]:
        raise ValueError(
            f"scale must be [R, G] where G divides {columns} columns, got {list(scale.shape)}"
        )
    if not scale.is_floating_point():
        raise ValueError(f"scale must be floating point, got {scale.dtype}")
    R, G = scale.shape
    for name, tensor, count in (("qweight", qweight, columns), ("qzeros", qzeros, G)):
        if tensor is not None:
            _check(name, tensor, (R, words(count, bits)), scale)
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {tensor.dtype}")


# As operators of PyTorch the kernels are one node each for torch.compile and torch.export.


@torch.library.custom_op("sapq_triton::dequantize_packed", mutates_args=())
def dequantize_packed(
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """The weight that packed codes stand for; see `reference.dequantize_packed`."""
    _check_packed(qweight, scale, qzeros, bits, columns)
    if dtype not in (*FLOATS, torch.float64):
        raise ValueError(f"dtype must be one of {(*FLOATS, torch.float64)}, got {dtype}")
    use = uses_triton(qweight, cast(Backend, backend)) and scale.shape[0]
    implementation = _dequantize_packed if use else reference
    return implementation.dequantize_packed(qweight, scale, qzeros, bits, columns, dtype)


@dequantize_packed.register_fake
def _(
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    return scale.new_empty(scale.shape[0], columns, dtype=dtype)


@torch.library.custom_op("sapq_triton::matmul_packed", mutates_args=())
def matmul_packed(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    """Product with a weight of packed codes; see `reference.matmul_packed`.

    More than FEW_ROWS rows are multiplied by PyTorch, with a weight that is made for the call and
    has the dtype of x. Gradients reach x alone.
    """
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"x must be [M, K] of float16, bfloat16 or float32, got {list(x.shape)} of {x.dtype}"
        )
    _check_packed(qweight, scale, qzeros, bits, x.shape[1])
    _check("x", x, tuple(x.shape), scale)
    mode = dot_precision(cast(Precision, precision))
    if not uses_triton(x, cast(Backend, backend)) or 0 in (len(x), len(scale)):
        return reference.matmul_packed(x, qweight, scale, qzeros, bits)
    if len(x) <= FEW_ROWS:
        return _matmul_packed.matmul_packed(x, qweight, scale, qzeros, bits, mode)
    columns = x.shape[1]
    weight = _dequantize_packed.dequantize_packed(qweight, scale, qzeros, bits, columns, x.dtype)
    return x @ weight.T


@matmul_packed.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    qzeros: Tensor | None,
    bits: int,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, qzeros, bits, _, backend = inputs
    ctx.save_for_backward(qweight, scale, qzeros)
    ctx.options = bits, x.shape[1], x.dtype, backend


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ dequantize_packed(*ctx.saved_tensors, *ctx.options), *[None] * 6


matmul_packed.register_autograd(_input_gradient, setup_context=_keep_codes)
