"""Quantize YOLOv5n with every method and measure what is left of its mAP on COCO images.

    python -m benchmarks.accuracy.yolov5n --weights yolov5n.onnx \\
        --images coco_val2017_first128.zip --bits 4 --json w4.json

--weights: Ultralytics' ONNX export with folded BatchNorm (AGPL-3.0, not shipped here). --images: a
zip of COCO images with labels in YOLO format, see `coco.read_archive`. Each seed shuffles the
images: the first `--calibration` of them calibrate, all others evaluate, fp32 on the same images
beside it. All convolutions are quantized, those of the detection head included, per output channel
on a grid of least squared error, with bias correction.

With --json every cell (bits, grid, order, seed) is written to the file as soon as it is measured,
and a cell that the file already holds is not measured again: an interrupted run goes on where it
stopped, and several bit widths may share a file.
"""

import argparse
import copy
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.coco import SIDE, Detections, Example, Score, evaluate, nms, read_archive
from benchmarks.accuracy.methods import METHODS
from benchmarks.measure import environment, markdown
from sapq_triton import QuantSpec, Report, quantize
from sapq_triton.models.yolov5 import load_yolov5_onnx
from sapq_triton.spec import Order

GRIDS = {"asymmetric": False, "symmetric": True}
NAMES: dict[str, str] = {order: name for name, order in METHODS.items()}
DAMP, BATCH = 0.01, 8


class Key(NamedTuple):
    """What is measured; seed None: on all images."""

    bits: int
    grid: str
    order: str
    seed: int | None

    @classmethod
    def fp32(cls, seed: int | None) -> "Key":
        return cls(32, "none", "fp32", seed)


@dataclass(frozen=True)
class Cell:
    """One model on the evaluation images of one seed.

    layer_error: mean over the layers of tr((W - Q) H (W - Q)^T) / tr(W H W^T) on calibration rows.
    seconds: of `quantize` as a whole. deviations: whatever was not done as asked.
    """

    bits: int
    grid: str
    order: str
    seed: int | None
    map50: float
    map50_95: float
    images: int
    environment: dict[str, Any]
    calibration_images: str = ""
    layer_error: float | None = None
    seconds: float | None = None
    layers: int = 0
    deviations: list[str] = field(default_factory=list)
    layer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return Key(self.bits, self.grid, self.order, self.seed)


class Results:
    """Cells by key, and the JSON file, if any, that holds them."""

    def __init__(self, path: Path | None, setup: dict[str, Any]) -> None:
        self.path, self.setup = path, setup
        self.cells: dict[Key, Cell] = {}
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
            if stored["setup"] != setup:
                other = {k: v for k, v in stored["setup"].items() if v != setup.get(k)}
                raise ValueError(f"{path} was measured with {other}: name another file")
            cells = [Cell(**cell) for cell in stored["cells"]]
            self.cells = {cell.key: cell for cell in cells}
            commits = sorted({cell.environment["commit"] for cell in cells})
            print(f"{path}: {len(cells)} cells of {', '.join(commits)} are kept", file=sys.stderr)

    def add(self, cell: Cell) -> None:
        self.cells[cell.key] = cell
        if self.path is not None:
            cells = [asdict(cell) for cell in self.cells.values()]
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps({"setup": self.setup, "cells": cells}, indent=1) + "\n")
            os.replace(partial, self.path)  # an interruption leaves the old file whole


class Split(NamedTuple):
    """Places of the images that calibrate and that evaluate."""

    calibration: list[int]
    evaluation: list[int]

    @classmethod
    def of(cls, count: int, calibration: int, seed: int) -> "Split":
        shuffled = np.random.default_rng(seed).permutation(count).tolist()
        return cls(sorted(shuffled[:calibration]), sorted(shuffled[calibration:]))


# --- measurement ----------------------------------------------------------------------------------


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


def deviations(report: Report) -> list[str]:
    """Whatever was not done as asked."""
    lines = [f"{name}: left as it was, {reason}" for name, reason in report.skipped.items()]
    for layer in report.layers:
        notes = list(layer.notes)
        if layer.dead_columns:
            notes.append(f"{layer.dead_columns} columns never fired, rounded to nearest")
        if layer.fallbacks:
            notes.append("not solvable, rounded to nearest")
        if layer.damp > DAMP:
            notes.append(f"damping {layer.damp:g}")
        lines += [f"{layer.name}: {note}" for note in notes]
    return lines


