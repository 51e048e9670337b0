"""Intel Neural Compressor: `fasterquant` of its GPTQ.

Its quantizer finds the grids, on the original weight, so bits, symmetry, MSE search and group size
are obeyed, and so is `percdamp`. Groups lie in original column order: where `act_order` makes it
store a permutation, that is the identical one.

Its own code keeps double quantization, `fp8_aware`, and data types that are not integers.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..dropin.problem import bits_of, find_grids, solve_on_grid
from .patching import Options, Swap, check_signature

DISTRIBUTION = "neural-compressor-pt"
KNOWN_VERSIONS = ("3.10",)
PARAMETERS = (
    "self", "W", "blocksize", "percdamp", "groupsize", "act_order", "hybrid_order", "fp8_aware",
    "static_groups",
)  # fmt: skip

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "swaps"]


def swaps(options: Options) -> list[Swap]:
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

    theirs = GPTQ.fasterquant
    check_signature(theirs, PARAMETERS, KNOWN_VERSIONS)

    @wraps(theirs)
    def fasterquant(
        self: Any,
        W: Tensor,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = -1,
        act_order: bool = False,
        hybrid_order: bool = False,
        fp8_aware: bool = False,
        static_groups: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantizer = self.quantizer
        if fp8_aware or quantizer.dtype != "int" or quantizer.use_double_quant:
            return theirs(
                self, W, blocksize, percdamp, groupsize, act_order, hybrid_order, fp8_aware,
                static_groups,
            )  # fmt: skip
        transposed = type(self.layer).__name__ == "Conv1D"  # transformers' linear layer
        matrix = (W.mT if transposed else W.flatten(1)).float()
        C = matrix.shape[1]

        def find(columns: Tensor) -> tuple[Tensor, Tensor]:
            quantizer.find_params(columns, weight=True)
            return quantizer.scale, quantizer.zero

        group_size = C if groupsize == -1 else groupsize
        scale, zero = find_grids(matrix[None], group_size, find)
        solved = solve_on_grid(
            matrix[None], self.H[None], scale, zero,
            bits=bits_of(quantizer.maxq), group_size=group_size, **options.for_solver(percdamp),
        )  # fmt: skip
        del self.H
        if act_order:
            self.perm = torch.arange(C, device=matrix.device)
        quantized = solved.quantized[0].mT if transposed else solved.quantized[0]
        unused = torch.tensor([-1])  # the scale of fp8_aware
        return scale[0], unused, zero[0], quantized.reshape(W.shape).to(W.dtype)

    return [Swap(GPTQ, "fasterquant", fasterquant)]
