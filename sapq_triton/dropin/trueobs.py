"""`TrueOBS` of github.com/IST-DASLab/OBC: the same calls, our solver, exact pruning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..hessian import revive
from ..layers import Layer, window_size
from ..obq import solve_obq
from ..ops import Backend, Precision
from ..result import dequantize, layer_error
from ..spec import Order, Starts
from .problem import LayerProblem, bits_of, solve_on_grid
from .pruning import compensated, remove_greedily
from .quantizer import Quantizer

SPARSE = 0.25  # share of zeros from which a weight is taken for a pruned one


class TrueOBS(LayerProblem):
    """Quantize or prune one layer: show it inputs, then call one of the methods.

        obs = TrueOBS(layer)
        obs.quantizer.configure(4, perchannel=True, sym=False, mse=True)
        obs.add_batch(inputs, None)                   # several times
        obs.quantize()                                # or nmprune(2, 4), or
        obs.prepare_unstr(); weights = obs.prune_unstr([0.5, 0.75])

    layer: as in GPTQ; the published class takes Linear and Conv2d without groups.
    rel_damp: added to the diagonal, as a fraction of its mean.
    order: of `solve`, for `quantize`; "sensitivity" is much faster than exact OBQ ("obq"), and has
    the lower layer error at few bits, where OBQ leaves the weights that are hard to round to the
    end. block, starts, sweeps, rounds, precision, backend: of `solve`.
    compat: `quantize` as published: exact OBQ, zeros stay zeros, columns that never fired become 0;
    ValueError together with an order. Pruning is as published in both modes: exact, and columns
    that never fired, which cost nothing, become 0.

    H is summed in float64; where it is not positive definite, 1 is added to its diagonal, as
    published. quantizer: a `Quantizer`, or anything that finds grids as the published one does.
    After `quantize` and `nmprune`, `error` is tr((W - Q) H (W - Q)^T), of all groups.
    """

    error: float

    def __init__(
        self,
        layer: Layer,
        rel_damp: float = 0,
        *,
        compat: bool = False,
        order: Order | None = None,
        block: int = 128,
        starts: Starts = 1,
        sweeps: int = 2,
        rounds: int = 0,
        precision: Precision = "tf32x3",
        backend: Backend = "auto",
    ) -> None:
        if compat and order is not None:
            raise ValueError(f"compat is exact OBQ; it takes no order, got {order!r}")
        if not 0 <= rel_damp < math.inf:
            raise ValueError(f"rel_damp must be finite and not negative, got {rel_damp}")
        super().__init__(layer, torch.float64)
        self.quantizer: Any = Quantizer()
        self.rel_damp, self.compat, self.order = rel_damp, compat, order or "sensitivity"
        self.block, self.starts, self.sweeps, self.rounds = block, starts, sweeps, rounds
        self.precision, self.backend = precision, backend
        self._removals: _Removals | None = None

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """inp: what the layer was called with; an empty one counts for nothing. out: not used."""
        self._add(inp, inp.shape[0])

    @torch.no_grad()
    def quantize(self, parallel: int = 32, keep_zeros: bool | None = None) -> None:
        """Quantize the weight in place; one grid per row, found anew.

        parallel: rows that have an inverse of their own at a time, where zeros are kept; the
        result does not depend on it.
        keep_zeros: weights that are 0 stay 0, as after pruning, by exact OBQ on the others. None:
        in compat. ValueError for None in the default mode where a quarter of the weights are 0.
        """
        _check_parallel(parallel)
        weight, hessian = self._weight(), self._hessian()
        zeros = (weight == 0).float().mean().item()
        if keep_zeros is None and not self.compat and zeros >= SPARSE:
            raise ValueError(
                f"{zeros:.0%} of the weights are 0: pass keep_zeros=True for a pruned weight, "
                "which is exact OBQ on the others, or keep_zeros=False"
            )
        exact = self.compat or bool(keep_zeros)
        target, damped = self._prepared(weight, hessian, zero_dead=self.compat)
        self.quantizer.find_params(target.flatten(0, 1), weight=True)
        bits = bits_of(self.quantizer.maxq)
        scale, zero = (
            grid.float().reshape(*weight.shape[:2], 1)
            for grid in (self.quantizer.scale, self.quantizer.zero)
        )
        if exact:
            codes = torch.cat([
                self._solve_exactly(*group, 2**bits - 1, parallel)
                for group in zip(target, damped, scale, zero, strict=True)
            ]).view_as(weight)  # fmt: skip
            quantized = dequantize(codes, scale, zero)
        else:
            quantized = solve_on_grid(
                weight, hessian, scale, zero, bits=bits, group_size=self.columns,
                order=self.order, block=self.block, starts=self.starts, sweeps=self.sweeps,
                rounds=self.rounds, damp=self.rel_damp, precision=self.precision,
                backend=self.backend,
            ).quantized  # fmt: skip
        self._finish(weight, quantized)

    @torch.no_grad()
    def nmprune(self, n: int = 2, m: int = 4, parallel: int = 32) -> None:
        """Set n of each m consecutive weights of a row to 0, in place; the others compensate.

        Consecutive in the input channels, at each position of a convolution's window. parallel:
        rows at a time; their updates take [parallel, columns * n / m, columns] float64. ValueError
        where m does not divide the columns.
        """
        _check_parallel(parallel)
        if any(isinstance(value, bool) or not isinstance(value, int) for value in (n, m)):
            raise ValueError(f"n and m must be integers, got n = {n!r}, m = {m!r}")
        if not 0 < n <= m or self.columns % m:
            raise ValueError(
                f"nmprune needs 0 < n <= m, and m a divisor of {self.columns} columns, "
                f"got n = {n}, m = {m}"
            )
        weight, hessian = self._weight(), self._hessian()
        target, damped = self._prepared(weight, hessian, zero_dead=True)
        channels_last = self._channels_last()
        pruned = torch.empty_like(target)
        for group, (w, h) in enumerate(zip(target, damped, strict=True)):
            inverse = _inverse(h[channels_last][:, channels_last])
            for rows in torch.arange(len(w), device=w.device).split(parallel):
                left = w[rows][:, channels_last].double()
                remove_greedily(
                    left, inverse.expand(len(left), -1, -1), self.columns // m * n, (n, m)
                )
                pruned[group, rows[:, None], channels_last] = left.float()
        self._finish(weight, pruned)

    @torch.no_grad()
    def prepare_unstr(self, parallel: int = 32) -> None:
        """Find out in which order each row would lose its weights, and at what cost.

        parallel: rows at a time; their updates take [parallel, columns, columns] float64.
        """
        _check_parallel(parallel)
        target, damped = self._prepared(self._weight(), self._hessian(), zero_dead=True)
        found = [
            remove_greedily(rows.clone(), _row_inverses(rows, h), self.columns)
            for w, h in zip(target.double(), damped, strict=True)
            for rows in w.split(parallel)
        ]
        order, cost = (torch.cat(each) for each in zip(*found, strict=True))
        self._removals = _Removals(target.double(), damped, order, cost, parallel)

    @torch.no_grad()
    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """Weights [rows, columns] for each share of zeros; the layer is left as it is.

        Of all rows, the ceil(sparsity * rows * columns) removals of least cost decide how many
        weights each row loses. ValueError before `prepare_unstr`.
        """
        if self._removals is None:
            raise ValueError("call prepare_unstr first")
        for sparsity in sparsities:
            if not 0 <= sparsity <= 1:
                raise ValueError(f"sparsities must be from 0 to 1, got {sparsity}")
        return [
            self._removals.pruned(sparsity).to(self.layer.weight.dtype) for sparsity in sparsities
        ]

    def free(self) -> None:
        """Let the Hessian go, and what `prepare_unstr` found."""
        super().free()
        self._removals = None

    def _prepared(self, weight: Tensor, hessian: Tensor, zero_dead: bool) -> tuple[Tensor, Tensor]:
        """The weight, perhaps with 0 in dead columns, and a damped Hessian that has none."""
        if zero_dead:
            dead = hessian.diagonal(dim1=1, dim2=2) == 0
            weight, hessian = weight.masked_fill(dead[:, None, :], 0), hessian.clone()
            hessian.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1)
        else:
            hessian = revive(hessian)[0].clone()
        ridge = self.rel_damp * hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        hessian.diagonal(dim1=1, dim2=2).add_(ridge)
        singular = torch.linalg.cholesky_ex(hessian)[1] != 0
        hessian.diagonal(dim1=1, dim2=2).add_(singular[:, None].double())
        return weight, hessian

    def _solve_exactly(
        self, weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, qmax: int, parallel: int
    ) -> Tensor:
        """Exact OBQ of one group's rows [R, C], float32; zeros stay.  ->  codes uint8 [R, C]"""
        coupled = hessian.count_nonzero(0) > 1
        group = torch.zeros_like(weight, dtype=torch.int64)
        if not ((weight == 0) & coupled).any():
            inverse = _inverse(hessian).float()
            codes, _ = solve_obq(
                weight[None], inverse[None], scale[None], zero[None], group[None, 0], qmax,
                self.block, self.precision, self.backend,
            )  # fmt: skip
            return codes[0]
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for rows in torch.arange(len(weight), device=weight.device).split(parallel):
            w = weight[rows]
            picked, code, _ = ops.solve_rows(
                w, _row_inverses(w.double(), hessian).float().contiguous(), scale[rows], zero[rows],
                group[rows], qmax, self.columns, self.backend,
            )  # fmt: skip
            codes[rows] = torch.empty_like(code).scatter_(1, picked, code)
        return codes

    def _channels_last(self) -> Tensor:
        """Columns of a weight matrix, so that the input channels of a position lie together."""
        columns = torch.arange(self.columns, device=self.dev)
        return columns.view(-1, window_size(self.layer)).T.flatten()

    def _finish(self, weight: Tensor, quantized: Tensor) -> None:
        self.error = layer_error(weight, quantized, self._hessian()).sum().item()
        self._store(quantized)


