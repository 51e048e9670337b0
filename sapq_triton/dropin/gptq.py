"""`GPTQ` of github.com/IST-DASLab/gptq: the same calls, our solver."""

from typing import Any

import torch
from torch import Tensor

from ..layers import Layer
from ..ops import Backend, Precision
from ..result import dequantize, layer_error
from ..spec import Order, Starts
from .aliases import accepts
from .problem import LayerProblem, bits_of, find_grids, solve_on_grid
from .published import solve_published
from .quantizer import Quantizer

ALIASES = {
    "block_size": "blocksize",
    "damp_percent": "percdamp",
    "dampening_frac": "percdamp",
    "perc_damp": "percdamp",
    "group_size": "groupsize",
    "act_order": "actorder",
    "desc_act": "actorder",
}


class GPTQ(LayerProblem):
    """Quantize one layer: show it inputs, then `fasterquant`.

        gptq = GPTQ(layer)
        gptq.quantizer.configure(4, perchannel=True, sym=False)
        handle = layer.register_forward_hook(lambda _, inp, out: gptq.add_batch(inp[0], out))
        ...                                             # calibration batches
        gptq.fasterquant(percdamp=0.01, groupsize=128, actorder=True)

    layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, with groups too (a Hessian for each), or
    transformers' Conv1D; on any device.
    order: of `solve`, by default "sensitivity" whatever `actorder` says: grids lie in original
    order, so that no order costs an engine anything.
    starts, sweeps, rounds, precision, backend: of `solve`.
    compat: the published algorithm instead, with what is peculiar to it: a group that begins inside
    a block takes its grid from weights that lack the block's updates, `actorder` without
    `static_groups` permutes the groups, columns that never fired become 0. Its codes are then
    those of the published code up to ties. ValueError together with an order.

    What the default does else than the published code, and why: grids are always those of the
    original weight, in original column order, so that `g_idx[i] = i // groupsize` in every order,
    the only layout that inference engines still load; columns that never fired are rounded;
    where the damped Hessian is not positive definite, damping rises, then the layer is rounded to
    nearest, where the published code raises. `dead_columns`, `damp` and `fallback` say so.

    quantizer: a `Quantizer`, or anything that finds grids as the published one does; it may be
    replaced. H, nsamples, rows, columns, dev, layer: see LayerProblem.

    After `fasterquant`:
    codes: uint8 [rows, columns]. scale, zero: float32 [rows, G]. g_idx: int32 [columns], the group
    of each column; [groups, columns] where a convolution with groups permutes them.
    error: tr((W - Q) H (W - Q)^T), of all groups. damp: what was used, the largest of all groups.
    fallback: whether anything was rounded to nearest for want of a factorization. dead_columns:
    those that never fired, of all groups.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    g_idx: Tensor
    error: float
    damp: float
    fallback: bool
    dead_columns: int

    def __init__(
        self,
        layer: Layer,
        *,
        compat: bool = False,
        order: Order | None = None,
        starts: Starts = 1,
        sweeps: int = 2,
        rounds: int = 0,
        precision: Precision = "tf32x3",
        backend: Backend = "auto",
    ) -> None:
        if compat and order is not None:
            raise ValueError(f"compat follows actorder; it takes no order, got {order!r}")
        super().__init__(layer, torch.float32)
        self.quantizer: Any = Quantizer()
        self.compat, self.order = compat, order
        self.starts, self.sweeps, self.rounds = starts, sweeps, rounds
        self.precision, self.backend = precision, backend

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """inp: what the layer was called with; an empty one counts for nothing. out: not used."""
        sequence = self.layer.weight.ndim == 2 and inp.ndim == 2  # rows of one sample
        self._add(inp, 1 if sequence else inp.shape[0])

    @accepts(ALIASES)
    @torch.no_grad()
    def fasterquant(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = -1,
        actorder: bool = False,
        static_groups: bool = False,
    ) -> None:
        """Quantize the weight in place.

        blocksize: columns between two updates of the rest. percdamp: of the mean diagonal.
        groupsize: columns that share a grid, -1 for all; the last group may be shorter.
        actorder, static_groups: see the class.

        group_size, act_order, desc_act, damp_percent, perc_damp, dampening_frac and block_size are
        other names of the same. ValueError for what the solver does not take, TypeError for
        unknown keywords.
        """
        if isinstance(groupsize, bool) or not isinstance(groupsize, int):
            raise ValueError(f"groupsize must be an integer, got {groupsize!r}")
        if groupsize != -1 and groupsize < 1:
            raise ValueError(f"groupsize must be positive, or -1 for all columns, got {groupsize}")
        if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1:
            raise ValueError(f"blocksize must be an integer of at least 1, got {blocksize!r}")
        weight, hessian = self._weight(), self._hessian()
        B, R, C = weight.shape
        group_size = min(groupsize, C) if groupsize > 0 else C
        grid = None
        if groupsize == -1:
            if not self.quantizer.ready():
                self._find(weight.flatten(0, 1))
            grid = self._grid_of_all(B, R)
        bits = bits_of(self.quantizer.maxq)
        g_idx = torch.arange(C, device=self.dev) // group_size
        if self.compat:
            if self.nsamples == 0:
                raise ValueError("no inputs were seen; the published code would zero the layer")
            codes, scale, zero, groups = solve_published(
                weight.clone(), hessian, self._find, grid, 2**bits - 1,
                group_size=group_size, block=blocksize, damp=percdamp,
                actorder=actorder, static_groups=static_groups, backend=self.backend,
            )  # fmt: skip
            quantized = _per_column(codes, scale, zero, groups)
            permuted = actorder and not static_groups and groupsize != -1
            g_idx = groups.squeeze(0) if permuted else g_idx
            self.damp, self.fallback = percdamp, False
        else:
            scale, zero = grid or find_grids(weight, group_size, self._find)
            solved = solve_on_grid(
                weight, hessian, scale, zero,
                bits=bits, group_size=group_size, damp=percdamp, block=blocksize,
                order=self.order or "sensitivity", starts=self.starts, sweeps=self.sweeps,
                rounds=self.rounds, precision=self.precision, backend=self.backend,
            )  # fmt: skip
            codes, quantized = solved.codes, solved.quantized
            self.damp = solved.report.damp.max().item()
            self.fallback = bool(solved.report.fallback.any())
        self.dead_columns = int((hessian.diagonal(dim1=1, dim2=2) == 0).sum())
        self.error = layer_error(weight, quantized, hessian).sum().item()
        self.codes, self.scale, self.zero = (t.flatten(0, 1) for t in (codes, scale, zero))
        self.g_idx = g_idx.int()
        self._store(quantized)

    def _find(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        self.quantizer.find_params(columns, weight=True)
        return self.quantizer.scale, self.quantizer.zero

    def _grid_of_all(self, groups: int, rows: int) -> tuple[Tensor, Tensor]:
        grids = (self.quantizer.scale, self.quantizer.zero)
        if any(grid.numel() not in (1, groups * rows) for grid in grids):
            raise ValueError(
                f"the quantizer's scale must have 1 or {groups * rows} elements, "
                f"got {list(grids[0].shape)}"
            )
        scale, zero = (
            grid.to(self.dev, torch.float32).reshape(-1).expand(groups * rows) for grid in grids
        )
        return scale.reshape(groups, rows, 1), zero.reshape(groups, rows, 1)


def _per_column(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> Tensor:
    """`dequantize` where column c lies in group[b, c]: codes [B, R, C], scale, zero [B, R, G]"""
    index = group[:, None, :].expand(codes.shape)
    return dequantize(codes, scale.gather(2, index), zero.gather(2, index))
