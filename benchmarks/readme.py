"""Write the tables of README.md from `benchmarks/results`.

    python -m benchmarks.readme

Between two markers of README.md each comes
performance           what `benchmarks.gate` measured: of the whole gates that passed on a GPU, the
                      one of the latest date; where there is none, the latest that timed anything,
                      and what it found wrong; where no GPU did, the block says so
losses, claim, parts  what `benchmarks.accuracy.study` measured, see `accuracy.summary`
`tests/test_readme.py` fails where README.md is not what this command would write.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import summary
from benchmarks.measure import ROOT, markdown

BEGIN, END = "<!-- {}: python -m benchmarks.readme -->\n", "<!-- /{} -->\n"
NOT_MEASURED = """\
**Not measured yet:** anything on a GPU. The kernels run in Triton's interpreter against the
reference, and compile without spills for sm_80, sm_90, sm_100 and gfx942
(`python -m benchmarks.static`). `python -m benchmarks.gate` runs tests, parity and timings on a GPU
and writes `benchmarks/results/`.
"""
Result = dict[str, Any]


def newest(folder: Path) -> Result | None:
    """The latest gate of full size on a GPU: whole and passed, its test suite included, or else one
    that has timed solves."""
    found = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        if "stages" in report and report["environment"]["cuda"] and not report["quick"]:
            found += [report] if is_proof(report) or report["stages"].get("solve_times") else []
    return max(found, key=lambda x: (is_proof(x), x["environment"]["date"]), default=None)


def is_proof(report: Result) -> bool:
    return report["passed"] and report["tested"] and report["whole"]


def solves(rows: Sequence[Result]) -> str:
    """One line a shape and grid, one column an order."""
    orders = list(dict.fromkeys(row["order"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        grid = "per channel" if row["group_size"] < 0 else f"groups of {row['group_size']}"
        what = f"solve {'×'.join(map(str, row['shape']))}, {grid}"
        cells.setdefault(what, {})[row["order"]] = brief(row["triton"])
    lines = ([what, *(found.get(order, "–") for order in orders)] for what, found in cells.items())
    return markdown(["", *orders], lines)


def lines(stages: dict[str, list[Result]]) -> Iterator[tuple[str, str, str, str, str]]:
    """what, order or dtype, time, rate, of the ceiling"""
    for row in stages.get("hessian_times", ()):
        what = f"Hessian of {row['columns']} columns, {row['tokens or images']} {units(row)}"
        yield what, row["dtype"], brief(row["triton"]), *rate(row)
    for row in stages.get("model_times", ()):
        yield f"{row['model']}: {row['what']}", row["order"], brief(row["triton"]), *rate(row)


def units(row: Result) -> str:
    return "images" if "conv" in row["layer"] else "tokens"


def rate(row: Result) -> tuple[str, str]:
    if "TFLOP/s" not in row:
        return "", ""
    return f"{row['TFLOP/s']:.0f} TFLOP/s", f"{row['of matmul']:.0%} of matmul"


def brief(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def block(report: Result | None) -> str:
    """The performance."""
    if report is None:
        return NOT_MEASURED
    where, stages = report["environment"], report["stages"]
    device = (
        f"one {where['device']} (commit {where['commit']}, torch {where['torch']}, "
        f"triton {where['triton']})"
    )
    if is_proof(report):
        text = f"On {device}:\n"
    else:
        wrong = "".join(f"* {failure}\n" for failure in report["failures"]) or "* nothing\n"
        text = (
            "**No whole gate has passed on a GPU yet.** A part of one ran, later commits are not "
            f"measured.\nOn {device}\nit found wrong:\n\n{wrong}\nand took these times. "
        )
    text += (
        "4 bits, medians. Solves are without the error of their result, their Hessian given,\n"
        "factorization included. Ceilings were measured in the same run.\n\n"
    )
    text += solves(stages["solve_times"]) + "\n\n"
    if others := list(lines(stages)):
        text += markdown(("what", "order, dtype", "time", "rate", "of the ceiling"), others)
        text += "\n\n"
    last = []
    for row in stages.get("obq_times", ())[-1:]:
        if row["shape"] == ["whole model"]:
            last.append(
                f"ResNet-50, all layers: {brief(row['SAPQ'])} against {brief(row['OBQ'])} of exact "
                f"OBQ with delayed updates and {brief(row['literal'])} of its literal form, both on"
                f"\nsampled rows and scaled: {row['OBQ / SAPQ']:.0f} and "
                f"{row['literal / SAPQ']:.0f} times as fast (the paper: {row['paper']})."
            )
    if extra := [row["of 3 H + 2 W"] for row in stages.get("memory", ())]:
        last.append(
            f"Peak extra memory of a solve: {max(extra):.0%} of 3 Hessians and 2 weights at most."
        )
    return text.rstrip() + "\n" + (f"\n{' '.join(last)}\n" if last else "")


def blocks(results: Path) -> dict[str, str]:
    """What stands between the markers, by name."""
    return {"performance": block(newest(results)), **summary.blocks(results)}


def rewritten(page: str, texts: Mapping[str, str]) -> str:
    """ValueError where a marker is missing."""
    for name, text in texts.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md needs the lines {begin.strip()!r} and {end.strip()!r}")
        page = before + begin + text + end + after
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.readme", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    options.readme.write_text(rewritten(options.readme.read_text(), blocks(options.results)))
    report = newest(options.results)
    print(report["environment"]["device"] if report else "no results of a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
