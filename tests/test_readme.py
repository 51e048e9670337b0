"""README.md holds the figures of the studies of accuracy, and of the newest gate that passed on a
GPU, or says that there is none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.accuracy import summary
from benchmarks.accuracy.summary import Value, short

README = readme.ROOT / "README.md"
RESULTS = readme.ROOT / "benchmarks" / "results"
MARKERS = "".join(
    readme.BEGIN.format(name) + "stale\n" + readme.END.format(name)
    for name in ("losses", "performance", "claim", "parts")
)


def gate(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A results file as the gate writes it."""
    where = {"device": name, "cuda": "12.8", "date": "2026-01-01", "commit": "0123abc"}
    where |= {"torch": "2.11.0", "triton": "3.6.0"} | changes.pop("environment", {})
    solve = {"shape": [4096, 4096], "group_size": 128, "order": "activation", "triton": 0.0025}
    hessian = {"columns": 4096, "layer": "q_proj", "tokens or images": 262144, "triton": 0.009}
    hessian |= {"dtype": "bfloat16", "TFLOP/s": 488.6, "of matmul": 0.7512}
    model = {"model": "ResNet-50", "what": "solves", "order": "sensitivity", "triton": 1.5}
    obq = {"shape": ["whole model"], "SAPQ": 0.1, "OBQ": 9.0, "literal": 99.0, "OBQ / SAPQ": 90.0}
    obq |= {"literal / SAPQ": 990.0, "paper": "20–200"}
    report = {"environment": where, "passed": True, "tested": True, "whole": True, "quick": False}
    report["stages"] = {
        "solve_times": [solve], "hessian_times": [hessian], "model_times": [model],
        "obq_times": [obq], "memory": [{"of 3 H + 2 W": 0.5}, {"of 3 H + 2 W": 0.91}],
    }  # fmt: skip
    report |= changes
    (folder / f"{name}.json").write_text(json.dumps(report))
    return report


def test_readme_is_up_to_date() -> None:
    page = README.read_text()
    assert readme.rewritten(page, readme.blocks(RESULTS)) == page, "run python -m benchmarks.readme"


