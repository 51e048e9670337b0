"""Two runs side by side."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sapq_triton import compare, save_report
from sapq_triton.cli import main
from sapq_triton.compare import error_ratio
from sapq_triton.report_files import PAGE
from tests.reports import EMPTY, of_layers, real_report
from tests.test_report_html import Page, rows_of

A = of_layers(3)
B = replace(
    of_layers(4, ["model.layers.2.mlp.down_proj", "new", "model.layers.0.mlp.down_proj", "newer"]),
    options={**A.options, "preset": "fast", "extra": [1, 2]},
    environment={**A.environment, "torch": "9.9"},
)


def test_layers_are_paired_by_name() -> None:
    both = compare(A, B)
    assert [(x.name, y.name) for x, y in both.pairs] == [
        ("model.layers.0.mlp.down_proj",) * 2,
        ("model.layers.2.mlp.down_proj",) * 2,
    ]
    assert both.pairs[0] == (A.layers[0], B.layers[2])
    assert both.alone == (["model.layers.1.mlp.down_proj"], ["new", "newer"])


def test_what_differs() -> None:
    assert compare(A, B).differences == {
        "preset": ("best", "fast"),
        "extra": ("–", "1, 2"),
        "torch": (A.environment["torch"], "9.9"),
    }
    assert compare(A, A).differences == {}
    changed = replace(A, options={**A.options, "spec": {"bits": 3}, "damp": 0.1})
    found = compare(A, changed).differences
    assert found["spec.bits"] == ("4", "3")
    assert found["damp"] == ("chosen for each layer", "0.1")
    assert found["spec.symmetric"] == ("no", "–")


def test_ratios_of_errors() -> None:
    both = compare(A, B)
    ratios = [y.relative_error / x.relative_error for x, y in both.pairs]
    assert [error_ratio(*pair) for pair in both.pairs] == ratios
    assert both.mean_ratio == pytest.approx(math.sqrt(math.prod(ratios)))
    assert compare(A, A).mean_ratio == pytest.approx(1)
    assert compare(EMPTY, A).mean_ratio is None
    exact = replace(A.layers[0], error=0.0)
    assert error_ratio(exact, A.layers[0]) is None and error_ratio(A.layers[0], exact) == 0
    assert compare(replace(A, layers=(exact,)), A).mean_ratio is None


def test_as_text() -> None:
    lines = str(compare(A, B, ("runs/a\nb", "runs/c"))).splitlines()
    assert lines[:3] == ["A: runs/a\\nb", "B: runs/c", "preset: A best, B fast"]
    (line,) = [x for x in lines if x.startswith("model.layers.2.mlp.down_proj ")]
    x, y = A.layers[2], B.layers[0]
    assert line.split()[1:6] == [
        str(x.spec.bits), str(y.spec.bits), f"{x.relative_error:.3e}", f"{y.relative_error:.3e}",
        f"{y.relative_error / x.relative_error:.2f}",
    ]  # fmt: skip
    assert "new: only in B" in lines and "model.layers.1.mlp.down_proj: only in A" in lines
    assert "layers quantized: A 3, B 4" in lines


def test_as_a_page() -> None:
    both = compare(A, B, ("<a>", "b"))
    page = Page(both.page())
    for text in ("<a>", "Only in A", "Only in B", "newer", "preset", "fast", "9.9"):
        assert text in page.text, text
    rows = rows_of(both.page())[-2:]
    for row, (x, y) in zip(rows, both.pairs, strict=True):
        assert row[1][0] == x.name
        found = [float(value or "") for _, value in row[2:]]
        assert found == [
            x.relative_error, y.relative_error, error_ratio(x, y), x.spec.bits, y.spec.bits,
            x.bytes, y.bytes, x.seconds_solve, y.seconds_solve,
        ]  # fmt: skip
    noted = replace(A.layers[0], notes=("odd",))
    page = Page(compare(A, replace(A, layers=(noted, *A.layers[1:]))).page())
    assert "B: odd" in page.text and "A: 9 columns" not in page.text  # what both say is left out


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_report(real_report(), tmp_path / "a")
    save_report(B, tmp_path / "b")
    assert main(["report", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{real_report()}\n"
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a" / "report.json"), "--out", str(out)]) == 0
    assert out.read_text() == (tmp_path / "a" / PAGE).read_text()
    assert capsys.readouterr().out.endswith(f"{out} is the page\n")
    both = ["report", str(tmp_path / "a"), "--compare", str(tmp_path / "b"), "--out", str(out)]
    assert main(both) == 0
    printed = capsys.readouterr().out
    assert f"A: {tmp_path / 'a'}" in printed and "new: only in B" in printed
    assert f"<bdi>{tmp_path / 'b'}</bdi>".replace(".", ".<wbr>") in out.read_text()


@pytest.mark.parametrize("place", [0, 1])
def test_errors_are_one_line(
    place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_report(A, tmp_path / "a")
    (tmp_path / "b.json").write_text('{"schema": "something"}')
    for other, message in (
        (tmp_path / "none", "none is not a file"),
        (tmp_path, "report.json is not a file"),
        (tmp_path / "b.json", "b.json: is not a report: its schema is not 'sapq-triton report'"),
    ):
        paths = [str(tmp_path / "a"), str(other)]
        first, second = paths[::-1] if place == 0 else paths
        assert main(["report", first, "--compare", second]) == 2
        line = capsys.readouterr().err
        assert re.fullmatch(rf"sapq-triton: .*{re.escape(message)}\n", line)
