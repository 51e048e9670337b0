"""Images with boxes, non-maximum suppression, and the mean average precision of COCO.

The rules of pycocotools, for boxes of all sizes and without crowd regions, which labels in YOLO
format do not carry. Boxes are corners x0, y0, x1, y1 in pixels, unless they say otherwise.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SIDE, GREY = 640, 114  # of the square that YOLOv5 was trained on, and of its borders
MIN_SCORE, MAX_OVERLAP, MAX_DETECTIONS = 0.001, 0.6, 300  # as Ultralytics evaluates
MAX_CANDIDATES = 3000  # boxes that enter the suppression, best first
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


class Objects(NamedTuple):
    """What an image shows: boxes [N, 4] and classes [N]."""

    boxes: Floats
    classes: Integers


class Detections(NamedTuple):
    """What a model found in an image, best first: boxes [N, 4], scores [N], classes [N]."""

    boxes: Floats
    scores: Floats
    classes: Integers


class Placement(NamedTuple):
    """Where an image of `width` x `height` lies in the square, and by how much it was scaled."""

    scale: float
    left: int
    top: int
    width: int
    height: int

    def undo(self, boxes: Floats) -> Floats:
        """From pixels of the square to pixels of the image, cut off at its edges."""
        moved = (boxes - np.tile([self.left, self.top], 2)) / self.scale
        return moved.clip(0, np.tile([self.width, self.height], 2))


class Example(NamedTuple):
    """An image: uint8 [3, SIDE, SIDE], how it got there, and its objects in original pixels."""

    name: str
    pixels: Tensor
    placement: Placement
    objects: Objects


class Score(NamedTuple):
    """Mean over classes of the average precision, at IoU 0.5 and averaged over 0.5 to 0.95."""

    map50: float
    map50_95: float


# --- images ---------------------------------------------------------------------------------------


def read_archive(path: str | Path, limit: int | None = None) -> list[Example]:
    """The first `limit` images of a zip with images/NAME.jpg and labels/NAME.txt, by name.

    A line of a label file is class, centre x, centre y, width, height, the last four relative to
    the size of the image. An image without a label file shows no object.
    """
    from PIL import Image  # all else works without

    with zipfile.ZipFile(path) as archive:
        entries = {PurePosixPath(name) for name in archive.namelist()}
        images = sorted(name for name in entries if name.suffix == ".jpg")
        labels = {name.stem: str(name) for name in entries if name.suffix == ".txt"}
        if not images:
            raise ValueError(f"{path} holds no .jpg file")
        if orphans := sorted(labels.keys() - {image.stem for image in images}):
            raise ValueError(f"{path} has labels without an image: {', '.join(orphans)}")
        examples = []
        for image in images[:limit]:
            with Image.open(io.BytesIO(archive.read(str(image)))) as opened:
                pixels, placement = letterbox(opened.convert("RGB"))
            text = archive.read(labels[image.stem]).decode() if image.stem in labels else ""
            objects = read_labels(text, placement.width, placement.height)
            examples.append(Example(image.stem, pixels, placement, objects))
    return examples


def read_labels(text: str, width: int, height: int) -> Objects:
    """The objects of an image of this size, from its label file."""
    rows = [[float(field) for field in line.split()] for line in text.splitlines() if line.strip()]
    if any(len(row) != 5 for row in rows):
        raise ValueError(f"a label needs 5 numbers in each line, got {text!r}")
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    boxes = corners(table[:, 1:]) * np.tile([width, height], 2)
    return Objects(boxes, table[:, 0].astype(np.int64))


def letterbox(image: "Image.Image", side: int = SIDE) -> tuple[Tensor, Placement]:
    """Scale an image until it just fits a square, centred on grey: uint8 [3, side, side]."""
    from PIL.Image import Resampling

    scale = min(side / image.width, side / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    # of an odd border the smaller half lies left or on top, as in training
    left, top = (side - width) // 2, (side - height) // 2
    square = np.full((side, side, 3), GREY, dtype=np.uint8)
    resized = image.resize((width, height), Resampling.BILINEAR)
    square[top : top + height, left : left + width] = np.asarray(resized)
    pixels = torch.from_numpy(square).permute(2, 0, 1).contiguous()
    return pixels, Placement(scale, left, top, image.width, image.height)


# --- boxes ----------------------------------------------------------------------------------------


def corners(boxes: Floats) -> Floats:
    """[N, 4] centre x, centre y, width, height  ->  [N, 4] x0, y0, x1, y1"""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def overlaps(a: Floats, b: Floats) -> Floats:
    """Intersection over union of each pair, 0 where both are empty: [N, 4], [M, 4]  ->  [N, M]"""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def nms(predictions: Tensor) -> Detections:
    """Non-maximum suppression within each class.

    predictions: [boxes, 5 + classes] of one image: centre x, centre y, width, height, objectness,
    class scores. A box counts once for each class whose score, times objectness, is high enough.
    """
    likely = predictions[predictions[:, 4] > MIN_SCORE]
    scores = likely[:, 5:] * likely[:, 4:5]
    row, column = (scores > MIN_SCORE).nonzero(as_tuple=True)
    found, ranked = scores[row, column].sort(descending=True, stable=True)
    ranked = ranked[:MAX_CANDIDATES]
    boxes = corners(likely[row[ranked], :4].double().cpu().numpy())
    classes = column[ranked].cpu().numpy()
    alive = np.ones(len(boxes), dtype=bool)
    kept: list[int] = []
    for i in range(len(boxes)):
        if alive[i]:
            kept.append(i)
            if len(kept) == MAX_DETECTIONS:
                break
            hidden = overlaps(boxes[i : i + 1], boxes[i + 1 :])[0] > MAX_OVERLAP
            alive[i + 1 :] &= ~(hidden & (classes[i + 1 :] == classes[i]))
    return Detections(boxes[kept], found.double().cpu().numpy()[kept], classes[kept])


# --- score ----------------------------------------------------------------------------------------


def matches(detections: Detections, objects: Objects) -> NDArray[np.bool_]:
    """Whether each detection finds an object, by IoU threshold: [detections, thresholds].

    Best first, each takes the object of its class that it overlaps most, of those still free: a
    second detection of the same object is wrong.
    """
    overlap = overlaps(objects.boxes, detections.boxes)
    overlap[objects.classes[:, None] != detections.classes] = 0
    hits = np.zeros((len(detections.scores), len(IOU_THRESHOLDS)), dtype=bool)
    if len(objects.classes) == 0:
        return hits
    for t, threshold in enumerate(IOU_THRESHOLDS):
        free = overlap.copy()
        for d in np.flatnonzero(overlap.max(axis=0) >= threshold):
            taken = free[:, d].argmax()
            if free[taken, d] >= threshold:
                hits[d, t] = True
                free[taken] = 0
    return hits


def average_precision(hits: NDArray[np.bool_], count: int) -> Floats:
    """Mean precision at 101 recalls, where precision is the best at that recall or a higher one.

    hits: [detections, thresholds], best first; count: of the objects to be found  ->  [thresholds]
    """
    correct = hits.cumsum(axis=0)
    recall = correct / count
    precision = correct / np.arange(1, len(hits) + 1)[:, None]
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    best = np.concatenate((best, np.zeros((1, hits.shape[1]))))  # a recall that is never reached
    at = [np.searchsorted(column, RECALLS) for column in recall.T]
    return np.take_along_axis(best, np.stack(at, axis=1), axis=0).mean(axis=0)


def evaluate(detections: Sequence[Detections], objects: Sequence[Objects]) -> Score:
    """Score of a model on a set of images: what it found and what there is, image by image."""
    if not any(len(shown.classes) for shown in objects):
        raise ValueError(f"no object in any of {len(objects)} images: nothing to score")
    pairs = zip(detections, objects, strict=True)
    hits = np.concatenate([matches(found, shown) for found, shown in pairs])
    scores, found_classes = (
        np.concatenate([getattr(found, name) for found in detections])
        for name in ("scores", "classes")
    )
    best_first = np.argsort(-scores, kind="stable")
    hits, found_classes = hits[best_first], found_classes[best_first]
    # classes that no image shows have no recall and do not count
    classes, counts = np.unique(np.concatenate([o.classes for o in objects]), return_counts=True)
    precisions = np.stack(
        [
            average_precision(hits[found_classes == label], count)
            for label, count in zip(classes, counts, strict=True)
        ]
    )
    return Score(float(precisions[:, 0].mean()), float(precisions.mean()))
