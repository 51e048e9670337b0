"""Hessians of layers: accumulation over calibration batches, damping, and the two factorizations.

H = 2/n X^T X over the n input rows of a layer (Frantar & Alistarh 2022, arXiv 2208.11580).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .finite import check_finite
from .ops import Backend, Precision
from .window import Window

PANEL = 256  # rows, or columns, of a matrix that are copied at a time


class HessianSum:
    """Running, unnormalized sums of x and of x x^T per group, divided once at the end.

    drift: also sums x (y - x)^T, where y are the same rows in the full-precision model, and x what
    they have become in the quantized one. Sums of several accumulators over parts of the data may
    simply be added.
    """

    def __init__(
        self,
        groups: int,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drift: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a Hessian is summed in float32 or float64, got {dtype}")
        self.total = torch.zeros(groups, columns, columns, dtype=dtype, device=device)
        self.sums = torch.zeros(groups, columns, dtype=dtype, device=device)
        self.drifts = torch.zeros_like(self.total) if drift else None
        self.rows = 0
        self.unmatched = 0  # rows of which nobody knows what they were in the other model

    def add(
        self,
        inputs: Tensor,
        window: Window | None = None,
        precision: Precision = "tf32x3",
        backend: Backend = "auto",
    ) -> None:
        """inputs: [N, C] rows, or with a window an image batch [N, channels, *space], padded."""
        self.rows += ops.accumulate_hessian(self.total, inputs, window, precision, backend)
        together = inputs.sum(0, keepdim=True, dtype=self.total.dtype)  # patches of a sum of images
        self.sums += together if window is None else window.patches(together).sum(2)

    def add_drift(self, inputs: Tensor, original: Tensor, window: Window | None = None) -> None:
        """inputs: x as given to `add`, original: y, of the same shape."""
        if self.drifts is None:
            raise ValueError("this sum was made without drift")
        if original.shape != inputs.shape:
            raise ValueError(f"original must be {list(inputs.shape)}, got {list(original.shape)}")
        if window is None:
            self.drifts[0].addmm_(inputs.mT.to(self.total), (original - inputs).to(self.total))
            return
        for x, y in zip(inputs.split(1), original.split(1), strict=True):  # patches are many
            change = window.patches((y - x).to(self.total))
            self.drifts.baddbmm_(window.patches(x.to(self.total)), change.mT)

    def like(self) -> "HessianSum":
        """An empty one of the same kind."""
        groups, columns = self.sums.shape
        drift = self.drifts is not None
        return HessianSum(groups, columns, self.total.device, self.total.dtype, drift)

    def merge(self, other: "HessianSum") -> None:
        """Add the sums of other rows, in place."""
        self.total += other.total
        self.sums += other.sums
        self.rows += other.rows
        self.unmatched += other.unmatched
        if self.drifts is not None and other.drifts is not None:
            self.drifts += other.drifts

    def check(self, name: str) -> None:
        """ValueError that names the layer whose inputs these are, where a sum is not finite."""
        kind = str(self.total.dtype).removeprefix("torch.")
        hint = f": one of its inputs does, or is so large that sums of squares overflow {kind}"
        for total in (self.total, self.sums, *(() if self.drifts is None else (self.drifts,))):
            check_finite(total, f"the Hessian of {name!r}", hint)

    def mean(self) -> Tensor:
        """The mean row, [groups, C]; all zero where no row was seen."""
        return self.sums / max(self.rows, 1)

    def hessian(self) -> Tensor:
        """2/n X^T X, [groups, C, C]; all zero where no row was seen."""
        return _mirror_(self.total.clone()).mul_(2 / max(self.rows, 1))

    def drift(self) -> Tensor | None:
        """2/n X^T (Y - X), [groups, C, C]; None where it is not summed."""
        return None if self.drifts is None else self.drifts * (2 / max(self.rows, 1))

    def take(self) -> tuple[Tensor, Tensor | None]:
        """`hessian` and `drift` in the memory of their sums, which are gone; `mean` remains."""
        total, drift = self.total, self.drifts
        del self.total, self.drifts
        if total.is_inference():  # made by a model in inference mode, and never to be changed
            total, drift = total.clone(), drift if drift is None else drift.clone()
        factor = 2 / max(self.rows, 1)
        return _mirror_(total).mul_(factor), drift if drift is None else drift.mul_(factor)


def is_paired(inputs: Tensor, original: Tensor) -> Tensor:
    """Which rows are nearest to the row of the same number in the other model: bool [N]

    A router that sends a token elsewhere shifts the rows of those behind it. [N, C] twice
    """
    x, y = inputs.float(), original.float()
    squares = y.square().sum(1)
    paired = []
    for start in range(0, len(x), PANEL):
        part = x[start : start + PANEL]
        distance = squares - 2 * part @ y.mT  # but for |x|^2, which is one number for a row
        own = distance.diagonal(offset=start)
        close = 1e-6 * (squares[start : start + PANEL] + part.square().sum(1))  # equal rows
        paired.append(own <= distance.amin(1) + close)
    return torch.cat(paired) if paired else x.new_zeros(0, dtype=torch.bool)


@dataclass(frozen=True)
class Prior:
    """What inputs a layer of an expert would have, were it the only one: the Hessian [B, C, C] of
    `rows`, of the tokens of all `members` experts of the block, in the untouched model.
    """

    hessian: Tensor
    rows: int
    members: int

    @property
    def counts(self) -> int:
        """k, the rows that it stands for: as many as a Hessian needs to have full rank."""
        return self.hessian.shape[1]

    def note(self, rows: int) -> str:
        return (
            f"{rows} rows for {self.counts} columns: the Hessian of {self.members} experts, of "
            f"{self.rows} rows, counts as {self.counts} more"
        )

    def joined(
        self, hessian: Tensor, drift: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """(n H + k H_prior) / (n + k) and n / (n + k) D, n rows, in place of H and D."""
        share = rows / (rows + self.counts)
        hessian.mul_(share).add_(self.hessian.to(hessian), alpha=1 - share)
        return hessian, None if drift is None else drift.mul_(share)


def _mirror_(lower: Tensor) -> Tensor:
    """A symmetric matrix [B, C, C] of which only the lower triangle is there, in place."""
    C = lower.shape[1]
    for start in range(0, C, PANEL):
        panel, below = slice(start, start + PANEL), slice(start + PANEL, C)
        block = lower[:, panel, panel]
        block.copy_(block.tril() + block.tril(-1).mT)
        lower[:, panel, below] = lower[:, below, panel].mT
    return lower


def drifted(
    weight: Tensor, hessian: Tensor, drift: Tensor, damp: float, fraction: float = 1.0
) -> Tensor:
    """The weight whose outputs on inputs x are closest to those of `weight` on other inputs y.

        argmin_V  2/n sum |V x - W y|^2 + ridge |V - W|^2  =  W + W D^T (H + ridge)^-1

    with ridge = damp mean(diag H): what is left of an error that earlier layers made and this one
    can undo before it is quantized (asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos,
    arXiv 2505.11695). As it comes before any column is quantized, it depends on no block size.

    weight [B, R, C], hessian 2/n X^T X and drift 2/n X^T (Y - X) [B, C, C]; fraction of the step
    that is taken  ->  [B, R, C]; W itself where H is not positive definite
    """
    lower, solved = _cholesky_(damped(hessian, damp))
    step = torch.cholesky_solve(drift @ weight.mT.to(drift), lower).mT.to(weight)
    usable = solved[:, None, None] & step.isfinite().all(2, keepdim=True)
    return torch.where(usable, weight + fraction * step, weight)


def revive(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Give columns that never fired (H_cc = 0) the mean diagonal of the others.

    hessian [B, C, C]  ->  itself or a copy, and the number of such columns int64 [B]. A revived
    column is coupled to no other, so that its weights are rounded to nearest.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    count = dead.sum(1)
    if not count.any():
        return hessian, count
    alive = (dead.shape[1] - count).clamp(min=1)
    mean = torch.where(count < dead.shape[1], diagonal.sum(1) / alive, 1.0)
    # products with other columns can survive where the square of the column underflows
    revived = hessian.clone()
    revived.masked_fill_(dead[:, :, None], 0).masked_fill_(dead[:, None, :], 0)
    revived.diagonal(dim1=1, dim2=2).copy_(torch.where(dead, mean[:, None], diagonal))
    return revived, count


def damped(hessian: Tensor, damp: float | Tensor) -> Tensor:
    """H + damp mean(diag H) I; [B, C, C], a copy; damp may be a tensor [B]"""
    return _add_ridge(hessian.clone(), hessian, damp)


def _add_ridge(out: Tensor, hessian: Tensor, damp: float | Tensor) -> Tensor:
    """out + damp mean(diag H) I, in place"""
    ridge = damp * hessian.diagonal(dim1=1, dim2=2).mean(1)
    out.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return out


def permuted(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[columns, columns] per problem: [B, C, C], int64 [B, T]  ->  [B, T, T]"""
    B, T = columns.shape
    each = torch.arange(B, device=matrix.device)[:, None]
    if T <= PANEL:  # of rows that may be long: element by element
        return matrix[each[:, None], columns[:, :, None], columns[:, None, :]]
    out = torch.empty(B, T, T, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, T, PANEL):
        panel = slice(start, min(start + PANEL, T))
        rows = matrix[each, columns[:, panel]]  # whole rows are copied fast
        out[:, panel] = rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
    return out


