"""The headline on small shapes: whole models are sums of their layers, groups included."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import headline, obq
from benchmarks.shapes import (
    Layer,
    counted,
    efficientnet_lite0,
    llama_3_8b,
    llama_3_8b_solves,
    resnet50,
)
from sapq_triton import ops

CPU = torch.device("cpu")
# at import: `torch.device("meta")` remembers the allocators that it first meets, which a fixture of
# conftest.py replaces during each test
RESNET_50 = counted(resnet50())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_headline_sums_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "QUICK_COLUMNS", 30)
    arguments = ["--quick", "--device", "cpu", "--commit", "0123abc", "--out", str(tmp_path)]
    assert headline.main([*arguments, "--models", "EfficientNet-Lite0"]) == 0
    report = json.loads((tmp_path / "headline-cpu-quick.json").read_text())
    assert report["environment"]["commit"] == "0123abc"
    (total,) = report["models"]
    shapes = report["shapes"]
    assert {shape["row"]["groups"] for shape in shapes} >= {1, 32}  # one of them is depthwise
    assert total["layers"] == sum(shape["count"] for shape in shapes)
    for name in ("sapq", "obq", "literal"):
        assert total[name] == pytest.approx(
            sum(shape["count"] * shape["row"][name] for shape in shapes)
        )
    assert total["OBQ / SAPQ"] == total["obq"] / total["sapq"]
    assert total["paper"] == "20–200"
    assert report["released"]["released s"] > 0


def test_slow_obq_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "QUICK_COLUMNS", 9)
    monkeypatch.setattr(headline, "QUICK_RELEASED", headline.QUICK_RELEASED | {"at_least": 1e6})
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert headline.main([*arguments, "--models", "EfficientNet-Lite0"]) == 1


@pytest.mark.parametrize("groups, rows, columns", [(1, 6, 48), (12, 1, 9), (4, 3, 20)])
def test_forms_of_obq_agree(groups: int, rows: int, columns: int) -> None:
    made = obq.Problem.of(Layer("", groups, rows, columns, (groups * columns,)), CPU)
    assert obq.check(made) == (min(8, groups * rows), columns)
    obq.check_setting(made, obq.Setting(4, 16))


@pytest.mark.parametrize("groups", [1, 8])
def test_wrong_obq_is_not_timed(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.solve_rows

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        picked, codes, rows = right(*args, **kwargs)
        codes[0, -1] ^= 1
        return picked, codes, rows

    made = obq.Problem.of(Layer("", groups, 8, 24, (groups * 24,)), CPU)
    monkeypatch.setattr(ops, "solve_rows", wrong)
    with pytest.raises(AssertionError, match="agree on"):
        obq.check(made)


def test_counts_of_layers() -> None:
    assert sum(RESNET_50.values()) == 54 and len(RESNET_50) < 30
    assert {layer.shape: n for layer, n in RESNET_50.items()}[1, 256, 2304] == 6
    assert any(layer.groups == 1152 for layer in counted(efficientnet_lite0()))


def test_layers_that_share_an_input_are_one_solve() -> None:
    sizes = [(layer.rows, layer.columns) for layer in llama_3_8b_solves()]
    assert sizes == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    weights = (
        sum(x.rows * x.columns for x in found()) for found in (llama_3_8b, llama_3_8b_solves)
    )
    assert len(set(weights)) == 1
