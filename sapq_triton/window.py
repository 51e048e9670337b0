"""The sliding window of a convolution: which inputs meet which weight column."""

import math
from dataclasses import dataclass

from torch import Tensor

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """Geometry over three space axes (unused ones have size 1); padding is done beforehand.

    Column order within a group: channel, then the window's depth, height, width.
    """

    size: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    groups: int = 1

    def positions(self, space: tuple[int, ...]) -> Triple:
        """Number of window positions along each axis of the padded `space`."""
        d, h, w = (
            (side - dilation * (size - 1) - 1) // stride + 1
            for side, size, stride, dilation in zip(
                space, self.size, self.stride, self.dilation, strict=True
            )
        )
        return d, h, w

    def patches(self, inputs: Tensor) -> Tensor:
        """inputs [N, channels, D, H, W]  ->  X^T [groups, channels / groups * size, N * positions]

        Positions innermost: neighbouring patches are neighbours in the input, and are copied so.
        """
        batch, channels = inputs.shape[:2]
        positions = self.positions(inputs.shape[2:])
        n, c, *space = inputs.stride()
        each = channels // self.groups
        view = inputs.as_strided(
            (self.groups, each, *self.size, batch, *positions),
            (
                c * each,
                c,
                *(step * dilation for step, dilation in zip(space, self.dilation, strict=True)),
                n,
                *(step * stride for step, stride in zip(space, self.stride, strict=True)),
            ),
            inputs.storage_offset(),
        )
        return view.reshape(self.groups, each * math.prod(self.size), -1)