def _cholesky_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor in place of a symmetric matrix [B, C, C], and where there is one, bool [B]

    Its diagonal is 1 where there is none: a zero would raise in what follows.
    """
    lower, info = matrix.mT, torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))  # column-major: no copy is made
    solved = info == 0
    lower.diagonal(dim1=1, dim2=2).masked_fill_(~solved[:, None], 1)
    return lower, solved


def feedback_factor(
    hessian: Tensor, damp: float = 0.0, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """M of H = M D M^T, unit upper triangular, H damped and in the order of `columns` [B, C].

    hessian [B, C, C]  ->  [B, C, C], solved bool [B]. One factorization: with rows and columns
    reversed, the lower Cholesky factor of H is M sqrt(D) read backwards.
    """
    factor, _, solved = ldl(hessian, damp, columns)
    return factor, solved


def ldl(
    hessian: Tensor, damp: float = 0.0, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """M and D of `feedback_factor`: [B, C, C], the diagonal [B, C], and solved bool [B]"""
    backwards = hessian.flip((1, 2)) if columns is None else permuted(hessian, columns.flip(1))
    backwards = _add_ridge(backwards.contiguous(), hessian, damp)
    lower, solved = _cholesky_(backwards)
    root = lower.diagonal(dim1=1, dim2=2).clone()
    lower /= root[:, None, :]
    _reverse_(backwards.view(len(hessian), -1))
    return lower, root.square_().flip(1), solved


def _reverse_(lines: Tensor) -> None:
    """lines [B, N], each backwards, in place: a matrix so stored is flipped in both dimensions"""
    N = lines.shape[1]
    step = max(1, N // 64, PANEL**2)  # elements: few steps, and little memory beside a large matrix
    for start in range(0, N // 2, step):
        end = min(start + step, N // 2)
        front, back = lines[:, start:end], lines[:, N - end : N - start]
        saved = front.flip(1)
        front.copy_(back.flip(1))
        back.copy_(saved)


def inverse(hessian: Tensor, damp: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """H^-1 of the damped H, symmetric up to rounding: [B, C, C]  ->  [B, C, C], solved bool [B]"""
    lower, solved = _cholesky_(damped(hessian, damp))
    return torch.cholesky_inverse(lower, out=lower), solved  # a GPU's library makes a copy
