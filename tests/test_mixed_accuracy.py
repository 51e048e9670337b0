"""The table of mean bits on a small model: what was measured is kept, and noise is named."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.accuracy import mixed
from sapq_triton.curves import BITS

TESTED: list[nn.Module] = []


def small(options: argparse.Namespace) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()

    def trial(seed: int) -> mixed.Trial:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4, 16, 8, generator=generator)

        def quality(quantized: nn.Module) -> dict[str, float]:
            TESTED.append(quantized)
            change = (quantized(inputs[0]) - model(inputs[0])).abs().mean().item()
            return {"value": 1 + change, "change": change}

        return mixed.Trial(model, list(inputs), quality, {"loss": "squared"}, ())

    return trial


def arguments(path: Path, *others: str) -> list[str]:
    return ["lite0", "--images", str(path), "--json", str(path.with_suffix(".json")), *others]


def test_cells_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mixed.TRIALS, "lite0", (small, 64))
    TESTED.clear()
    path = tmp_path / "images.zip"
    path.write_bytes(b"some data")
    assert mixed.main(arguments(path, "--scores", "fisher")) == 0
    assert len(TESTED) == 2  # uniform and by fisher
    assert mixed.main(arguments(path, "--scores", "fisher", "relative", "--seeds", "1", "2")) == 0
    assert len(TESTED) == 2 + 1 + 3
    capsys.readouterr()
    assert mixed.main(arguments(path, "--scores", "fisher", "relative", "--seeds", "1", "2")) == 0
    assert len(TESTED) == 6
    text = capsys.readouterr().out
    assert f"mean of 4 bits, widths {list(BITS)}, per channel, asymmetric MSE grid" in text
    assert "64 calibration examples, seeds 1, 2" in text and "sample standard deviation" in text
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| uniform", "| fisher", "| relative"]
    for line in lines[-3:]:
        assert "±" in line
    with pytest.raises(SystemExit, match="was measured with"):
        mixed.main(arguments(path, "--mean-bits", "3"))
    monkeypatch.setattr(mixed, "choose", lambda preset: {"starts": 99})
    with pytest.raises(SystemExit, match="was measured with"):
        mixed.main(arguments(path, "--scores", "fisher"))


def test_mean_of_bits_and_noise_of_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mixed.TRIALS, "lite0", (small, 64))
    path = tmp_path / "images.zip"
    path.write_bytes(b"some data")
    options = mixed.arguments_of(arguments(path, "--mean-bits", "3.4", "--scores", "fisher"))
    result = mixed.run(options, small(options))
    assert result["cells"]["uniform | 1"]["mean bits"] == 3
    assert 3 < result["cells"]["fisher | 1"]["mean bits"] <= 3.4
    assert set(result["cells"]["fisher | 1"]["bits"]) == {"0", "2"}
    assert "noise is not known, there is one seed" in mixed.table(result, [1])


def test_data_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mixed.main(["yolov5n", "--images", "some.zip"])
    assert "yolov5n needs --weights" in capsys.readouterr().err
