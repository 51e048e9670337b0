"""What makes the model better: every method and option on one model, layer errors beside its loss.

    python -m benchmarks.accuracy.study lite0 --images IMAGES.zip
    python -m benchmarks.accuracy.study yolov5n --weights yolov5n.onnx --images COCO.zip
    python -m benchmarks.accuracy.study smollm2 --wikitext wiki.test.raw
    python -m benchmarks.accuracy.study minilm

A cell is one quantized model: bits, columns per group, grid, method, seed of the calibration data.
It is written to --json as soon as it is measured and not measured again unless the options of its
method have changed, so that the command goes on where it was stopped; --minutes stops it, after the
cell it is at. Calibration and evaluation data are disjoint.

Layer errors, mean over layers, on data that neither calibrates nor is evaluated, energy |W x|^2:
local   |Q x - W x|^2 on the inputs x of the full-precision model: what rounding this layer costs
total   |Q z - W x|^2, z the inputs in the quantized model: what all layers up to this one cost
Both include biases and what corrects them.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.accuracy import lite0, minilm, smollm2, yolov5n
from benchmarks.accuracy.methods import GRIDS, METHODS, PARTS, Options, all_options
from benchmarks.measure import environment, markdown
from sapq_triton import QuantSpec, quantize
from sapq_triton.layers import called_with, find_layers, kind


class Subject(Protocol):
    """A model with its data.

    loss: the metric, of those of `score`, that figures show; all are better the closer to that of
    the full-precision model. group_size: columns per scale, -1 for one per row. grid: of GRIDS.
    """

    title: str
    loss: str
    group_size: int
    grid: str
    setup: dict[str, Any]  # what the results depend on
    model: nn.Module
    options: Options  # of `quantize`

    def calibration(self, seed: int) -> list[Any]: ...

    def probe(self, seed: int) -> list[Any]:
        """Batches for layer errors."""

    def run(self, model: nn.Module, batch: Any) -> object: ...

    def score(self, model: nn.Module, seed: int) -> dict[str, float]: ...


SUBJECTS: dict[str, Any] = {
    "lite0": lite0.Study,
    "yolov5n": yolov5n.Study,
    "smollm2": smollm2.Study,
    "minilm": minilm.Study,
}


Row = tuple[int, int, str, str]  # bits, group, grid, method
NOT_METRICS = ("layers", "notes", "environment", "options")


@dataclass(frozen=True)
class Cell:
    bits: int
    group_size: int
    grid: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"W{self.bits} | {self.group_size} | {self.grid} | {self.method} | seed {self.seed}"

    @property
    def row(self) -> Row:
        return self.bits, self.group_size, self.grid, self.method


# --- measurement ----------------------------------------------------------------------------------


class LayerErrors:
    """Energy, local and total error of each layer, summed over batches; see above."""

    def __init__(self, original: nn.Module, quantized: nn.Module, names: Sequence[str]) -> None:
        self.original, self.quantized = original, quantized
        self.sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
        self._outputs: dict[str, Tensor] = {}  # of the original

    @torch.no_grad()
    def add(self, subject: Subject, batch: Any) -> None:
        for model, hook in ((self.original, self._before), (self.quantized, self._after)):
            handles = [
                model.get_submodule(name).register_forward_hook(
                    partial(hook, name), with_kwargs=True
                )
                for name in self.sums
            ]
            subject.run(model, batch)
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        x = called_with(name, args, kwargs)
        constant = module.forward(torch.zeros_like(x[:1]))
        rounded = self.quantized.get_submodule(name).forward(x)
        self.sums[name][0] += (y - constant).square().sum()
        self.sums[name][1] += (rounded - y).square().sum()
        self._outputs[name] = y

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        self.sums[name][2] += (y - self._outputs.pop(name)).square().sum()

    def relative(self) -> dict[str, tuple[float, float]]:
        """Local and total, over the energy"""
        return {
            name: (float(local / energy), float(total / energy))
            for name, (energy, local, total) in self.sums.items()
        }


def measure(subject: Subject, cell: Cell, options: Options) -> dict[str, Any]:
    spec = QuantSpec(cell.bits, cell.group_size, **GRIDS[cell.grid])
    model = copy.deepcopy(subject.model)
    report = quantize(
        model, subject.calibration(cell.seed), spec, progress=False, **subject.options | options
    )
    sums = LayerErrors(subject.model, model, [layer.name for layer in report.layers])
    for batch in subject.probe(cell.seed):
        sums.add(subject, batch)
    errors = sums.relative()
    local, total = zip(*errors.values(), strict=True)
    return {
        **subject.score(model, cell.seed),
        "calibration error": report.relative_error,
        "local error": mean(local),
        "total error": mean(total),
        "seconds": report.seconds,
        "notes": sum(bool(layer.notes) for layer in report.layers),
        "layers": {
            layer.name: [
                _type(subject.model, layer.name),
                layer.relative_error,
                *errors[layer.name],
            ]
            for layer in report.layers
        },
    }


def _type(model: nn.Module, name: str) -> str:
    """depthwise, pointwise, other convolutions, or the last part of a linear layer's name"""
    module: Any = find_layers(model)[name]
    if "Conv" not in str(kind(module)) or kind(module) == "Conv1D":
        return name.rpartition(".")[2]
    if module.groups > 1:
        return "depthwise"
    return "pointwise" if set(module.kernel_size) == {1} else "convolution"


# --- what is measured -----------------------------------------------------------------------------


