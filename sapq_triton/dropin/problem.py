"""A layer, the Hessian of the inputs it is shown, and a solve on grids that stand before it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layers, ops
from ..finite import check_finite
from ..result import SolveReport
from ..solver import solve
from ..spec import QuantSpec

FindGrid = Callable[[Tensor], tuple[Tensor, Tensor]]  # columns [N, n]  ->  scale, zero [N, 1]


class LayerProblem:
    """What GPTQ and TrueOBS share.

    layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, also with groups, or transformers' Conv1D.
    rows, columns: of its weight as a matrix, all groups of a convolution one after another.
    H: 2/n sum x x^T over the input rows x of the layer, n the samples seen (a sample is a sequence
    or an image, so that H is not a mean over rows); [columns, columns], or [groups, columns,
    columns] where a convolution has several. None after `free`.
    """

    def __init__(self, layer: layers.Layer, dtype: torch.dtype) -> None:
        if layers.kind(layer) is None:
            raise ValueError(
                f"layer must be Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d or transformers' "
                f"Conv1D, got {type(layer).__name__}"
            )
        if reason := layers.obstacle(layer):
            raise ValueError(f"this {type(layer).__name__} cannot be quantized: {reason}")
        groups, rows, columns = layers.weight_matrix(layer).shape
        self.layer = layer
        self.dev: torch.device = layer.weight.device
        self.rows, self.columns = groups * rows, columns
        shape = (columns, columns) if groups == 1 else (groups, columns, columns)
        self.H: Tensor | None = torch.zeros(shape, dtype=dtype, device=self.dev)
        self.nsamples = 0

    @torch.no_grad()
    def _add(self, inputs: Tensor, samples: int) -> None:
        hessian = self._hessian()
        rows, window = layers.input_rows(self.layer, inputs.to(self.dev))
        if rows.numel() == 0:
            return
        check_finite(rows, f"the input of this {type(self.layer).__name__}")
        added = torch.zeros_like(hessian)
        ops.accumulate_hessian(added, rows, window)
        check_finite(added, f"X^T X of this {type(self.layer).__name__}", ": its inputs are large")
        added += added.tril(-1).mT - added.triu(1)
        total = self.nsamples + samples
        hessian.mul_(self.nsamples / total).add_(added, alpha=2 / total)
        self.nsamples = total

    def _hessian(self) -> Tensor:
        """[groups, columns, columns], a view"""
        if self.H is None:
            raise ValueError("the Hessian is gone: free() was called")
        return self.H.view(-1, self.columns, self.columns)

    def _weight(self) -> Tensor:
        """float32 [groups, rows / groups, columns], a copy"""
        check_finite(self.layer.weight, f"the weight of this {type(self.layer).__name__}")
        return layers.weight_matrix(self.layer).to(torch.float32, copy=True)

    def _store(self, matrix: Tensor) -> None:
        check_finite(
            matrix.to(self.layer.weight.dtype),
            f"the quantized weight of this {type(self.layer).__name__}",
        )
        layers.store_weight(self.layer, matrix)

    def free(self) -> None:
        """Let the Hessian go."""
        self.H = None


def bits_of(maxq: Tensor | int) -> int:
    """Of the largest code; ValueError where codes of no width end with it."""
    largest = int(maxq)
    bits = (largest + 1).bit_length() - 1
    if not 2 <= bits <= 8 or largest != 2**bits - 1:
        raise ValueError(
            f"the quantizer's maxq must be 2**bits - 1 for 2 to 8 bits, got {largest}"
            + {-1: ": trits are no affine grid", 0: ": call its configure()"}.get(largest, "")
        )
    return bits


def find_grids(weight: Tensor, group_size: int, find: FindGrid) -> tuple[Tensor, Tensor]:
    """A grid for each group of columns: [B, R, C]  ->  scale, zero [B, R, ceil(C / group_size)]"""
    B, R, C = weight.shape
    scale, zero = weight.new_empty(2, B, R, -(-C // group_size))
    for number, columns in enumerate(weight.split(group_size, 2)):
        s, z = find(columns.flatten(0, 1))
        scale[:, :, number], zero[:, :, number] = s.view(B, R), z.view(B, R)
    return scale, zero


@dataclass(frozen=True)
class OnGrid:
    """quantized float32 [B, R, C], codes uint8 [B, R, C]."""

    quantized: Tensor
    codes: Tensor
    report: SolveReport


def solve_on_grid(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    bits: int,
    group_size: int,
    **options: Any,
) -> OnGrid:
    """`solve` on given grids, whose last group may be shorter than the others; options: its others.

    weight [B, R, C], hessian [C, C] or [B, C, C], scale, zero [B, R, ceil(C / group_size)]. A short
    group is filled with columns of weight 0 and input 0, which couple to nothing.
    """
    C = weight.shape[2]
    missing = -C % group_size
    if missing:
        weight, hessian = F.pad(weight, (0, missing)), F.pad(hessian, (0, missing, 0, missing))
    result = solve(
        weight, hessian, QuantSpec(bits, group_size), scale=scale, zero_point=zero, **options
    )
    report = replace(result.report, dead_columns=result.report.dead_columns - missing)
    quantized = result.dequantize()[..., :C]
    return OnGrid(quantized, result.codes[..., :C].contiguous(), report)
