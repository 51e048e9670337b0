"""The grid of a layer, with the interface of the published `quant.Quantizer`."""

import math

import torch
from torch import Tensor, nn

from ..reference import to_code, to_value
from .aliases import accepts

TRITS = -1  # what `maxq` is where a weight has three values of its own, which are no affine grid


class Quantizer(nn.Module):
    """scale, zero and maxq of one layer, or of the group of columns it saw last.

        symmetric:   scale = 2 max|w| / maxq           zero = (maxq + 1) / 2
        asymmetric:  low, high = min(w, 0), max(w, 0)
                     scale = (high - low) / maxq       zero = round(-low / scale)

    Symmetric rows without a negative weight have the same grid as others; the published class gives
    them half the scale, which cuts the larger half of them off.

    scale, zero: float32 of `shape` zeros until `find_params`, then [R, 1, ...], to broadcast with
    the weight, or as many axes as the activations have. maxq: the largest code, a 0-d tensor.
    """

    def __init__(self, shape: int = 1) -> None:
        super().__init__()
        self.register_buffer("maxq", torch.tensor(0))
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero", torch.zeros(shape))
        self.maxq: Tensor
        self.scale: Tensor
        self.zero: Tensor

    @accepts({"per_channel": "perchannel"})
    def configure(
        self,
        bits: int,
        perchannel: bool = False,
        sym: bool = True,
        mse: bool = False,
        norm: float = 2.4,
        grid: int = 100,
        maxshrink: float = 0.8,
        trits: bool = False,
    ) -> None:
        """bits: 2 to 8. perchannel: a grid per row instead of one for all. mse: also try the range
        shrunk to 1 - i / grid for i < maxshrink * grid; the least sum of |w - q| ** norm wins.
        trits: three values per row, for `quantize` only.
        """
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
        if not grid >= 1 or not 0 < maxshrink <= 1 or not 0 < norm < math.inf:
            raise ValueError(
                "grid must be at least 1, maxshrink in (0, 1], norm positive and finite, "
                f"got {grid}, {maxshrink} and {norm}"
            )
        self.maxq = torch.tensor(TRITS if trits else 2**bits - 1, device=self.maxq.device)
        self.perchannel, self.sym = perchannel, sym
        self.mse, self.norm, self.grid, self.maxshrink = mse, norm, grid, maxshrink

    @torch.no_grad()
    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Set scale and zero. x: a weight [R, ...], or activations [N, C], [N, T, C] or
        [N, C, H, W], for which C takes the place of the rows.
        """
        if self.maxq == 0:
            raise ValueError("configure() sets the bits, and has not been called")
        self.maxq = self.maxq.to(x.device)
        axis = 0 if weight else 1 if x.ndim == 4 else x.ndim - 1
        count = x.shape[axis]
        rows = x.movedim(axis, 0).flatten(1) if self.perchannel else x.reshape(1, -1)
        scale, zero = self._search(rows.float())
        if weight:
            shape = (count, *(1,) * (x.ndim - 1))
        else:
            shape = tuple(count if each == axis else 1 for each in range(x.ndim))
        self.scale, self.zero = (t.expand(count).reshape(shape).clone() for t in (scale, zero))

    def _search(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[N, n]  ->  scale, zero [N]"""
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        flat = high == low
        low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
        if self.maxq == TRITS:
            return high, low
        full = (high - low) / self.maxq
        zero = (
            torch.full_like(full, (int(self.maxq) + 1) / 2) if self.sym else (-low / full).round()
        )
        scale = full
        if self.mse:
            best = torch.full_like(full, torch.inf)
            for step in range(int(self.maxshrink * self.grid)):
                trial = full * (1 - step / self.grid)
                error = rows - self._round(rows, trial[:, None], zero[:, None])
                error = error.abs_().pow_(self.norm).sum(1)
                scale = torch.where(error < best, trial, scale)
                best = torch.minimum(error, best)
        return scale, zero

    def _round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.maxq == TRITS:
            return (x > scale / 2) * scale + (x < zero / 2) * zero
        grid = scale, zero, int(self.maxq)
        return to_value(to_code(x, *grid), *grid)

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid; x itself before there is one."""
        return self._round(x, self.scale, self.zero) if self.ready() else x

    def enabled(self) -> bool:
        return bool(self.maxq > 0)

    def ready(self) -> bool:
        return bool((self.scale != 0).all())
