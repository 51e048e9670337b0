"""The accuracy tables of README.md, from what the studies wrote to `benchmarks/results`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.accuracy.methods import METHODS, PARTS
from benchmarks.measure import markdown

Cells = dict[str, dict[str, Any]]
Studies = dict[str, Cells]  # model -> cells by name, see `study.Cell`

GRID = {
    "lite0": "-1 | asymmetric",
    "yolov5n": "-1 | asymmetric",
    "smollm2": "64 | symmetric",
    "minilm": "-1 | asymmetric",
}
SEEDS = (1, 2, 3)
NONE = "–"


class Line(NamedTuple):
    """A row of the table of losses: `metric` of a model at each width, with so many digits."""

    title: str
    model: str
    metric: str
    widths: tuple[int, ...]
    digits: int


LOSSES = (
    Line("EfficientNet-Lite0, per channel: top-1, points", "lite0", "top-1", (4, 3, 2), 1),
    Line("… KL to fp32", "lite0", "kl", (4, 3, 2), 3),
    Line("YOLOv5n, per channel: mAP50-95 (.352)", "yolov5n", "mAP50-95", (4, 3, 2), 3),
    Line("… squared change of scores, relative", "yolov5n", "output", (4, 3, 2), 3),
    Line("SmolLM2-135M, groups of 64: WikiText-2 (21.19)", "smollm2", "WikiText-2", (4, 3, 2), 2),
    Line("… topics (13.11)", "smollm2", "topics", (4, 3, 2), 2),
    Line("all-MiniLM-L6-v2, per channel: embedding", "minilm", "embedding", (4, 3, 2), 3),
    Line("… mean total error of its layers", "minilm", "total error", (4, 3, 2), 4),
)
COLUMNS = (*METHODS, "exact OBQ")
PERPLEXITIES = ("WikiText-2", "topics")
OTHERS = ("minilm", "lite0", "yolov5n")  # models whose parts are measured beside SmolLM2's


def read(folder: Path) -> Studies:
    return {
        model: json.loads((folder / f"study-{model}.json").read_text())["cells"] for model in GRID
    }


class Value(NamedTuple):
    """Of the seeds that were measured; noise: their sample standard deviation, or of top-1 the mean
    of their standard errors; None of one seed."""

    value: float
    noise: float | None
    seeds: int

    def text(self, digits: int) -> str:
        if abs(self.value) >= 1000:  # noise of a wreck says nothing
            exact = abs(self.value) < 10_000
            return f"{self.value:.0f}" if exact else f"{self.value:.0e}".replace("e+0", "e")
        noise = "" if self.noise is None else f" ± {short(self.noise, digits)}"
        return short(self.value, digits) + noise


def value_of(
    cells: Cells, row: str, method: str, metric: str, of: Callable[[float], float] = float
) -> Value | None:
    runs = [cells.get(f"{row} | {method} | seed {seed}") for seed in SEEDS]
    found = [run for run in runs if run is not None]
    if not found:
        return None
    values = [of(run[metric]) for run in found]
    if metric == "top-1":
        noise: float | None = mean(run["standard error"] for run in found)
    else:
        noise = stdev(values) if len(values) > 1 else None
    return Value(mean(values), noise, len(values))


def short(number: float, digits: int) -> str:
    """Without a zero before the point, and with a minus sign: -0.03 -> −.03"""
    text = f"{abs(number):.{digits}f}"
    if digits and text.startswith("0."):
        text = text[1:]
    return "−" + text if number < 0 and float(text) else text


def losses(studies: Studies) -> str:
    rows = []
    for line in LOSSES:
        for place, bits in enumerate(line.widths):
            row = f"W{bits} | {GRID[line.model]}"
            values = [value_of(studies[line.model], row, m, line.metric) for m in COLUMNS]
            texts = [NONE if value is None else value.text(line.digits) for value in values]
            if line.metric in PERPLEXITIES:  # whose logarithm is the mean that seeds scatter around
                values = [
                    value_of(studies[line.model], row, m, line.metric, math.log) for m in COLUMNS
                ]
            ours = COLUMNS.index("SAPQ")
            if all(_better(values[ours], v) for n, v in enumerate(values) if v and n != ours):
                texts[ours] = f"**{texts[ours]}**"
            rows.append((line.title if place == 0 else "", f"W{bits}", *texts))
    header = [f"**{m}, `best`**" if m == "SAPQ" else m for m in COLUMNS]
    return markdown(("what is lost to fp32", "", *header), rows) + "\n"


def _better(ours: Value | None, theirs: Value) -> bool:
    """By more than the noise of both: of losses below, or of changes of scores above"""
    if ours is None:
        return False
    apart = abs(theirs.value) - abs(ours.value)
    return apart > math.hypot(ours.noise or 0.0, theirs.noise or 0.0)


def claim(studies: Studies) -> str:
    """Mean losses in points of networks for images, `best` and GPTQ's order"""
    rows = []
    for bits in (8, 6, 4):
        row = f"W{bits} | {GRID['lite0']}"
        texts, means = [], []
        for model, metric, scale in (("lite0", "top-1", 1.0), ("yolov5n", "mAP50-95", 100.0)):
            both = []
            for method in ("SAPQ", "GPTQ order"):
                value = value_of(studies[model], row, method, metric)
                if value is None:
                    raise ValueError(f"{model} has no {row} | {method}")
                noise = None if value.noise is None else scale * value.noise
                both.append(Value(scale * value.value, noise, value.seeds))
            means.append(both[0].value)
            texts.append(f"{both[0].text(1)} (GPTQ {both[1].text(1)})")
        rows.append((f"W{bits}", *texts, short(mean(means), 2)))
    return markdown(("", "Lite0, top-1", "YOLOv5n, mAP50-95", "mean of `best`"), rows) + "\n"


def parts(studies: Studies) -> str:
    """What each part does at 4 bits, of the first seed"""
    models = ("smollm2", *OTHERS)
    losses_of = dict(zip(models, ("kl", "embedding", "kl", "output"), strict=True))
    rows = []
    for method in (*METHODS, *PARTS):
        texts = []
        for metric in ("", "calibration error", "local error", "total error"):
            each = []
            for model in models:
                cell = studies[model].get(f"W4 | {GRID[model]} | {method} | seed 1")
                name, digits = metric or losses_of[model], 3 if metric in ("", "total error") else 4
                each.append(NONE if cell is None else short(cell[name], digits))
            texts.append(" / ".join(each))
        if any(character.isdigit() for character in texts[0]):
            rows.append((method, *texts))
    header = ("W4, first seed", "loss¹", "layer error, calibration", "local, held out", "total")
    return markdown(header, rows) + "\n"


BLOCKS: dict[str, Callable[[Studies], str]] = {"losses": losses, "claim": claim, "parts": parts}


def blocks(folder: Path) -> dict[str, str]:
    """What stands between the markers of README.md, by name"""
    studies = read(folder)
    return {name: block(studies) for name, block in BLOCKS.items()}
