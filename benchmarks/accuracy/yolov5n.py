"""YOLOv5n and COCO images: what quantization does to its mAP.

--weights: Ultralytics' ONNX export with folded BatchNorm (AGPL-3.0, not shipped here). --images: a
zip of COCO images with labels in YOLO format, see `coco.read_archive`. Each seed shuffles the
images: the first `--calibration` calibrate, the next 8 are for layer errors, the rest evaluates.
All convolutions are quantized, those of the detection head included. mAP50-95 and mAP50 are the
changes to fp32 on the same images; output: relative squared change of objectness and class scores.
"""

import argparse
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.coco import SIDE, Detections, Example, Score, evaluate, nms, read_archive
from sapq_triton.models.yolov5 import load_yolov5_onnx

BATCH = 8
PROBE = 8  # images for layer errors


class Split(NamedTuple):
    """Places of the images that calibrate and that evaluate."""

    calibration: list[int]
    evaluation: list[int]

    @classmethod
    def of(cls, count: int, calibration: int, seed: int) -> "Split":
        shuffled = np.random.default_rng(seed).permutation(count).tolist()
        return cls(sorted(shuffled[:calibration]), sorted(shuffled[calibration:]))


def batches(examples: Sequence[Example]) -> list[Tensor]:
    """float32 [up to BATCH, 3, SIDE, SIDE] in [0, 1]"""
    return [
        torch.stack([example.pixels for example in examples[start : start + BATCH]]).float() / 255
        for start in range(0, len(examples), BATCH)
    ]


@torch.inference_mode()
def detect(model: nn.Module, examples: Sequence[Example]) -> list[Detections]:
    """What the model finds, in pixels of the original images."""
    device = next(model.parameters()).device
    found = []
    for batch in batches(examples):
        found += [nms(image) for image in model(batch.to(device))]
    return [
        one._replace(boxes=example.placement.undo(one.boxes))
        for one, example in zip(found, examples, strict=True)
    ]


class Study:
    loss = "output"
    group_size = -1
    grid = "asymmetric"

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = load_yolov5_onnx(options.weights)
        self.examples = read_archive(options.images, None)
        self.count = options.calibration
        self.setup = {"calibration images": self.count, "images": len(self.examples)}
        self.title = (
            f"YOLOv5n (BatchNorm folded), {self.count} of {len(self.examples)} COCO images of "
            f"{SIDE} x {SIDE} calibrate, {PROBE} others are for layer errors, the rest evaluates; "
            "changes to fp32"
        )
        self.options: dict[str, Any] = {}

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--weights", type=Path, required=True)
        parser.add_argument("--images", type=Path, required=True)
        parser.add_argument("--calibration", type=int, default=32)

    def _part(self, seed: int, start: int, end: int | None) -> list[Example]:
        order = np.random.default_rng(seed).permutation(len(self.examples)).tolist()
        return [self.examples[i] for i in sorted(order[start:end])]

    def calibration(self, seed: int) -> list[Tensor]:
        return batches(self._part(seed, 0, self.count))

    def probe(self, seed: int) -> list[Tensor]:
        return batches(self._part(seed, self.count, self.count + PROBE))

    def run(self, model: nn.Module, batch: Tensor) -> object:
        return model(batch)

    @cached_property
    def _original(self) -> dict[int, Score]:
        return {}

    def score(self, model: nn.Module, seed: int) -> dict[str, float]:
        held_out = self._part(seed, self.count + PROBE, None)
        truth = [example.objects for example in held_out]
        if seed not in self._original:
            self._original[seed] = evaluate(detect(self.model, held_out), truth)
        before, after = self._original[seed], evaluate(detect(model, held_out), truth)
        with torch.inference_mode():
            outputs = [(self.model(x)[..., 4:], model(x)[..., 4:]) for x in self.probe(seed)]
        change = sum(float((q - y).square().sum()) for y, q in outputs)
        return {
            "mAP50-95": after.map50_95 - before.map50_95,
            "mAP50": after.map50 - before.map50,
            "fp32 mAP50-95": before.map50_95,
            "output": change / sum(float(y.square().sum()) for y, _ in outputs),
        }
