"""EfficientNet-Lite0 and ImageNet images: what quantization does to its top-1.

--images: a zip of `CCC_*.jpg`, CCC the class index, at least 256 pixels square. Each seed shuffles
the images: the first `--calibration` calibrate, the next 64 are for layer errors, the rest
evaluates. top-1 is the change to fp32 in points, with the standard error of that paired difference;
kl is KL(fp32 | quantized) per image, agreement the share of images with the same top-1 as fp32.
"""

import argparse
import io
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

BATCH = 32
PROBE = 64  # images for layer errors


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Centre crops uint8 [N, 3, 224, 224] and class indices int64 [N]."""
    from PIL import Image  # all else works without

    pixels, labels = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            pixels.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
            labels.append(int(Path(name).name[:3]))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


@torch.inference_mode()
def log_probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    """[N, classes]"""
    return torch.cat([model(preprocess(part)).log_softmax(1) for part in pixels.split(BATCH)])


@torch.inference_mode()
def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    """Predicted classes int64 [N], on the CPU whatever the device of the model"""
    device = next(model.parameters()).device
    batches = (preprocess(part).to(device) for part in pixels.split(BATCH))
    return torch.cat([model(batch).argmax(1).cpu() for batch in batches])


class Study:
    loss = "kl"
    group_size = -1
    grid = "asymmetric"

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = load_efficientnet_lite0()
        self.pixels, self.labels = read_images(options.images)
        self.count = options.calibration
        self.setup = {"calibration images": self.count, "images": len(self.labels)}
        self.title = (
            f"EfficientNet-Lite0, {self.count} of {len(self.labels)} ImageNet images calibrate, "
            f"{PROBE} others are for layer errors, the rest evaluates; paired BatchNorm correction"
        )
        self.options: dict[str, Any] = {}

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=Path, required=True)
        parser.add_argument("--calibration", type=int, default=128)

    @cached_property
    def _original(self) -> Tensor:
        return log_probabilities(self.model, self.pixels)

    def _part(self, seed: int, start: int, end: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.labels), generator=generator)[start:end]

    def calibration(self, seed: int) -> list[Tensor]:
        chosen = self.pixels[self._part(seed, 0, self.count)]
        return [preprocess(part) for part in chosen.split(BATCH)]

    def probe(self, seed: int) -> list[Tensor]:
        chosen = self.pixels[self._part(seed, self.count, self.count + PROBE)]
        return [preprocess(part) for part in chosen.split(BATCH)]

    def run(self, model: nn.Module, batch: Tensor) -> object:
        return model(batch)

    def score(self, model: nn.Module, seed: int) -> dict[str, float]:
        chosen = self._part(seed, self.count + PROBE, None)
        before, labels = self._original[chosen], self.labels[chosen]
        after = log_probabilities(model, self.pixels[chosen])
        right, was = (p.argmax(1) == labels for p in (after, before))
        change = 100 * (right.double() - was.double())
        return {
            "top-1": change.mean().item(),
            "standard error": (change.std() / len(change) ** 0.5).item(),
            "agreement": 100 * (after.argmax(1) == before.argmax(1)).double().mean().item(),
            "kl": (before.exp() * (before - after)).sum(1).mean().item(),
        }