class Bench:
    """The model, the images, and how to measure a cell."""

    def __init__(
        self, model: nn.Module, examples: Sequence[Example], calibration: int, commit: str | None
    ) -> None:
        self.model, self.examples, self.calibration = model, examples, calibration
        self.environment = environment(next(model.parameters()).device, of=commit)

    @cached_property
    def fp32_detections(self) -> list[Detections]:
        """On all images: the seeds share them."""
        return detect(self.model, self.examples)

    def measure(self, key: Key) -> Cell:
        everything = list(range(len(self.examples)))
        split = Split([], everything) if key.seed is None else self.split(key.seed)
        held_out = [self.examples[i] for i in split.evaluation]
        shared: dict[str, Any] = key._asdict() | {
            "images": len(held_out),
            "environment": self.environment,
            "calibration_images": " ".join(self.examples[i].name for i in split.calibration),
        }
        if key == Key.fp32(key.seed):
            found = [self.fp32_detections[i] for i in split.evaluation]
            return Cell(**shared, **self.score(found, held_out)._asdict())
        model = copy.deepcopy(self.model)
        spec = QuantSpec(key.bits, symmetric=GRIDS[key.grid], scale_search="mse")
        inputs = batches([self.examples[i] for i in split.calibration])
        report = quantize(model, inputs, spec, order=key.order, damp=DAMP, progress=False)
        return Cell(
            **shared,
            **self.score(detect(model, held_out), held_out)._asdict(),
            layer_error=report.relative_error,
            seconds=report.seconds,
            layers=len(report.layers),
            deviations=deviations(report),
            layer_errors={layer.name: layer.relative_error for layer in report.layers},
        )

    def split(self, seed: int) -> Split:
        return Split.of(len(self.examples), self.calibration, seed)

    @staticmethod
    def score(found: Sequence[Detections], examples: Sequence[Example]) -> Score:
        return evaluate(found, [example.objects for example in examples])


# --- table ----------------------------------------------------------------------------------------

HEADER = ("grid", "method", "mAP50", "mAP50-95", "mAP50-95 − fp32", "layer error", "seconds")


