"""AutoRound: an algorithm named "sapq", through its official registration.

    sapq_triton.patch("auto_round")
    AutoRound(model, tokenizer, scheme="W4A16", alg_configs="sapq").quantize_and_save(...)

Each layer's grid is the one that its plain rounding finds (bits, symmetry, groups, negative scales
of its symmetric scheme included); our solver chooses the codes on it, with the Hessian of what the
layer gets behind quantized blocks. Layers whose scheme is no integer grid, or that saw no
input, keep plain rounding. There is no official way to unregister: after `unpatch`, "sapq" is a
ValueError.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..dropin.problem import solve_on_grid
from ..hessian import HessianSum
from .patching import Options, Swap, check_signature

DISTRIBUTION = "auto-round"
KNOWN_VERSIONS = ("0.15",)

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "is_patched", "swaps"]

_options: Options | None = None  # of the patch; None while there is none
_registered = False


def swaps(options: Options) -> list[Swap]:
    _register()
    return [Swap(sys.modules[__name__], "_options", options)]


def is_patched() -> bool:
    return _options is not None


def _current() -> Options:
    if _options is None:
        raise ValueError('algorithm "sapq" needs sapq_triton.patch("auto_round")')
    return _options


def _register() -> None:
    """Once: there is no way back."""
    global _registered
    if _registered:
        return
    from auto_round.algorithms.quantization.base import BaseQuantizer
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.algorithms.registry import register_algorithm, register_pipeline_member
    from auto_round.utils import check_to_quantized

    check_signature(
        BaseQuantizer._quantize_layer_via_rtn, ("self", "layer", "disable_opt_rtn"), KNOWN_VERSIONS
    )

    class SAPQConfig(SignRoundConfig):  # AutoRound makes its compressor for heirs of this one
        """No options of its own: those of `patch`."""

        def __init__(self, **kwargs: Any) -> None:
            _current()
            super().__init__(**kwargs)

    @register_pipeline_member(SAPQConfig)
    class SAPQQuantizer(BaseQuantizer):
        """Rounds each layer of a block, then has our solver choose codes on the grid it found."""

        def __init__(self, config: SAPQConfig) -> None:
            super().__init__(config)
            self.enable_quanted_input = True  # calibrate on the outputs of quantized blocks
            self._sums: dict[nn.Module, HessianSum] = {}

        def can_compile_block_forward(self) -> bool:
            return False  # hooks look at the inputs of its layers

        def register_qinput_forward_hooks(self, block: nn.Module) -> list[Any]:
            matrices = {
                module: layers.weight_matrix(module)
                for module in block.modules()
                if layers.kind(module) in ("Linear", "Conv1D") and check_to_quantized(module)
            }
            self._sums = {m: HessianSum(1, w.shape[2], w.device) for m, w in matrices.items()}

            def add(module: nn.Module, args: Any, output: object) -> None:
                total = self._sums[module]
                rows, _ = layers.input_rows(module, args[0].detach())
                total.add(rows.to(total.total.device))

            return [module.register_forward_hook(add) for module in self._sums]

        @torch.no_grad()
        def quantize_block(self, block: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
            targets = [m for m in block.modules() if hasattr(m, "global_name")]
            for module in filter(check_to_quantized, targets):
                total = self._sums.get(module)
                weight = layers.weight_matrix(module).float().clone() if total else None
                self._quantize_layer_via_rtn(module, disable_opt_rtn=True)
                if total is None or weight is None or total.rows == 0:
                    continue
                total.check(module.global_name)
                rounded = self.model.get_submodule(module.global_name)
                if getattr(rounded, "data_type", None) in ("int", "int_sym", "int_asym"):
                    _refine(rounded, weight, total.hessian(), _current())
            self._sums = {}
            return {}

    register_algorithm("sapq", config_factory=SAPQConfig, summary="codes chosen by sapq-triton")
    _registered = True


def _refine(layer: Any, weight: Tensor, hessian: Tensor, options: Options) -> None:
    """Choose codes anew on the grid of a layer that was rounded to nearest; weight [1, R, C]."""
    _, R, C = weight.shape
    bits, device = int(layer.bits), weight.device
    qmax = 2**bits - 1
    scale = layer.scale.to(device, torch.float32).expand(R, -1)
    zero = torch.as_tensor(layer.zp, device=device, dtype=torch.float32).expand(scale.shape)
    # a negative scale counts the codes from the other end
    zero = torch.where(scale < 0, qmax - zero, zero)
    solved = solve_on_grid(
        weight, hessian.to(device), scale.abs()[None], zero[None],
        bits=bits, group_size=C if layer.group_size in (-1, 0) else int(layer.group_size),
        **options.for_solver(0.01),
    )  # fmt: skip
    layers.store_weight(layer, solved.quantized)