def test_newest_gate_is_written(tmp_path: Path) -> None:
    gate(tmp_path, "Old GPU", environment={"date": "2025-01-01"})
    gate(tmp_path, "New GPU", environment={"date": "2026-02-01"})
    page = tmp_path / "README.md"
    for model in summary.GRID:
        shutil.copy(RESULTS / f"study-{model}.json", tmp_path)
    page.write_text("above\n" + MARKERS + "below\n")
    assert readme.main(["--results", str(tmp_path), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("<!-- /parts -->\nbelow\n")
    assert "New GPU" in text and "Old GPU" not in text and "stale" not in text
    assert "|  | activation |\n|---|---|\n| solve 4096×4096, groups of 128 | 2.5 ms |\n" in text
    assert "| Hessian of 4096 columns, 262144 tokens | bfloat16 | 9 ms | 489 TFLOP/s" in text
    assert "75% of matmul" in text and "ResNet-50: solves | sensitivity | 1.50 s" in text
    assert "90 and 990 times as fast" in text
    assert "91% of 3 Hessians" in text


@pytest.mark.parametrize(
    "changes", [{"quick": True}, {"environment": {"cuda": None}}, {"stages": {}}]
)
def test_only_times_of_a_gpu_count(changes: dict[str, Any], tmp_path: Path) -> None:
    gate(tmp_path, "some", **({"passed": False} | changes))
    assert readme.newest(tmp_path) is None
    assert readme.block(None) == readme.NOT_MEASURED


@pytest.mark.parametrize("missing", ["passed", "tested", "whole"])
def test_what_is_no_whole_gate_says_so(missing: str, tmp_path: Path) -> None:
    """And stands behind every one that is."""
    wrong = {missing: False, "failures": ["hessian: off"], "environment": {"date": "2026-03-01"}}
    part = gate(tmp_path, "Part", **wrong)
    assert readme.newest(tmp_path) == part
    text = readme.block(part)
    assert text.startswith("**No whole gate has passed on a GPU yet.** A part of one ran, later")
    assert "\nOn one Part (commit 0123abc" in text and "\n* hessian: off\n" in text
    whole = gate(tmp_path, "Whole", failures=[])
    assert readme.newest(tmp_path) == whole
    assert readme.block(whole).startswith("On one Whole (commit 0123abc")


def test_a_part_may_hold_nothing_but_solves(tmp_path: Path) -> None:
    whole = gate(tmp_path, "Part", whole=False, failures=[])
    part = whole | {"stages": {"solve_times": whole["stages"]["solve_times"]}}
    text = readme.block(part)
    assert "it found wrong:\n\n* nothing\n\n" in text
    assert text.endswith("| solve 4096×4096, groups of 128 | 2.5 ms |\n")


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        readme.rewritten("# a page\n" + readme.BEGIN.format("losses"), {"losses": ""})


# --- accuracy -------------------------------------------------------------------------------------


def studies(**cells: dict[str, Any]) -> summary.Studies:
    """cells: by model; `W4 | method | seed` -> values"""
    made: summary.Studies = {model: {} for model in summary.GRID}
    for model, values in cells.items():
        for name, value in values.items():
            bits, method, seed = name.split(" | ")
            made[model][f"{bits} | {summary.GRID[model]} | {method} | seed {seed}"] = value
    return made


def test_losses_are_means_over_seeds_and_bold_beyond_noise() -> None:
    kl = {"RTN": (0.5,), "GPTQ order": (0.3, 0.2, 0.4), "SAPQ": (0.1, 0.02, 0.06)}
    cells = {
        f"W4 | {method} | {seed}": {"kl": value, "top-1": -10 * value, "standard error": 2.0}
        for method, values in kl.items()
        for seed, value in enumerate(values, start=1)
    }
    table = summary.losses(studies(lite0=cells)).splitlines()
    # deviations .1 and .04: .24 apart is more than both, 2.4 points of top-1 less than 2 and 2
    assert "|  | W4 | .500 | .300 ± .100 | – | **.060 ± .040** | – |".replace(
        "|  |", "| … KL to fp32 |") in table  # fmt: skip
    top = next(line for line in table if "top-1" in line)
    assert top.endswith("| W4 | −5.0 ± 2.0 | −3.0 ± 2.0 | – | −.6 ± 2.0 | – |")
    assert sum(line.startswith("|  | W") for line in table) == 16  # W3 and W2 of eight metrics


def test_perplexities_are_compared_by_their_logarithms() -> None:
    """Where a method fails its seeds are orders of magnitude apart."""
    topics = {"GPTQ order": (900.0, 2e4, 8e4), "SAPQ": (70.0, 65.0, 72.0)}
    cells = {
        f"W2 | {method} | {seed}": {"topics": value, "WikiText-2": value}
        for method, values in topics.items()
        for seed, value in enumerate(values, start=1)
    }
    table = summary.losses(studies(smollm2=cells))
    assert "|  | W2 | – | 3e4 | – | **69.00 ± 3.61** | – |" in table


def test_claim_is_in_points() -> None:
    cells = {}
    for bits in (8, 6, 4):
        for method, loss in (("SAPQ", 0.01), ("GPTQ order", 0.02)):
            values = {"top-1": -loss, "standard error": 0.1, "mAP50-95": -loss}
            cells[f"W{bits} | {method} | 1"] = values
    table = summary.claim(studies(lite0=cells, yolov5n=cells))
    assert "| W6 | .0 ± .1 (GPTQ .0 ± .1) | −1.0 (GPTQ −2.0) | −.51 |" in table  # (.01 + 1) / 2
    with pytest.raises(ValueError, match="yolov5n has no W8"):
        summary.claim(studies(lite0=cells))


def test_parts_are_those_that_were_measured() -> None:
    values = {"calibration error": 0.01, "local error": 0.02, "total error": 0.3}
    cells = {"W4 | SAPQ | 1": {"embedding": 0.5, **values}, "W4 | RTN | 2": values}
    rows = summary.parts(studies(minilm=cells)).splitlines()[2:]
    assert rows == [
        "| SAPQ | – / .500 / – / – | – / .0100 / – / – | – / .0200 / – / – | – / .300 / – / – |"
    ]


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [(0.0304, 3, ".030"), (-0.5, 1, "−.5"), (-12.34, 1, "−12.3"), (-0.01, 1, ".0"), (3.0, 0, "3")],
)
def test_short_numbers(number: float, digits: int, text: str) -> None:
    assert short(number, digits) == text


def test_large_numbers_keep_one_digit() -> None:
    assert [Value(v, None, 1).text(2) for v in (2.3e7, 4585.4, 900.17)] == ["2e7", "4585", "900.17"]
