"""Optimal Brain Surgeon, row by row: which weights to remove, and what the others become.

    j = argmin w_j^2 / A_jj        A the inverse Hessian of the weights that are left
    w -= w_j / A_jj A_j
    A -= A_j^T A_j / A_jj

Hassibi & Stork 1993; rows and N:M choices as in Frantar & Alistarh 2022, arXiv 2208.11580.
"""

import torch
from torch import Tensor


def remove_greedily(
    weight: Tensor, inverse: Tensor, steps: int, n_of_m: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Remove `steps` weights of each row, the cheapest next one each time; `weight` in place.

    weight [N, C], inverse [N, C, C] or expanded from [C, C], not written to. n_of_m: at most n of
    each m consecutive weights.
    ->  order int64 [N, steps], cost w_j^2 / A_jj [N, steps]
    """
    N, C = weight.shape
    each = torch.arange(N, device=weight.device)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    # the updates of A are kept as vectors: A_j = inverse_j - sum_k v_k[j] v_k
    v = weight.new_zeros(N, steps, C)
    order = torch.empty(N, steps, dtype=torch.int64, device=weight.device)
    cost = weight.new_empty(N, steps)
    for step in range(steps):
        barred = gone
        if n_of_m is not None:
            n, m = n_of_m
            full = gone.unflatten(1, (-1, m)).sum(2) >= n
            barred = gone | full.repeat_interleave(m, 1)
        price = (weight.square() / diagonal).masked_fill_(barred, torch.inf)
        j = price.argmin(1)
        order[:, step], cost[:, step] = j, price[each, j]
        column = inverse[each, j] - torch.einsum("nk,nkc->nc", v[each, :step, j], v[:, :step])
        pivot = diagonal[each, j]
        weight -= (weight[each, j] / pivot)[:, None] * column
        gone[each, j] = True
        weight.masked_fill_(gone, 0)
        v[:, step] = (column / pivot.sqrt()[:, None]).masked_fill_(gone, 0)
        diagonal -= v[:, step].square()
    return order, cost


def compensated(weight: Tensor, hessian: Tensor, gone: Tensor) -> Tensor:
    """The best weights that are 0 where `gone`: argmin (w - v) H (w - v)^T, v_gone = 0

    weight [N, C], hessian [C, C], gone bool [N, C]  ->  [N, C]
    """
    left = ~gone
    together = left[:, :, None] & left[:, None, :]
    system = torch.where(together, hessian, 0)
    system.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1)
    target = (weight @ hessian).masked_fill(gone, 0)
    return torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
