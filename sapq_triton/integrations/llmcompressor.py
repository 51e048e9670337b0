"""llm-compressor: `quantize_weight` of its GPTQModifier.

level "solver", the default, replaces the whole function, and gives SAPQ's order: observers' scales
and zero points, groups and `dampening_frac` are obeyed, integer codes are chosen anew. What its
`actorder` says is moot, as scales lie in original column order for all of its values.

level "block" goes through its official registration, `ImplBackend.register("gptq_block_update")`.
That hands out one block of columns at a time, of an order and a factor that are settled: the same
codes as before, up to ties, with our column kernel in place of its loop over columns. It cannot
give SAPQ: hence not the default. It takes `precision` and `backend` only. There is no official way
to unregister: after `unpatch` what we registered declines every call.

Its own code keeps floating point formats, and grids of strategy "tensor_group" and "block".
Releases before 0.14, which hand over a module instead of tensors, are refused.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import ops
from ..dropin.problem import solve_on_grid
from . import patching
from .patching import Swap, check_signature

DISTRIBUTION = "llmcompressor"
KNOWN_VERSIONS = ("0.14",)
PARAMETERS = (
    "weights", "hessians", "scale", "zero_point", "global_scale", "quant_args", "blocksize",
    "percdamp",
)  # fmt: skip

Level = Literal["solver", "block"]


@dataclass(frozen=True)
class Options(patching.Options):
    """As all packages', and level: see the module."""

    level: Level = "solver"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in get_args(Level):
            raise ValueError(f"level must be one of {get_args(Level)}, got {self.level!r}")
        settled = ("order", "block", "starts", "sweeps", "rounds", "damp")
        changed = [name for name in settled if getattr(self, name) != getattr(Options, name)]
        if self.level == "block" and changed:
            raise ValueError(f'level "block" leaves {settled} to llm-compressor, got {changed}')


def swaps(options: Options) -> list[Swap]:
    from llmcompressor.modifiers.gptq import base

    theirs = base.quantize_weight
    check_signature(theirs, PARAMETERS, KNOWN_VERSIONS)
    if options.level == "block":
        _register()
        return [Swap(sys.modules[__name__], "_update", _block_update(options))]

    @wraps(theirs)
    def quantize_weight(
        weights: Tensor,
        hessians: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        global_scale: Tensor | None,
        quant_args: Any,
        blocksize: int = 128,
        percdamp: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if global_scale is not None or not _is_integer_grid(quant_args):
            return theirs(
                weights=weights, hessians=hessians, scale=scale, zero_point=zero_point,
                global_scale=global_scale, quant_args=quant_args, blocksize=blocksize,
                percdamp=percdamp,
            )  # fmt: skip
        return _quantize(weights, hessians, scale, zero_point, quant_args, percdamp, options)

    return [Swap(base, "quantize_weight", quantize_weight)]


def _is_integer_grid(quant_args: Any) -> bool:
    return (
        quant_args.type == "int"
        and 2 <= quant_args.num_bits <= 8
        and quant_args.strategy in ("tensor", "channel", "group")
    )


def _quantize(
    weights: Tensor,
    hessians: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_args: Any,
    damp: float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """What llm-compressor wants back: weights [B, R, C], losses [B], rounded to nearest [B]."""
    B, R, C = weights.shape
    bits, middle = quant_args.num_bits, 2 ** (quant_args.num_bits - 1)  # its codes are signed
    group_size = quant_args.group_size if quant_args.strategy == "group" else C
    s, z = (t.to(weights.device, torch.float32) for t in (scale, zero_point))
    if quant_args.strategy == "tensor":
        s, z = (t.reshape(B, 1, 1).expand(B, R, 1) for t in (s, z))
    z = torch.full_like(s, middle) if quant_args.symmetric else z + middle
    solved = solve_on_grid(
        weights.float(), hessians, s, z,
        bits=bits, group_size=group_size, **options.for_solver(damp),
    )  # fmt: skip
    losses = 0.5 * solved.report.error.to(torch.float32)
    return solved.quantized.to(weights.dtype), losses, solved.report.fallback


# --- one block of columns -------------------------------------------------------------------------


_update: Callable[..., None] | None = None  # what our backend does; None while nothing is patched
_registered = False


def _register() -> None:
    """Once: the package knows no second registration of one name, and no way back."""
    global _registered
    from compressed_tensors.utils.impl_backend import ImplBackend

    if not _registered:
        before_its_own = -1

        @ImplBackend.register("gptq_block_update", _takes, before_its_own)
        def sapq_triton_gptq_block_update(*args: Any, **kwargs: Any) -> None:
            assert _update is not None
            _update(*args, **kwargs)

        _registered = True


def _takes(*args: Any, quant_args: Any, global_scale: Tensor | None, **kwargs: Any) -> bool:
    return _update is not None and global_scale is None and _is_integer_grid(quant_args)


def _block_update(options: Options) -> Callable[..., None]:
    def update(
        W1: Tensor,
        Hinv1: Tensor,
        Q1: Tensor,
        Err1: Tensor,
        losses1: Tensor,
        *,
        scale: Tensor,
        zero_point: Tensor | None,
        global_scale: Tensor | None,
        g_idx: Tensor | None,
        quant_args: Any,
        i1: int,
    ) -> None:
        """One block: W1, Q1, Err1, losses1 [B, R, T], Hinv1 [B, T, T], H^-1 = Hinv^T Hinv."""
        B, R, T = W1.shape
        middle = 2 ** (quant_args.num_bits - 1)
        s = scale.float().reshape(B, -1, scale.shape[-1]).expand(B, R, -1)
        signed = torch.zeros_like(s) if quant_args.symmetric or zero_point is None else zero_point
        z = signed.float().reshape(B, -1, s.shape[-1]).expand(B, R, -1) + middle
        group = torch.zeros(B, T, dtype=torch.int64, device=W1.device)
        if quant_args.strategy == "group":
            assert g_idx is not None
            group = group + g_idx[..., i1 : i1 + T].long()
        identity = torch.eye(T, device=W1.device).expand_as(Hinv1)
        root = torch.linalg.solve_triangular(Hinv1, identity, upper=True)
        feedback = root / root.diagonal(dim1=1, dim2=2)[:, None, :]
        qmax = 2**quant_args.num_bits - 1
        _, error = ops.solve_columns(
            W1, W1, feedback, s, z, group, qmax, options.precision, options.backend
        )
        Q1.copy_(W1 - error)
        Err1.copy_(error @ root)
        losses1.copy_(Err1.square())

    return update
