"""GPTQ as it was published, peculiarities included, on our column kernel.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with the options that its implementation added.
"""

import torch
from torch import Tensor

from .. import ops
from ..hessian import damped, permuted
from ..ops import Backend
from .problem import FindGrid


def solve_published(
    weight: Tensor,
    hessian: Tensor,
    find: FindGrid,
    grid: tuple[Tensor, Tensor] | None,
    qmax: int,
    *,
    group_size: int,
    block: int,
    damp: float,
    actorder: bool,
    static_groups: bool,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [B, R, C] (overwritten), hessian [B, C, C]

    ->  codes uint8 [B, R, C], scale, zero [B, R, G], g_idx int64 [B, C], the group of each column

    grid: scale, zero [B, R, 1] for all columns; None where there are groups. Columns that never
    fired become 0, and their H_cc 1. With `actorder` the columns are reordered, and with them the
    groups, unless `static_groups`. A group that begins inside a block takes its grid from the
    weights as they stood before the block. ValueError where H is not positive definite.
    """
    B, R, C = weight.shape
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    hessian = hessian.clone()
    hessian.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1)
    w = weight.masked_fill_(dead[:, None, :], 0)

    G = -(-C // group_size)
    scale, zero = w.new_ones(B, R, G), w.new_zeros(B, R, G)

    def find_groups(first: int, end: int) -> None:
        """Grids of the groups that begin in columns first to end of the weight as it stands."""
        for start in range(-(-first // group_size) * group_size, end, group_size):
            s, z = find(w[:, :, start : start + group_size].flatten(0, 1))
            scale[:, :, start // group_size] = s.view(B, R)
            zero[:, :, start // group_size] = z.view(B, R)

    if grid is not None:
        scale, zero = grid
    elif static_groups:
        find_groups(0, C)
    columns = torch.arange(C, device=w.device).expand(B, C)
    if actorder:
        columns = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        w = w.gather(2, columns[:, None, :].expand(B, R, C))
        hessian = permuted(hessian, columns)
    place = torch.arange(C, device=w.device).expand(B, C)
    group = (columns if static_groups else place) // group_size

    root, upper = _factors(hessian, damp)
    codes = torch.empty(B, R, C, dtype=torch.uint8, device=w.device)
    for start in range(0, C, block):
        end = min(start + block, C)
        tile = slice(start, end)
        if grid is None and not static_groups:
            find_groups(start, end)
        now, u = w[:, :, tile], root[:, tile, tile]
        feedback = u / u.diagonal(dim1=1, dim2=2)[:, None, :]
        codes[:, :, tile], error = ops.solve_columns(
            now, now, feedback, scale, zero, group[:, tile], qmax, backend=backend
        )
        w[:, :, end:] -= error @ u @ upper[:, tile, end:]
    back = columns.argsort(dim=1)
    codes = codes.gather(2, back[:, None, :].expand(B, R, C))
    return codes, scale, zero, group.gather(1, back)


def _factors(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """U^-1 and U of H^-1 = U^T U, upper triangular, H damped: [B, C, C] float32 each"""
    lower, info = torch.linalg.cholesky_ex(damped(hessian, damp).flip((1, 2)))
    if info.any():
        raise ValueError(
            f"the Hessian is not positive definite with percdamp {damp}; give more, or more inputs"
        )
    root = lower.flip((1, 2))  # H = R R^T, R upper triangular, is U^-1
    identity = torch.eye(root.shape[1], dtype=root.dtype, device=root.device).expand_as(root)
    upper = torch.linalg.solve_triangular(root, identity, upper=True)
    return root.float(), upper.float()
