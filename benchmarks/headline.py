"""SAPQ against exact OBQ over whole models, and OBQ with delayed updates against the released form.

    python -m benchmarks.headline

Whole-model seconds: every distinct shape of ResNet-50, YOLOv5s and EfficientNet-Lite0 (depthwise
convolutions), measured as in `benchmarks.obq` and taken as often as it occurs, Hessians given.

SAPQ and OBQ round to one given grid, and neither measures its error in that time.

SAPQ      checks of its arguments included.
OBQ       exact, with delayed updates: the fastest form that we know. Sampled rows, scaled.
literal   exact, as published: a rank-one update of each row's inverse after each weight. Sampled
          rows and first steps, scaled; copying the inverses, which comes once, is up to 3 % of it.

The paper (arXiv 2509.05576) reports 20 to 200 times the speed of OBQ.

The second table has OBQ alone, 32 rows of 1024 columns on the CPU: our delayed form against that of
IST-DASLab/OBC, which after each step makes the rank-one products of all rows, C x C each however
few columns remain, and subtracts them. Its first steps, scaled; all steps cost the same. The exit
status is 1 if the delayed form is not 20 times faster.

A CPU runs on one thread.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import ROOT, environment, interleaved, markdown
from benchmarks.obq import SPEC as OBQ_SPEC
from benchmarks.obq import Problem, Row, Setting, in_place, literal_obq, measure, settings
from benchmarks.shapes import Layer, counted, efficientnet_lite0, resnet50, yolov5s
from sapq_triton.obq import MEMORY

MODELS: dict[str, Callable[[], tuple[Layer, ...]]] = {
    "ResNet-50": resnet50,
    "YOLOv5s": yolov5s,
    "EfficientNet-Lite0": efficientnet_lite0,
}
PAPER = "20–200"
QUICK_COLUMNS, QUICK_GROUPS = 64, 32
RELEASED: dict[str, Any] = {"rows": 32, "columns": 1024, "steps": 24, "at_least": 20.0}
QUICK_RELEASED: dict[str, Any] = {"rows": 4, "columns": 128, "steps": 8, "at_least": 0.0}


@dataclass(frozen=True)
class Shape:
    """One distinct shape of a model, and how often it occurs."""

    model: str
    count: int
    row: Row


@dataclass(frozen=True)
class Total:
    """Seconds of a whole model."""

    model: str
    layers: int
    shapes: int
    sapq: float
    obq: float
    literal: float

    @classmethod
    def of(cls, model: str, shapes: Iterable[Shape]) -> "Total":
        mine = [shape for shape in shapes if shape.model == model]
        sums = (
            sum(shape.count * getattr(shape.row, name) for shape in mine)
            for name in ("sapq", "obq", "literal")
        )
        return cls(model, sum(shape.count for shape in mine), len(mine), *sums)

    def summary(self) -> dict[str, Any]:
        ratios = {
            "OBQ / SAPQ": self.obq / self.sapq,
            "literal / SAPQ": self.literal / self.sapq,
            "paper": PAPER,
        }
        return asdict(self) | ratios


def shapes(
    models: Iterable[str],
    setting_of: Callable[[Problem], Setting],
    device: torch.device,
    *,
    budget: float = 1.0,
    quick: bool = False,
) -> Iterator[Shape]:
    """Shape after shape; one that several models have is measured once."""
    measured: dict[tuple[int, int, int], Row] = {}
    todo = [(model, layer, n) for model in models for layer, n in counted(MODELS[model]()).items()]
    # of as many columns the most rows first: they allow every number of rows at a time
    for model, layer, count in sorted(todo, key=lambda t: (t[1].columns, -t[1].rows)):
        if quick and (layer.columns > QUICK_COLUMNS or layer.groups > QUICK_GROUPS):
            continue
        if layer.shape not in measured:
            measured[layer.shape] = measure(layer, setting_of, device, budget)
        yield Shape(model, count, measured[layer.shape])


def any_setting(made: Problem) -> Setting:
    """Good enough where no time is to be spent on finding the fastest: a chunk of `solve_obq`."""
    N, C = made.weight.shape
    return Setting(max(1, min(N, MEMORY // (4 * C * C))), 64)


def as_released(inverse: Tensor, row: Tensor, share: Tensor) -> None:
    inverse -= torch.bmm(row[:, :, None], share[:, None, :])


def against_released(rows: int, columns: int, steps: int, at_least: float) -> dict[str, Any]:
    """OBQ on the CPU, one thread: seconds of our delayed form and of the released one."""
    device = torch.device("cpu")
    made = Problem.of(Layer("", 1, rows, columns, (columns,)), device)
    setting = settings(device)(made)
    grid = (made.scale, made.zero_point, OBQ_SPEC.qmax)
    forms = {"released": as_released, "in place": in_place}
    found: dict[str, Any] = {}

    def literal(form: str) -> None:
        found[form] = literal_obq(made.weight, made.inverse[0], *grid, steps, forms[form])

    def delayed() -> None:
        found["delayed"] = made.obq(slice(rows), setting)

    calls = {"delayed": delayed} | {form: lambda form=form: literal(form) for form in forms}
    taken = interleaved(calls, device, budget=0.0)
    first = found["released"]
    same = found["delayed"].gather(1, first.picked) == first.codes
    if not torch.equal(first.picked, found["in place"].picked) or same.double().mean() < 0.9:
        raise AssertionError("the forms of OBQ do not make the same choices")
    seconds = {form: taken[form] * columns / steps for form in forms}
    ratio = seconds["released"] / taken["delayed"]
    return {
        "rows": rows,
        "columns": columns,
        "delayed s": taken["delayed"],
        "setting": asdict(setting),
        "released s": seconds["released"],
        "first steps": steps,
        "released / delayed": ratio,
        "in place s": seconds["in place"],
        "in place / delayed": seconds["in place"] / taken["delayed"],
        "at least": at_least,
        "ok": ratio >= at_least,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.headline", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the released form is compared on
    try:
        released = against_released(**(QUICK_RELEASED if options.quick else RELEASED))
        print(f"released / delayed: {released['released / delayed']:.1f}", file=sys.stderr)
        found = []
        setting_of, budget = (any_setting, 0.0) if options.quick else (settings(device), 1.0)
        for shape in shapes(options.models, setting_of, device, budget=budget, quick=options.quick):
            found.append(shape)
            row = shape.row
            print(f"{shape.model} {row.rows}x{row.columns}: {row.ratio:.1f}", file=sys.stderr)
        where = environment(device, of=options.commit)
    finally:
        torch.set_num_threads(threads)
    totals = [Total.of(model, found).summary() for model in options.models]
    print("{device}, {threads} threads, torch {torch}, {commit}\n".format(**where))
    print(markdown(totals[0], (total.values() for total in totals)), "\n")
    print(markdown(released, [released.values()]))
    name = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    file = options.out / f"headline-{name}{'-quick' if options.quick else ''}.json"
    report = {
        "environment": where,
        "models": totals,
        "released": released,
        "shapes": [asdict(shape) | {"ratio": shape.row.ratio} for shape in found],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if released["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
