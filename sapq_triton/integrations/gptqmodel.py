"""GPTQModel: its class `GPTQ`, whose `quantize` the whole package calls.

`bits`, `sym` and `group_size` are obeyed. Scales are found on the original weight, by our search
for the least squared error where its own quantizer would span the full range (`mse=0`, its
default); with `mse` set, or `scale_search="absmax"`, its quantizer finds them. Groups lie in
original column order whatever `desc_act`, `act_group_aware` and `static_groups` say:
`g_idx[i] = i // group_size`, which each of these settings allows in a file. Scales are rounded to
float16 first, as they are stored, so that packing changes no weight.
`damp_percent` is obeyed. The loss is half the layer error, per sample, without damping.

Its own code keeps what it alone knows: embeddings, `fallback` for modules that saw too few samples,
`mock_quantization`, and columns padded for tensor parallelism. GPTAQ, FOEM and QQQ have solvers of
their own, and keep them.
"""

import time
from dataclasses import dataclass
from functools import wraps
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import ops
from ..dropin.problem import FindGrid, bits_of, find_grids, solve_on_grid
from ..spec import MSE_SHRINK, ScaleSearch
from . import patching
from .patching import Swap, check_signature

DISTRIBUTION = "gptqmodel"
KNOWN_VERSIONS = ("7.6",)


@dataclass(frozen=True)
class Options(patching.Options):
    """As all packages', and scale_search: see the module."""

    scale_search: ScaleSearch = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_search not in get_args(ScaleSearch):
            raise ValueError(
                f"scale_search must be one of {get_args(ScaleSearch)}, got {self.scale_search!r}"
            )


def swaps(options: Options) -> list[Swap]:
    from gptqmodel.quantization.gptq import GPTQ

    return [swap_of(GPTQ, options)]


def swap_of(kind: Any, options: Options) -> Swap:
    """The swap of a class that has GPTQModel's methods."""
    from gptqmodel.utils.fallback import should_use_fallback

    theirs = vars(kind)["quantize"]
    check_signature(theirs, ("self", "blocksize"), KNOWN_VERSIONS)

    def belongs_to_them(task: Any) -> bool:
        return (
            isinstance(task.module, nn.Embedding)
            or should_use_fallback(task.fallback, float(task.nsamples), task.expected_nsamples)
            or task.nsamples == 0
            or task.qcfg.mock_quantization
            or task._tp_pad_cols > 0
            or task.quantizer.requires_groupwise_processing()
        )

    @wraps(theirs)
    @torch.inference_mode()
    def quantize(self: Any, blocksize: int = 128) -> tuple[Any, ...]:
        if belongs_to_them(self):
            return theirs(self, blocksize)
        started = time.perf_counter()
        hessian = self.finalize_hessian(target_device=getattr(self.module, "target_device", None))
        self._release_deferred_hessian_sources()
        return _quantize(self, hessian, options, started)

    return Swap(kind, "quantize", quantize)


def _finder(task: Any, options: Options) -> FindGrid:
    """What makes a grid of columns."""
    qmax = 2 ** bits_of(task.quantizer.maxq) - 1

    def theirs(columns: Tensor) -> tuple[Tensor, Tensor]:
        task.quantizer.find_params(columns, weight=True)
        return task.quantizer.scale, task.quantizer.zero

    def ours(columns: Tensor) -> tuple[Tensor, Tensor]:
        _, scale, zero = ops.quantize_groups(
            columns[None], columns.shape[1], qmax, task.qcfg.sym, MSE_SHRINK,
            backend=options.backend,
        )  # fmt: skip
        return scale[0], zero[0]

    chosen = getattr(task.qcfg, "mse", 0) or options.scale_search == "absmax"
    return theirs if chosen else ours


def _quantize(task: Any, hessian: Tensor, options: Options, started: float) -> tuple[Any, ...]:
    """What GPTQModel wants back: weight, scale, zero, g_idx, seconds, loss, damping, samples."""
    stored = task.module.weight
    weight = task.clone_module(device=hessian.device)[None]  # float32 [1, R, C], a copy
    C = weight.shape[2]
    group_size = C if task.qcfg.group_size == -1 else task.qcfg.group_size

    scale, zero = find_grids(weight, group_size, _finder(task, options))
    scale = scale.half().clamp_(min=2**-24).float()  # as it is stored, but for a zero
    solved = solve_on_grid(
        weight, hessian[None], scale, zero,
        bits=bits_of(task.quantizer.maxq),
        group_size=group_size,
        **options.for_solver(task.qcfg.damp_percent),
    )  # fmt: skip
    matrix = solved.quantized[0]
    if type(task.module).__name__ == "Conv1D":  # transformers' linear layer
        matrix = matrix.mT
    quantized = matrix.reshape(stored.shape).to(stored)
    g_idx = torch.arange(C, dtype=torch.int32, device=hessian.device) // group_size
    loss: float | str = 0.5 * solved.report.error.item() / task.nsamples
    if solved.report.fallback.item():
        loss = "rounded to nearest: no damping made the Hessian positive definite"
    damp = solved.report.damp.item()
    task.H = None  # theirs lets go of it too
    seconds = time.perf_counter() - started
    return quantized, scale[0], zero[0], g_idx, seconds, loss, damp, task.nsamples
