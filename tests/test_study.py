"""The study of benchmarks/accuracy: what is measured, what is kept, and what its tables say."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import figures, study
from benchmarks.accuracy.methods import METHODS, PARTS, all_options
from benchmarks.accuracy.study import Cell, LayerErrors, Results, differences, rows_of, table
from sapq_triton import QuantSpec, quantize


class Tiny:
    """Two linear layers; loss is the squared change of the output."""

    title, loss, group_size, grid = "a tiny model", "output", 4, "symmetric"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
        self.setup = {"rows": options.rows}

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=16)

    def calibration(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(16, 8, generator=generator) for _ in range(4)]

    def probe(self, seed: int) -> list[Tensor]:
        return self.calibration(100 + seed)

    def run(self, model: nn.Module, batch: Tensor) -> object:
        return model(batch)

    @torch.no_grad()
    def score(self, model: nn.Module, seed: int) -> dict[str, float]:
        x = torch.cat(self.calibration(200 + seed))
        return {"output": float((model(x) - self.model(x)).square().mean())}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Calls the command; the cells of its file"""
    monkeypatch.setitem(study.SUBJECTS, "tiny", Tiny)
    path = tmp_path / "cells.json"

    def call(*arguments: str) -> dict[str, Any]:
        command = ["study", "tiny", "--json", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        study.main()
        cells: dict[str, Any] = json.loads(path.read_text())["cells"] if path.exists() else {}
        return cells

    return call


SOME = ("--bits", "3", "--methods", "GPTQ order", "SAPQ")


def test_errors_of_layers_are_those_of_the_definition() -> None:
    subject = Tiny(argparse.Namespace(rows=16))
    quantized = Tiny(argparse.Namespace(rows=16)).model
    quantize(quantized, subject.calibration(1), QuantSpec(3), progress=False)
    sums = LayerErrors(subject.model, quantized, ["0", "2"])
    for batch in subject.probe(1):
        sums.add(subject, batch)
    with torch.no_grad():
        x = torch.cat(subject.probe(1))
        inputs = {"0": (x, x), "2": (subject.model[:2](x), quantized[:2](x))}
        for name, (local, total) in sums.relative().items():
            old, new = (m.get_submodule(name) for m in (subject.model, quantized))
            was, is_ = inputs[name]
            energy = (was @ old.weight.T).square().sum()  # type: ignore[operator,union-attr]
            assert local == pytest.approx(float((new(was) - old(was)).square().sum() / energy))
            assert total == pytest.approx(float((new(is_) - old(was)).square().sum() / energy))
        assert sums.relative()["2"][0] != sums.relative()["2"][1]


def test_cells_are_measured_once_and_anew_when_their_options_change(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(*SOME, "--seeds", "1")
    assert list(first) == [f"W3 | 4 | symmetric | {m} | seed 1" for m in ("GPTQ order", "SAPQ")]
    for cell in first.values():
        assert cell["output"] > 0 and cell["layers"].keys() == {"0", "2"}
    more = run(*SOME, "--seeds", "1", "2")
    assert len(more) == 4 and {key: more[key] for key in first} == first
    monkeypatch.setitem(METHODS, "GPTQ order", METHODS["GPTQ order"] | {"damp": 0.5})
    changed, kept = first
    again = run(*SOME, "--seeds", "1")
    assert again[changed]["options"] != first[changed]["options"]
    assert again[changed]["calibration error"] != first[changed]["calibration error"]
    assert again[kept] == first[kept]
    with pytest.raises(SystemExit, match=r"'rows': 16.*, this is .*'rows': 9"):
        run(*SOME, "--rows", "9")


def test_minutes_stop_it_and_nothing_is_lost(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SOME, "--seeds", "1", "--minutes", "-1") == {}
    assert "stopped after -1.0 minutes; 2 cells are left" in capsys.readouterr().out
    assert len(run(*SOME, "--seeds", "1")) == 2


def test_tables_pair_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path / "cells.json", {})
    losses = {"SAPQ": (1.0, 2.0, 4.5), "GPTQ order": (2.0, 3.5, 6.5), "RTN": (9.0,)}
    cells = []
    for method, values in losses.items():
        for seed, value in enumerate(values, start=1):
            cells.append(Cell(4, -1, "asymmetric", method, seed))
            results.add(cells[-1], {"kl": value, "seconds": 2.0, "layers": {}, "notes": 0})
    rows = rows_of(results, cells)
    assert "| W4 | row | asymmetric | SAPQ | 3 | 2.500 ± 1.803 | 2 |" in table(rows)
    assert "| W4 | row | asymmetric | RTN | 1 | 9.000 | 2 |" in table(rows)
    # -1, -1.5, -2: mean -1.5, deviation .5, by the root of 3; RTN has one seed alone
    lines = differences(rows).splitlines()
    assert lines[2:] == ["| W4 | row | asymmetric | GPTQ order | 3 | -1.5000 ± 0.2887 |"]


def test_every_method_is_a_quantization_that_works() -> None:
    for method in METHODS | PARTS:
        options = all_options(method)
        model = Tiny(argparse.Namespace(rows=16)).model
        report = quantize(model, Tiny(argparse.Namespace(rows=16)).calibration(1), QuantSpec(4),
                          progress=False, **options)  # fmt: skip
        assert len(report.layers) == 2
        assert isinstance(figures._aims(method), bool)
    aims = {"SAPQ": True, "RTN": False, "activation order": False, "… + rounds": False,
            "GPTQ order + drift correction": True}  # fmt: skip
    assert {method: figures._aims(method) for method in aims} == aims


def test_plan_has_all_seeds_of_methods_first_and_one_of_parts() -> None:
    cells = study.plan([1, 2], [4, 3], [-1], ["asymmetric"])
    assert len(set(cells)) == len(cells) == 2 * 2 * len(METHODS) + 2 * len(PARTS)
    assert {cell.method for cell in cells[: 4 * len(METHODS)]} == set(METHODS)
    assert {cell.seed for cell in cells[4 * len(METHODS) :]} == {1}
