"""torchao's prototype of GPTQ: `gptq_quantize`, which its handler of GPTQConfig calls.

`Int8WeightOnlyConfig`, a grid per row, is ours, also on a CPU, where its own code does not run.
`percdamp` is obeyed. Its own code keeps int4, whose zero points are no integers, and NVFP4.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..dropin.problem import solve_on_grid
from .patching import Options, Swap, check_signature

DISTRIBUTION = "torchao"
KNOWN_VERSIONS = ("0.18",)

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "swaps"]


def swaps(options: Options) -> list[Swap]:
    from torchao.prototype.gptq import api
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_api import Int8WeightOnlyConfig

    theirs = api.gptq_quantize
    check_signature(theirs, ("H", "W_t", "config"), KNOWN_VERSIONS)

    @wraps(theirs)
    def gptq_quantize(H: Tensor, W_t: Tensor, config: Any) -> Any:
        base = config.base_config
        if not isinstance(base, Int8WeightOnlyConfig) or not isinstance(base.granularity, PerRow):
            return theirs(H, W_t, config)
        weight = W_t.detach()
        scale = Int8Tensor.from_hp(weight, base.granularity).scale
        solved = solve_on_grid(
            weight.float()[None], H[None], scale.float()[None],
            torch.full_like(scale, 128, dtype=torch.float32)[None],
            bits=8, group_size=weight.shape[1], **options.for_solver(config.percdamp),
        )  # fmt: skip
        quantized = solved.quantized[0].to(weight.dtype)
        return Int8Tensor.from_hp(quantized, base.granularity, scale=scale)

    return [Swap(api, "gptq_quantize", gptq_quantize)]
