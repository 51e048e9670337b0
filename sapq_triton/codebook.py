"""Codebooks: sixteen levels that a group's scale multiplies, where a grid has no integers."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch


class Codebook(NamedTuple):
    """What the operations take in place of `qmax`, the largest code of an integer grid.

        code  = that of the level nearest to w / scale; of two as near, the even one
        value = levels[code] * scale

    levels: of each code, float32 numbers; of equal ones only the lowest code is chosen.
    ascending: codes of different levels, the lowest level first.
    bounds: float32 numbers: x is rounded to the code at index k of `ascending`, where k of them lie
    below x.
    """

    levels: tuple[float, ...]
    ascending: tuple[int, ...]
    bounds: tuple[float, ...]

    @classmethod
    def of(cls, *levels: float) -> "Codebook":
        different = {level: levels.index(level) for level in sorted(levels)}
        ascending = tuple(different.values())
        bounds = tuple(
            _bound((levels[low] + levels[high]) / 2, goes_up=high % 2 == 0)
            for low, high in pairwise(ascending)
        )
        return cls(levels, ascending, bounds)

    @property
    def half_range(self) -> float:
        """The largest magnitude of a level; of integers qmax / 2."""
        return max(map(abs, self.levels))

    @property
    def half_step(self) -> float:
        """How far x may lie from the nearer of its two neighbours; of integers 1 / 2."""
        levels = [self.levels[code] for code in self.ascending]
        return max(high - low for low, high in pairwise(levels)) / 2


def _bound(middle: float, goes_up: bool) -> float:
    """The largest float32 number that is rounded down: `middle` itself, unless a tie goes up."""
    bound = torch.tensor(middle, dtype=torch.float32)
    if bound.item() > middle or (goes_up and bound.item() == middle):
        bound = bound.nextafter(torch.tensor(-math.inf))
    return bound.item()


# quantiles of the normal distribution, seven below zero and eight above (arXiv 2305.14314)
NF4 = Codebook.of(
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# E2M1: a code is its bits, sign, exponent and mantissa, so that ties go to the even mantissa
# (OCP Microscaling Formats, version 1.0)
FP4 = Codebook.of(
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0
)
