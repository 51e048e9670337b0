"""README.md holds the figures of the newest gate that passed on a GPU, or says there is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

README = readme.ROOT / "README.md"


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
    newest = readme.newest(readme.ROOT / "benchmarks" / "results")
    assert readme.rewritten(page, newest) == page, "run python -m benchmarks.readme"


def test_newest_gate_is_written(tmp_path: Path) -> None:
    gate(tmp_path, "Old GPU", environment={"date": "2025-01-01"})
    gate(tmp_path, "New GPU", environment={"date": "2026-02-01"})
    page = tmp_path / "README.md"
    page.write_text("above\n" + readme.BEGIN + "stale\n" + readme.END + "below\n")
    assert readme.main(["--results", str(tmp_path), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith(readme.END + "below\n")
    assert "New GPU" in text and "Old GPU" not in text and "stale" not in text
    assert "| solve 4096×4096, groups of 128 | activation | 2.5 ms |  |  |" in text
    assert "| Hessian of 4096 columns, 262144 tokens | bfloat16 | 9 ms | 489 TFLOP/s" in text
    assert "75% of matmul" in text and "ResNet-50: solves | sensitivity | 1.50 s" in text
    assert "90 and 990 times as fast" in text
    assert "91% of 3 Hessians" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"passed": False},
        {"tested": False},
        {"whole": False},
        {"quick": True},
        {"environment": {"cuda": None}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_only_a_whole_gate_that_passed_on_a_gpu_counts(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    gate(tmp_path, "some", **changes)
    assert readme.newest(tmp_path) is None
    assert readme.block(None) == readme.NOT_MEASURED


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        readme.rewritten("# a page\n" + readme.BEGIN, None)