@dataclass(frozen=True)
class _Removals:
    """In which order rows lose their weights.

    weight float64 [groups, R, C], hessian [groups, C, C], order int64 and cost [groups * R, C];
    parallel: rows at a time.
    """

    weight: Tensor
    hessian: Tensor
    order: Tensor
    cost: Tensor
    parallel: int

    def pruned(self, sparsity: float) -> Tensor:
        """float64 [groups * R, C]"""
        groups, R, C = self.weight.shape
        first = self.cost.flatten().argsort(stable=True)[: math.ceil(groups * R * C * sparsity)]
        lost = (first // C).bincount(minlength=groups * R)
        gone = (self.order.argsort(1) < lost[:, None]).view(groups, R, C) | (self.weight == 0)
        return torch.cat([
            compensated(rows, h, mask)
            for w, h, m in zip(self.weight, self.hessian, gone, strict=True)
            for rows, mask in zip(w.split(self.parallel), m.split(self.parallel), strict=True)
        ])  # fmt: skip


def _check_parallel(parallel: int) -> None:
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"parallel must be an integer of at least 1, got {parallel!r}")


def _inverse(hessian: Tensor) -> Tensor:
    """[..., C, C]"""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _row_inverses(weight: Tensor, hessian: Tensor) -> Tensor:
    """Inverses of what is left of H for each row, without its zeros: [N, C], [C, C]  ->  [N, C, C]

    A zero couples to nothing, and has the diagonal 1.
    """
    gone = weight == 0
    if not gone.any():
        return _inverse(hessian).expand(len(weight), -1, -1)
    coupled = ~gone[:, :, None] & ~gone[:, None, :]
    left = torch.where(coupled, hessian, 0)
    left.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1)
    return _inverse(left)