def spread(values: Sequence[float], digits: str, sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone where there is one value."""
    text = f"{mean(values):{sign}{digits}}"
    return f"{text} ± {stdev(values):{digits}}" if len(values) > 1 else text


def row(results: Results, keys: Sequence[Key]) -> tuple[str, ...]:
    """One line of the table: the same method with every seed."""
    cells = [results.cells[key] for key in keys]
    first = cells[0]
    maps = [spread([getattr(cell, name) for cell in cells], ".3f") for name in Score._fields]
    if first.layer_error is None:
        return ("", "fp32", *maps, "", "", "")
    lost = [cell.map50_95 - results.cells[Key.fp32(cell.seed)].map50_95 for cell in cells]
    return (
        first.grid,
        NAMES.get(first.order, first.order),
        *maps,
        spread(lost, ".3f", "+"),
        spread([cell.layer_error or 0.0 for cell in cells], ".2e"),
        spread([cell.seconds or 0.0 for cell in cells], ".0f"),
    )


def table(results: Results, rows: Sequence[Sequence[Key]], images: str) -> str:
    """Markdown that says what was measured, on what, and how far to trust it."""
    seeds = [key.seed for key in rows[0]]
    cells = [results.cells[key] for keys in rows for key in keys]
    quantized = [cell for cell in cells if cell.layers]
    whole, first, setup = results.cells[Key.fp32(None)], cells[0], results.setup
    line = "{device}, threads: {threads}, torch {torch}, commit {commit}"
    where = sorted({line.format(**cell.environment) for cell in cells})
    text = [
        f"YOLOv5n, {' and '.join(sorted({f'W{cell.bits}' for cell in quantized})) or 'fp32 only'}, "
        "per output channel, MSE grid, bias correction; BatchNorm is folded. "
        f"Data: {images}, {whole.images} images; fp32 on all of them: mAP50 {whole.map50:.3f}, "
        f"mAP50-95 {whole.map50_95:.3f}. "
        f"Each seed ({', '.join(map(str, seeds))}) shuffles the images: {setup['calibration']} "
        f"calibrate, the other {first.images} evaluate, and fp32 is measured on the same ones. "
        "Layer error: mean over layers of tr((W−Q)H(W−Q)ᵀ) / tr(WHWᵀ) on calibration inputs. "
        f"Seconds: all of `quantize`. {'; '.join(where)}.",
        "",
        markdown(HEADER, [row(results, keys) for keys in rows]),
        "",
    ]
    if len(seeds) > 1:
        text.append(
            "Noise: ± is the sample standard deviation over the seeds. In the mAP columns it holds "
            "that of the evaluation images, which differ by seed; the difference from fp32 is "
            "taken on the same images. Evaluation sets of different seeds overlap: the spread is "
            "a lower bound of what new images would show."
        )
    else:
        text.append("Noise: not measured, there is one seed.")
    if quantized:
        layers = sorted({cell.layers for cell in quantized})
        text.append(f"Quantized convolutions in each model: {', '.join(map(str, layers))}.")
        noted = [
            f"- {cell.grid}, {NAMES.get(cell.order, cell.order)}, seed {cell.seed}: {note}"
            for cell in quantized
            for note in cell.deviations
        ]
        text += ["", "Not as asked:", *noted] if noted else ["Every layer was done as asked."]
    return "\n".join(text)


# --- command line ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="benchmarks.accuracy.yolov5n", description=__doc__.split("\n")[0]
    )
    made.add_argument("--weights", type=Path, required=True, help="ONNX export of YOLOv5n")
    made.add_argument("--images", type=Path, required=True, help="zip of images and labels")
    made.add_argument("--bits", type=int, default=4, help="of the weights (4)")
    made.add_argument("--calibration", type=int, default=32, help="images that calibrate (32)")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="1 2 3")
    made.add_argument(
        "--order", nargs="*", choices=get_args(Order), default=list(METHODS.values()),
        help="rows of the table; nothing after it: fp32 only",
    )  # fmt: skip
    made.add_argument("--grid", nargs="+", choices=GRIDS, default=list(GRIDS), help="both")
    made.add_argument("--json", type=Path, help="keep the cells here, and go on from what it holds")
    made.add_argument("--limit", type=int, help="use the first images only: to try the script")
    made.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    made.add_argument("--commit", help="where there is no git to ask")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    examples = read_archive(options.images, options.limit)
    if not 0 < options.calibration < len(examples):
        command.error(
            f"--calibration {options.calibration} of {len(examples)} images: "
            "some must calibrate and some evaluate"
        )
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (options.weights, options.images)
    ]
    setup = {
        "weights_sha256": digests[0],
        "images_sha256": digests[1],
        "limit": options.limit,
        "calibration": options.calibration,
        "batch": BATCH,
        "side": SIDE,
        "damp": DAMP,
        "group_size": -1,
        "scale_search": "mse",
        "bias_correction": True,
    }
    try:
        results = Results(options.json, setup)
    except ValueError as error:
        command.error(str(error))
    bench = Bench(
        load_yolov5_onnx(options.weights).to(device), examples, options.calibration, options.commit
    )
    seeds = list(dict.fromkeys(options.seeds))
    methods = list(product(options.grid, dict.fromkeys(options.order)))
    rows = [[Key.fp32(seed) for seed in seeds]]
    rows += [[Key(options.bits, *method, seed) for seed in seeds] for method in methods]
    # seed by seed: after an interruption the finished seeds make a table
    for key in [Key.fp32(None), *(key for keys in zip(*rows, strict=True) for key in keys)]:
        if key in results.cells:
            continue
        started = time.perf_counter()
        results.add(bench.measure(key))
        cell = results.cells[key]
        print(
            f"{key}: mAP50 {cell.map50:.3f}, mAP50-95 {cell.map50_95:.3f}, "
            f"{time.perf_counter() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    print(table(results, rows, options.images.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
