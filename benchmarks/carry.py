"""Pack weights and images for a machine that has neither network nor image library.

    python -m benchmarks.carry --images IMAGES.zip --out DIR
    python -m benchmarks.gate --carried DIR

Plain NumPy archives: the weights of EfficientNet-Lite0, as its package ships them, and images of
IMAGES.zip (see `benchmarks.accuracy.lite0`), shuffled, some to calibrate on and some to evaluate.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sapq_triton.models.efficientnet_lite import EfficientNetLite0, preprocess

# name -> the network for images of this side
CARRIED: dict[str, Callable[[int], nn.Module]] = {
    "lite0": lambda side: EfficientNetLite0(image_size=side)
}


class Carried(NamedTuple):
    """Images are inputs of the network, float32."""

    state: dict[str, Tensor]
    calibration: Tensor
    evaluation: Tensor
    labels: Tensor  # of the evaluation, int64


def pack(
    folder: Path, name: str, state: dict[str, Tensor], pixels: Tensor, labels: Tensor,
    calibration: int, seed: int = 1,
) -> None:  # fmt: skip
    """pixels uint8 [N, 3, side, side], labels int64 [N], of which `calibration` are split off"""
    if not 0 < calibration < len(labels):
        raise ValueError(f"{calibration} of {len(labels)} images cannot calibrate")
    folder.mkdir(parents=True, exist_ok=True)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen, others = shuffled[:calibration], shuffled[calibration:]
    np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})
    np.savez_compressed(
        folder / f"{name}-images.npz",
        calibration=pixels[chosen].numpy(),
        evaluation=pixels[others].numpy(),
        labels=labels[others].numpy(),
    )


def read(folder: Path, name: str) -> Carried | None:
    """None where the folder does not hold it."""
    weights, images = folder / f"{name}.npz", folder / f"{name}-images.npz"
    if not (weights.exists() and images.exists()):
        return None
    with np.load(weights) as found:
        state = {key: torch.from_numpy(found[key]) for key in found.files}
    with np.load(images) as found:
        calibration, evaluation, labels = (
            torch.from_numpy(found[key]) for key in ("calibration", "evaluation", "labels")
        )
    return Carried(state, preprocess(calibration), preprocess(evaluation), labels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.carry", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=64, help="images that calibrate (64)")
    parser.add_argument("--evaluation", type=int, default=128, help="that evaluate (128)")
    options = parser.parse_args(arguments)

    # these need packages that the other machine lacks
    from benchmarks.accuracy.lite0 import read_images
    from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0

    pixels, labels = read_images(options.images)
    count = options.calibration + options.evaluation
    spread = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    state = load_efficientnet_lite0().state_dict()
    pack(options.out, "lite0", state, pixels[spread], labels[spread], options.calibration)
    packed = sum(file.stat().st_size for file in options.out.glob("lite0*.npz"))
    print(f"{options.out}: {len(spread)} images, {packed / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
