"""How far to trust a Hessian: damping and drift correction by the error on rows held out.

What a layer should do is to put out W y, y its inputs in the full-precision model, where quantized
layers before it make x of them. With E = Q - W the error over rows that took no part in the fit is

    1/n sum |Q x - W y|^2  =  1/2 (tr(E H E^T) - 2 tr(E D W^T)) + what does not depend on Q

H = 2/n X^T X, D = 2/n X^T (Y - X) of those rows. A Hessian of few rows, or of rows that resemble
each other, fits them too closely: of 128 pooled images for the 1280 columns of EfficientNet-Lite0's
last layer, the error on other images is 100 times that on these.

Damping is the shrinkage of Ledoit and Wolf (2004), (1 - r) H + r mean(diag H) I, r = d / (1 + d),
but for a factor that no code depends on. Shrinkage to the diagonal of H was tried beside it: with
the best of both for each layer, on the held-out rows themselves, errors of all-MiniLM-L6-v2 were
.2 % below those with the best damping, and .4 % in EfficientNet-Lite0, at 4 bits
(`python -m benchmarks.accuracy.layers --regularize`).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .hessian import drifted, revive
from .ops import Backend, Precision
from .solver import solve
from .spec import QuantSpec

DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0)
ROWS = 128  # of the weight that are tried


@dataclass(frozen=True)
class Moments:
    """Of some rows: hessian and drift [B, C, C], see `HessianSum`; without drift y is x."""

    hessian: Tensor
    drift: Tensor | None


class Trust(NamedTuple):
    """damp: of the solve. ridge, fraction: the arguments of `drifted`."""

    damp: float
    ridge: float
    fraction: float


def excess(weight: Tensor, quantized: Tensor, rows: Moments) -> float:
    """tr(E H E^T) - 2 tr(E D W^T), E = Q - W: [B, R, C] twice. Smaller is better; 0 for Q = W."""
    e = (quantized - weight).to(rows.hessian.dtype)
    value = ((e @ rows.hessian) * e).sum(dtype=torch.float64)
    if rows.drift is not None:
        value -= 2 * ((e @ rows.drift) * weight.to(e)).sum(dtype=torch.float64)
    return float(value)


def choose(
    weight: Tensor,
    fit: Moments,
    held_out: Moments,
    spec: QuantSpec,
    *,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
) -> Trust:
    """The damping, of DAMPS, of least error on rows that `fit` has not, and the drift correction.

    The ridge and the fraction of the drift correction come first, for the weight before it is
    rounded: for each ridge the best fraction is known, as the error is quadratic in it. Then the
    damping, by solves in activation order of up to ROWS rows. Of equal ones the larger damping.

    weight [B, R, C]; fraction 0 where there is no drift.
    """
    w = weight[:, :: -(-weight.shape[1] // ROWS)].float()
    aim, ridge, fraction = w, DAMPS[0], 0.0
    if fit.drift is not None and held_out.drift is not None:
        least = 0.0
        for damp in reversed(DAMPS):
            step = drifted(w, fit.hessian, fit.drift, damp) - w
            square = excess(torch.zeros_like(w), step, replace(held_out, drift=None))
            linear = (square - excess(w, w + step, held_out)) / 2
            best = min(max(linear / square, 0.0), 1.0) if square > 0 else 0.0
            error = best * best * square - 2 * best * linear
            if error < least:
                least, ridge, fraction, aim = error, damp, best, w + best * step
    plain = replace(spec, sparsity=None)
    hessian, _ = revive(fit.hessian)

    def error_at(damp: float) -> float:
        result = solve(
            aim, hessian, plain, order="activation", damp=damp, precision=precision,
            measure=False, backend=backend,
        )  # fmt: skip
        return excess(w, result.dequantize(), held_out)

    damp = min(reversed(DAMPS), key=error_at)
    return Trust(damp, ridge, fraction)
