"""Pack weights and images for a machine that has neither network nor image library.

    python -m benchmarks.carry --images IMAGES.zip --out DIR
    python -m benchmarks.carry --yolov5n YOLOV5N.onnx --coco COCO.zip --out DIR
    python -m benchmarks.gate --carried DIR

Plain NumPy archives, two for each network: its weights, and images, shuffled, some to calibrate on
and some to evaluate. EfficientNet-Lite0 comes from its package, its images from `--images`, see
`benchmarks.accuracy.lite0`; weights and images of YOLOv5n as in `benchmarks.accuracy.yolov5n`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.accuracy.coco import Example, Objects, Placement, read_archive
from benchmarks.accuracy.lite0 import read_images
from benchmarks.accuracy.yolov5n import Split
from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0
from sapq_triton.models.yolov5 import load_yolov5_onnx

Arrays = dict[str, NDArray[Any]]  # about images, which the first dimension counts


class Carried(NamedTuple):
    state: dict[str, Tensor]
    calibration: Arrays
    evaluation: Arrays


def pack(
    folder: Path, name: str, state: Mapping[str, Tensor], images: Arrays, calibration: int,
    seed: int = 1,
) -> None:  # fmt: skip
    """images: pixels uint8 [N, 3, side, side] and what they show, of which `calibration` are split
    off"""
    count = len(images["pixels"])
    if not 0 < calibration < count:
        raise ValueError(f"{calibration} of {count} images cannot calibrate")
    folder.mkdir(parents=True, exist_ok=True)
    # half precision widened to float32, as YOLOv5n comes, halves again
    arrays: dict[str, Any] = {key: value.numpy() for key, value in state.items()}
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    # neighbours are alike: their differences, modulo 256, compress far better
    images = images | {"pixels": np.diff(images["pixels"], axis=-1, prepend=np.uint8(0))}
    parts = Split.of(count, calibration, seed)._asdict()
    arrays = {f"{part}.{key}": images[key][parts[part]] for part in parts for key in images}
    np.savez_compressed(folder / f"{name}-images.npz", **arrays)


def read(folder: Path, name: str) -> Carried | None:
    """None where the folder does not hold it."""
    weights, images = folder / f"{name}.npz", folder / f"{name}-images.npz"
    if not (weights.exists() and images.exists()):
        return None
    with np.load(weights) as found:
        state = {key: torch.from_numpy(found[key]) for key in found.files}
    parts: dict[str, Arrays] = {part: {} for part in Split._fields}
    with np.load(images) as found:
        for entry in found.files:
            part, key = entry.split(".")
            parts[part][key] = found[entry]
    for part in parts.values():
        part["pixels"] = part["pixels"].cumsum(axis=-1, dtype=np.uint8)
    return Carried(state, **parts)


# --- images with boxes ----------------------------------------------------------------------------


def to_arrays(examples: Sequence[Example]) -> Arrays:
    """name, pixels, placement float64 [N, 5], objects float64 [N, most, 5]: class and corners, with
    rows of -1 after the last one"""
    objects = np.full((len(examples), max(len(e.objects.classes) for e in examples), 5), -1.0)
    for rows, (boxes, classes) in zip(objects, (e.objects for e in examples), strict=True):
        rows[: len(classes)] = np.column_stack((classes, boxes))
    return {
        "name": np.array([example.name for example in examples]),
        "pixels": np.stack([example.pixels.numpy() for example in examples]),
        "placement": np.array([example.placement for example in examples], dtype=np.float64),
        "objects": objects,
    }


def to_examples(images: Arrays) -> list[Example]:
    """What `to_arrays` was given."""
    examples = []
    columns = (images[key] for key in ("name", "pixels", "placement", "objects"))
    for name, pixels, (scale, *edges), rows in zip(*columns, strict=True):
        classes, boxes = np.split(rows[rows[:, 0] >= 0], [1], axis=1)
        placement = Placement(float(scale), *map(int, edges))
        shown = Objects(boxes, classes[:, 0].astype(np.int64))
        examples.append(Example(str(name), torch.from_numpy(pixels), placement, shown))
    return examples


# --- command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.carry", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    lite0 = parser.add_argument_group("EfficientNet-Lite0")
    lite0.add_argument("--images", type=Path, help="zip of ImageNet images")
    lite0.add_argument("--calibration", type=int, default=64, help="images that calibrate (64)")
    lite0.add_argument("--evaluation", type=int, default=128, help="that evaluate (128)")
    yolo = parser.add_argument_group("YOLOv5n")
    yolo.add_argument("--yolov5n", type=Path, help="ONNX export")
    yolo.add_argument("--coco", type=Path, help="zip of images and labels")
    yolo.add_argument("--coco-calibration", type=int, default=8, help="images that calibrate (8)")
    yolo.add_argument("--coco-evaluation", type=int, default=16, help="that evaluate (16)")
    options = parser.parse_args(arguments)
    if not (options.images or options.yolov5n) or bool(options.yolov5n) != bool(options.coco):
        parser.error("nothing to pack: it takes --images, or --yolov5n with --coco, or all three")

    if options.images:
        pixels, labels = read_images(options.images)
        count = min(options.calibration + options.evaluation, len(labels))
        spread = torch.linspace(0, len(labels) - 1, count).long()  # over the classes
        images = {"pixels": pixels[spread].numpy(), "labels": labels[spread].numpy()}
        state = load_efficientnet_lite0().state_dict()
        pack(options.out, "lite0", state, images, options.calibration)
    if options.yolov5n:
        examples = read_archive(options.coco, options.coco_calibration + options.coco_evaluation)
        state = load_yolov5_onnx(options.yolov5n).state_dict()
        pack(options.out, "yolov5n", state, to_arrays(examples), options.coco_calibration)
    for file in sorted(options.out.glob("*.npz")):
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
