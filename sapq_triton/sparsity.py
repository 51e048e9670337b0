"""Which weights become zero: in each few columns, or each group of M of them, the cheapest ones.

Removing a weight costs w^2 / A_cc (Optimal Brain Surgeon), A the inverse Hessian of the columns
that are not quantized yet and w the weight as all columns before have left it: masks adapt on the
way (SparseGPT, arXiv 2301.00774), and what they cost is taken up together with the rounding
(Optimal Brain Compression, arXiv 2208.11580).

No group is torn between tiles. The alternative, to choose the weights of a group when the first of
its columns comes up, binds the others long before their turn: with it layer errors of
all-MiniLM-L6-v2 were 4 to 21 % higher (4 bits, 2:4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .codebook import Codebook
from .ops import Backend, Precision
from .spec import QuantSpec

# columns whose weights are chosen at a time, after all choices before have had their effect: with
# 128, a tile of the re-ranked order, most layer errors of all-MiniLM-L6-v2 are 4 to 12 % higher,
# with 8 they are the same
STEP = 16


@dataclass(frozen=True)
class Sparsity:
    """What a spec asks of a weight of so many columns.

    share: of the weights that become zero. group: columns of which each row loses this share; 1
    where any weight of a tile may go. window: distance from one column of a group to the next.
    """

    share: float
    group: int = 1
    window: int = 1

    @classmethod
    def of(cls, spec: QuantSpec, columns: int, window: int) -> "Sparsity | None":
        """None where no weight has to be zero; ValueError where the groups do not fit."""
        if spec.n_of_m is None:
            return cls(spec.share) if spec.share else None
        n, m = spec.n_of_m
        if columns % (m * window):
            each = f", {window} for each channel" if window > 1 else ""
            raise ValueError(
                f"sparsity {spec.sparsity!r} needs a multiple of {m * window} columns{each}, "
                f"got {columns}"
            )
        return cls(1 - n / m, m, window)

    def whole(self, columns: int) -> int:
        """About so many columns, but whole groups."""
        return max(columns // self.group, 1) * self.group

    def by_group(self, columns: Tensor) -> Tensor:
        """Positions at which the columns of each group follow one another.

        columns: of whole groups, numbers in the original order; int64 [B, F]  ->  int64 [B, F]
        """
        channel, place = columns // self.window, columns % self.window
        group = channel // self.group * self.window + place
        return (group * self.group + channel % self.group).argsort(dim=1)

    def largest(self, value: Tensor, columns: Tensor, count: int) -> Tensor:
        """Positions of the `count` columns, in whole groups, of the largest sum of values.

        value [B, F], columns int64 [B, F]  ->  int64 [B, count]
        """
        together = self.by_group(columns).unflatten(1, (-1, self.group))
        total = value.gather(1, together.flatten(1)).view(together.shape).sum(2)
        first = total.argsort(dim=1, descending=True, stable=True)[:, : count // self.group]
        return together.gather(1, first[:, :, None].expand(-1, -1, self.group)).flatten(1)

    def in_steps(self, columns: Tensor) -> Tensor:
        """Positions in this order again, but no group reaches beyond its step of columns.

        Groups go by the mean place of their columns. int64 [B, F]  ->  int64 [B, F]
        """
        places = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        steps = self.largest(-places, columns, columns.shape[1]).split(self.whole(STEP), 1)
        return torch.cat([step.sort(dim=1).values for step in steps], 1)

    def cheapest(self, cost: Tensor, columns: Tensor, start: int) -> Tensor:
        """The weights of some columns that become zero; of equal costs the first.

        cost [B, R, T], columns int64 [B, T], start: columns before these  ->  bool [B, R, T]
        Of all columns together round(share * R * C), or share * group of each group of each row.
        """
        B, R, T = cost.shape
        if self.group == 1:
            count = round(self.share * R * (start + T)) - round(self.share * R * start)
            return _smallest(cost.flatten(1), count).view(B, R, T)
        together = self.by_group(columns)[:, None, :].expand(B, R, T)
        groups = cost.gather(2, together).unflatten(2, (-1, self.group))
        pruned = _smallest(groups, round(self.share * self.group)).flatten(2)
        return torch.empty_like(pruned).scatter_(2, together, pruned)


def prune_and_solve(
    weight: Tensor,
    feedback: Tensor,
    pivots: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
    precision: Precision,
    backend: Backend,
    sparsity: Sparsity,
    columns: Tensor,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.solve_columns` a few columns T at a time, to choose those of their weights that go.

        W'_T = W_T + E M_.T M_TT^-1                     what the errors E before make of W_T
        A_cc = sum_{j in T} (M_TT^-1)_jc^2 / D_j        of the inverse of H = M D M^T from T on

    weight [B, R, F] in the order of columns int64 [B, F], feedback M [B, F, F], pivots D [B, F];
    start: columns before these  ->  codes uint8, error, pruned bool; [B, R, F]
    """
    codes = torch.empty_like(weight, dtype=torch.uint8)
    pruned = torch.empty_like(weight, dtype=torch.bool)
    error = torch.empty_like(weight)
    width = sparsity.whole(STEP)
    for first in range(0, weight.shape[2], width):
        before, step = slice(0, first), slice(first, first + width)
        now, factor = weight[:, :, step], feedback[:, step, step]
        identity = torch.eye(now.shape[2], device=now.device).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, identity, upper=True, unitriangular=True)
        carried = error[:, :, before] @ feedback[:, before, step]
        diagonal = (root.square() / pivots[:, step, None]).sum(1)
        cost = (now + carried @ root).square_() / diagonal[:, None]
        pruned[:, :, step] = gone = sparsity.cheapest(cost, columns[:, step], start + first)
        codes[:, :, step], error[:, :, step] = ops.solve_columns(
            now, now + carried, factor, scale, zero_point, group[:, step], qmax,
            precision, backend, gone,
        )  # fmt: skip
    return codes, error, pruned


def _smallest(value: Tensor, count: int) -> Tensor:
    """Where the `count` smallest of the last dimension are, of equal ones the first; bool"""
    first = value.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(value, dtype=torch.bool).scatter_(-1, first, True)