def plan(
    seeds: Sequence[int], bits: Sequence[int], groups: Sequence[int], grids: Sequence[str]
) -> list[Cell]:
    """Main methods with all seeds first, then the parts with the first seed."""

    def cells(methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
        for seed in seeds:
            for width in bits:
                for group in groups:
                    for grid in grids:
                        for method in methods:
                            yield Cell(width, group, grid, method, seed)

    return [*cells([*METHODS], seeds), *cells([*PARTS], seeds[:1])]


class Results:
    """Cells by name, in a file that an interruption leaves whole."""

    def __init__(self, path: Path, setup: dict[str, Any]) -> None:
        self.path, self.setup = path, setup
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["setup"] != setup:
                raise SystemExit(
                    f"{path} holds {stored['setup']}, this is {setup}: name another --json"
                )
            self.cells = stored["cells"]

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured with the options that its method has today"""
        values = self.cells.get(str(cell))
        return values if values and values.get("options") == all_options(cell.method) else None

    def add(self, cell: Cell, values: dict[str, Any]) -> None:
        self.cells[str(cell)] = {"options": all_options(cell.method), **values}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"setup": self.setup, "cells": self.cells}, indent=1) + "\n")
        os.replace(partial, self.path)


Rows = dict[Row, dict[int, dict[str, Any]]]  # values by seed


def rows_of(results: Results, cells: Sequence[Cell]) -> Rows:
    """What is measured of the cells"""
    rows: Rows = {}
    for cell in cells:
        if values := results.of(cell):
            rows.setdefault(cell.row, {})[cell.seed] = values
    return dict(sorted(rows.items(), key=lambda item: (-item[0][0], item[0][1], item[0][2])))


def table(rows: Rows) -> str:
    """Mean over the seeds ± their sample standard deviation."""
    first = next(iter(next(iter(rows.values())).values()))
    metrics = [name for name in first if name not in NOT_METRICS]

    def text(values: list[float], name: str) -> str:
        digits = 0 if name == "seconds" else 5 if "error" in name else 3
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
        return f"{mean(values):.{digits}f}{spread}"

    lines = [
        (*_named(row), str(len(runs)), *(
            text([run[name] for run in runs.values()], name) for name in metrics
        ))
        for row, runs in rows.items()
    ]  # fmt: skip
    return markdown(("bits", "group", "grid", "method", "seeds", *metrics), lines)


def differences(rows: Rows, method: str = "SAPQ") -> str:
    """What `method` has less each other one, paired by seed: both of a pair calibrate and are
    evaluated on the same data. Mean ± its standard error."""
    first = next(iter(next(iter(rows.values())).values()))
    metrics = [name for name in first if name not in (*NOT_METRICS, "seconds", "standard error")]
    lines = []
    for row, runs in rows.items():
        others = rows.get((*row[:3], method), {})
        seeds = [seed for seed in runs if seed in others]
        if row[3] == method or len(seeds) < 2:
            continue
        apart = [[others[seed][name] - runs[seed][name] for seed in seeds] for name in metrics]
        errors = [stdev(values) / len(seeds) ** 0.5 for values in apart]
        texts = [f"{mean(v):+.4f} ± {e:.4f}" for v, e in zip(apart, errors, strict=True)]
        lines.append((*_named(row), str(len(seeds)), *texts))
    return markdown(("bits", "group", "grid", f"{method} less", "seeds", *metrics), lines)


def _named(row: Row) -> tuple[str, str, str, str]:
    bits, group, grid, method = row
    return f"W{bits}", "row" if group == -1 else str(group), grid, method


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = parser.add_subparsers(dest="subject", required=True)
    for name, study in SUBJECTS.items():
        command = models.add_parser(name)
        study.arguments(command)
        command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
        command.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
        command.add_argument("--methods", nargs="+", help="names of rows; all by default")
        command.add_argument("--groups", type=int, nargs="+", help="columns per scale; -1: a row")
        command.add_argument("--grids", nargs="+", choices=GRIDS)
        command.add_argument("--minutes", type=float, default=30.0, help="then stop (30)")
        command.add_argument("--json", type=Path)
        command.add_argument("--figures", type=Path, help="folder for the plots")
    options = parser.parse_args()
    started = time.monotonic()
    subject: Subject = SUBJECTS[options.subject](options)
    path = options.json or Path(f"study-{options.subject}.json")
    results = Results(path, {"subject": subject.title, **subject.setup})
    groups, grids = options.groups or [subject.group_size], options.grids or [subject.grid]
    cells = plan(options.seeds, options.bits, groups, grids)
    if options.methods:
        cells = [cell for cell in cells if cell.method in options.methods]
    named = METHODS | PARTS
    missing = [cell for cell in cells if not results.of(cell)]
    for done, cell in enumerate(missing):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes} minutes; {len(missing) - done} cells are left")
            break
        begun = time.monotonic()
        values = measure(subject, cell, named[cell.method])
        results.add(cell, values | {"environment": environment(torch.device("cpu"))})
        print(f"{cell}: {subject.loss} {values[subject.loss]:.4f}, "
              f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
    if rows := rows_of(results, cells):
        print("\n" + subject.title + "\n\n" + table(rows))
        print("\n" + differences(rows))
    if options.figures:
        from benchmarks.accuracy import figures

        shown = {key: values for key, values in results.cells.items()
                 if f" | {subject.group_size} | {subject.grid} | " in key}  # fmt: skip
        figures.draw(options.subject, subject.loss, shown, options.figures)


if __name__ == "__main__":
    main()
