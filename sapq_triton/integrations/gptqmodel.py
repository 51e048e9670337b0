"""GPTQModel: its class `GPTQ`, whose `quantize` the whole package calls.

Its quantizer finds the grids, on the original weight, so `bits`, `sym`, `mse` and `group_size` are
obeyed. Groups lie in original column order whatever `desc_act`, `act_group_aware` and
`static_groups` say: `g_idx[i] = i // group_size`, which each of these settings allows in a file.
Scales are rounded to float16 first, as they are stored, so that packing changes no weight.
`damp_percent` is obeyed. The loss is half the layer error, per sample, without damping.

Its own code keeps what it alone knows: embeddings, `fallback` for modules that saw too few samples,
`mock_quantization`, and columns padded for tensor parallelism. GPTAQ, FOEM and QQQ have solvers of
their own, and keep them.
"""

import time
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..dropin.problem import bits_of, find_grids, solve_on_grid
from .patching import Options, Swap, check_signature

DISTRIBUTION = "gptqmodel"
KNOWN_VERSIONS = ("7.6",)

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "swaps"]


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


def _quantize(
    task: Any, hessian: torch.Tensor, options: Options, started: float
) -> tuple[Any, ...]:
    """What GPTQModel wants back: weight, scale, zero, g_idx, seconds, loss, damping, samples."""
    stored = task.module.weight
    weight = task.clone_module(device=hessian.device)[None]  # float32 [1, R, C], a copy
    C = weight.shape[2]
    group_size = C if task.qcfg.group_size == -1 else task.qcfg.group_size

    def find(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        task.quantizer.find_params(columns, weight=True)
        return task.quantizer.scale, task.quantizer.zero

    scale, zero = find_grids(weight, group_size, find)
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
