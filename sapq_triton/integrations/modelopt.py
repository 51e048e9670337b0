"""NVIDIA ModelOpt: `update_weights` of its GPTQHelper.

The weight quantizer of the module tells its grid by what it makes of very large weights, per
channel or per block of `block_sizes`; `perc_damp` is obeyed. Where rounding to that grid is not
what the quantizer does (floating point formats, dynamic scales) its own code keeps the layer.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..dropin.problem import solve_on_grid
from .patching import Options, Swap, check_signature

DISTRIBUTION = "nvidia-modelopt"
KNOWN_VERSIONS = ("0.47",)
LARGE = 2.0**40

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "swaps"]


def swaps(options: Options) -> list[Swap]:
    from modelopt.torch.quantization.utils.calib_utils import GPTQHelper

    theirs = GPTQHelper.update_weights
    check_signature(theirs, ("self", "block_size", "perc_damp"), KNOWN_VERSIONS)

    @wraps(theirs)
    def update_weights(self: Any, block_size: int, perc_damp: float) -> None:
        weight = self.module.weight
        quantizer, bits = self.module.weight_quantizer, self.module.weight_quantizer.num_bits
        grid = _grid(quantizer, weight, bits) if isinstance(bits, int) and bits <= 8 else None
        if grid is None or self.n_samples == 0:
            return theirs(self, block_size, perc_damp)
        hessian = self.hessian.to(weight.device)
        scale, zero, group_size = grid
        solved = solve_on_grid(
            weight.data.float()[None], hessian[None], scale[None], zero[None],
            bits=bits, group_size=group_size, **options.for_solver(perc_damp),
        )  # fmt: skip
        self.weight = solved.quantized[0]
        self._print_mse_error(hessian)
        weight.data = self.weight.to(weight.dtype)

    return [Swap(GPTQHelper, "update_weights", update_weights)]


def _grid(quantizer: Any, weight: Tensor, bits: int) -> tuple[Tensor, Tensor, int] | None:
    """scale, zero [R, G], group size; None where the quantizer rounds to no such grid."""
    C = weight.shape[1]
    sizes = quantizer.block_sizes or {}
    group_size = sizes.get(-1) or sizes.get(1) or C
    if quantizer.amax is None or C % group_size:
        return None
    like = torch.full_like(weight.data, LARGE, dtype=torch.float32)
    high, low = quantizer(like)[:, ::group_size], quantizer(-like)[:, ::group_size]
    scale = (high - low) / (2**bits - 1)
    if not (scale > 0).all():
        return None
    zero = (-low / scale).round()
    s, z = (t.repeat_interleave(group_size, 1) for t in (scale, zero))
    w = weight.data.float()
    rounded = (((w / s).round() + z).clamp(0, 2**bits - 1) - z) * s
    # ties may be taken the other way: a whole step, in few places
    same = (quantizer(w) - rounded).abs() <= 1e-3 * s
    return (scale, zero, group_size) if same.float().mean() > 0.99 else None
