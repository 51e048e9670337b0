"""Exact OBQ: every row greedy by itself, with an inverse Hessian of its own.

The literal algorithm (Frantar & Alistarh 2022, arXiv 2208.11580) writes the whole inverse of every
row after each weight. Here the rank-one downdates of `block` steps are kept aside and applied at
once to the columns that remain: the same choices at a fraction of the memory traffic.
"""

import torch
from torch import Tensor

from . import ops
from .codebook import Codebook
from .memory import Rows
from .ops import Backend, Precision
from .tile import bring_both_forward, bring_forward, to_front

MEMORY = 2**30  # bytes of per-row inverses held at a time on a CPU; a quarter of what a GPU has


def solve_obq(
    weight: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
    block: int,
    precision: Precision,
    backend: Backend,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """weight [B, R, C], inverse [B, C, C], scale, zero_point [B, R, G], group int64 [B, C]

    ->  codes uint8 [B, R, C], solved bool [B]: no inverse lost its positive diagonal to rounding
    """
    B, R, C = weight.shape
    on_gpu = weight.device.type == "cuda"
    memory = torch.cuda.mem_get_info(weight.device)[0] // 4 if on_gpu else MEMORY
    chunk = max(1, memory // (4 * C * C))  # rows never meet: their number changes no code
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    solved = torch.ones(B, dtype=torch.bool, device=weight.device)
    rows = rows or Rows(least=1)
    for problem, a in enumerate(inverse):

        def chunk_of(part: slice, problem: int = problem, a: Tensor = a) -> tuple[Tensor, ...]:
            grid = scale[problem, part], zero_point[problem, part], group[problem], qmax
            found, finite = _solve_chunk(weight[problem, part], a, *grid, block, precision, backend)
            solved[problem] &= finite
            return (found[None],)

        codes[problem] = rows.map(R, chunk_of, most=chunk)[0][0]
    return codes, solved


def _solve_chunk(
    weight: Tensor,
    shared: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    qmax: int | Codebook,
    block: int,
    precision: Precision,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """weight [N, C], shared [C, C], scale, zero_point [N, G], group int64 [C]

    ->  codes uint8 [N, C], solved
    """
    N, C = weight.shape
    w = all_columns = weight.clone()
    codes = torch.empty(N, C, dtype=torch.uint8, device=w.device)
    columns = torch.arange(C, device=w.device).repeat(N, 1)
    inverse = shared.expand(N, C, C)  # no row has a copy of its own before the first update
    for start in range(0, C, block):
        steps = min(block, C - start)
        picked, code, v = ops.solve_rows(
            w, inverse, scale, zero_point, group[columns], qmax, steps, backend
        )
        codes.scatter_(1, columns.gather(1, picked), code)
        if start == 0:
            inverse = inverse.clone(memory_format=torch.contiguous_format)
        move = to_front(picked, C - start)
        bring_forward(w, move, 1)
        bring_forward(columns, move, 1)
        bring_forward(v, move, 2)
        bring_both_forward(inverse, move)
        w, columns = w[:, steps:], columns[:, steps:]
        inverse = inverse[:, steps:, steps:]
        if start + steps < C:
            ops.downdate(inverse, v[:, :, steps:], precision, backend)
    # the root of a negative diagonal, NaN, spreads to all weights of the row
    return codes, all_columns.isfinite().all()
