"""What a run records, and that its JSON gives it back."""

import copy
import json
import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sapq_triton import QuantSpec, Report, quantize, read_report, save_report
from sapq_triton.machine import Stopwatch, environment, peak_memory
from sapq_triton.plain import encode
from sapq_triton.report import packed_bytes
from sapq_triton.report_files import JSON, PAGE, report_files
from tests.reports import EMPTY, of_layers, real_report


def without_codes(report: Report) -> Report:
    return replace(report, layers=tuple(replace(x, quantized=None) for x in report.layers))


@pytest.mark.parametrize("report", [real_report(), of_layers(200), EMPTY], ids=["real", "200", "0"])
def test_round_trip(report: Report, tmp_path: Path) -> None:
    save_report(report, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {JSON, PAGE}
    for path in (tmp_path / "run", tmp_path / "run" / JSON):
        again = read_report(path)
        assert again == without_codes(report)
        assert str(again) == str(report) and again.to_json() == report.to_json()
        assert (again.bytes, again.mean_bits) == (report.bytes, report.mean_bits)


def test_scalars_of_numpy_are_numbers() -> None:
    scalars = {"a": np.bool_(True), "b": (np.int64(3), np.float32(0.5)), "c": np.float16("nan")}
    assert encode(scalars) == {"a": True, "b": [3, 0.5], "c": "NaN"}
    options = dict(bias_correction=np.bool_(True), pack=np.bool_(True), progress=False)
    report = quantize(nn.Sequential(nn.Linear(6, 5)), [torch.randn(9, 6)], QuantSpec(4), **options)
    assert Report.from_json(report.to_json()) == without_codes(report)


def test_what_is_read_has_no_codes(tmp_path: Path) -> None:
    save_report(real_report(), tmp_path)
    layer = read_report(tmp_path).layers[0]
    assert layer.quantized is None
    for call in (lambda: layer.codes, lambda: layer.scale, lambda: layer.dequantize()):
        with pytest.raises(
            ValueError, match=r"read from a file: the codes of '0' are in the model"
        ):
            call()


def test_the_file_is_strict_json_with_a_line_for_each_layer(tmp_path: Path) -> None:
    layer = real_report().layers[0]
    odd = replace(layer, name="é\ud800\n", error=math.inf, energy=math.nan, nearest_error=-math.inf)
    report = replace(real_report(), layers=(layer, odd))
    text = report_files(report)[JSON]
    assert text.isascii() and "NaN" in text

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)
    assert sum(line.startswith("    {") for line in text.splitlines()) == 2
    (tmp_path / JSON).write_text(text)
    again = read_report(tmp_path).layers[1]
    assert (again.name, again.error, again.nearest_error) == (odd.name, math.inf, -math.inf)
    assert math.isnan(again.energy)


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The JSON of a report with another value somewhere; Ellipsis: without it."""
    content: Any = copy.deepcopy(of_layers(2).to_json())
    inside = content
    for step in path[:-1]:
        inside = inside[step]
    if value is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return dict(content)


DAMAGED: list[tuple[tuple[str | int, ...], object, str]] = [
    (("schema",), "other", "is not a report: its schema is not 'sapq-triton report'"),
    (("version",), 2, "has version 2; this program reads 1"),
    (("layers",), ..., "layers is missing"),
    (("seconds",), "long", "seconds must be a number, got 'long'"),
    (("seconds",), True, "seconds must be a number, got True"),
    (("surprise",), 1, "surprise is not known here"),
    (("memory", "process"), 1.5, r"memory\['process'\] must be an integer, got 1\.5"),
    (("memory", "process"), 2**63, r"memory\['process'\] must be an integer, got 9223"),
    (("layers", 0, "columns", "columns"), 10**400, r"columns\.columns must be an integer, got 1"),
    (("seconds",), 10**400, "seconds must be a number, got 1000"),
    (("layers", 1, "error"), None, r"layers\[1\]\.error must be a number, got None"),
    (("layers", 1, "damp"), ..., r"layers\[1\]\.damp is missing"),
    (("layers", 0, "matrix"), [1, 2], r"layers\[0\]\.matrix must be a list of 3, got \[1, 2\]"),
    (("layers", 0, "order"), "random", r"layers\[0\]\.order must be one of \('sensitivity'"),
    (("layers", 0, "spec", "bits"), 9, r"layers\[0\]\.spec: bits must be an integer from 2 to 8"),
    (("layers", 0, "spec", "sparsity"), [], r"sparsity must be a string or a number or null, got"),
    (("layers", 0, "columns", "counts", 3), "x", r"columns\.counts\[3\] must be an integer"),
    (
        ("layers", 0, "columns", "low"),
        -3e13,
        r"low and high must be in order, from -330\.0 to 308\.9",
    ),
    (("layers", 0, "columns", "high"), 309.0, r"low and high must be in order, from .* and 309\.0"),
    (("layers", 0, "columns", "high"), "NaN", "low and high must be in order, from .* and nan"),
    (("layers", 0, "columns"), 7, r"layers\[0\]\.columns must be an object, got 7"),
    (("layers", 0, "notes"), "none", r"layers\[0\]\.notes must be a list, got 'none'"),
    (("skipped",), ["a"], r"skipped must be an object, got \['a'\]"),
]


@pytest.mark.parametrize("path, value, message", DAMAGED)
def test_damaged_files(
    path: tuple[str | int, ...], value: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / JSON).write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError, match=rf"report\.json: .*{message}"):
        read_report(tmp_path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json is not a file"):
        read_report(tmp_path)
    for content, message in (
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"seconds": NaN}', "NaN is no number of JSON"),
        (b"[1, 2]", "is not a report"),
        (b"{}", "is not a report"),
    ):
        (tmp_path / JSON).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_report(tmp_path)


def test_what_is_recorded_of_a_run() -> None:
    report = real_report()
    assert [x.name for x in report.layers] == ["0", "3", "6"]
    options = report.options
    assert options["preset"] == "best" and options["order"] == "sensitivity"
    assert options["damp"] is None and options["drift_correction"] is None
    assert options["skip"] == ["8"] and options["batches"] == 4
    assert options["model"] == "Sequential"
    spec, overrides = options["spec"], options["overrides"]
    assert isinstance(spec, dict) and isinstance(overrides, dict)
    assert (spec["bits"], overrides["6"]["group_size"]) == (4, 27)
    assert list(report.stages) == [
        "first forward pass", "second forward pass", "Hessians", "solves",
        "rounding to nearest, to compare",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in report.stages.values())
    assert 0.5 * report.seconds < sum(report.stages.values()) <= report.seconds
    hessians = sum(x.seconds_hessian for x in report.layers)
    assert report.stages["Hessians"] == pytest.approx(hessians, rel=0.05)
    assert 2**24 < report.memory["process"] <= 1024 * resource.getrusage(0).ru_maxrss
    assert report.environment["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report.environment["threads"] == str(torch.get_num_threads())
    first, depthwise, last = report.layers
    assert (first.matrix, depthwise.matrix, last.matrix) == ((1, 6, 27), (6, 1, 9), (1, 8, 54))
    assert first.dead_columns == 9 and first.columns.free == 9
    assert depthwise.columns.columns == 9 and sum(depthwise.columns.counts) <= 54
    assert last.spec.bits == 3 and last.bytes == packed_bytes(8, 54, last.spec)
    zeros = last.codes == last.zero_point.repeat_interleave(27, 2)
    assert last.sparsity == float(zeros.double().mean())
    assert report.mean_bits == (4 * (6 * 27 + 54) + 3 * 8 * 54) / (6 * 27 + 54 + 8 * 54)
    ratios = [x.error / x.nearest_error for x in report.layers]
    assert report.nearest_ratio == pytest.approx(math.prod(ratios) ** (1 / 3))


@pytest.mark.parametrize("replay", [False, True])
def test_stages_of_all_that_a_run_may_do(replay: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    batches = list(torch.randn(18, 6).split(6))
    report = quantize(
        model, batches, QuantSpec(4), batchnorm="reestimate", pack=True, replay=replay,
        progress=False,
    )  # fmt: skip
    assert report.stages.keys() >= {"BatchNorm statistics", "packing"}
    assert report.options["pack"] is True and report.options["replay"] is replay
    read = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert read == without_codes(report)


def test_patterns_may_come_from_a_generator() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    skip = (name for name in ["1"])
    report = quantize(model, [torch.randn(9, 6)], QuantSpec(4), skip=skip, progress=False)
    assert report.options["skip"] == ["1"] and set(report.skipped) == {"1"}


def test_nothing_to_compare_with() -> None:
    layer = replace(real_report().layers[0], error=0.0, energy=0.0, nearest_error=0.0)
    assert (layer.nearest_ratio, layer.nearest_relative_error) == (None, 0.0)
    report = replace(EMPTY, layers=(layer,))
    assert report.nearest_ratio is None
    assert str(report).splitlines()[1].split()[5] == "-"
    exact = replace(layer, energy=2.0, nearest_error=1.0)
    assert replace(EMPTY, layers=(exact,)).nearest_ratio is None  # 0 has no logarithm


def test_stages_inside_each_other_add_up() -> None:
    stopwatch = Stopwatch()
    started = time.perf_counter()
    with stopwatch.stage("outer"):
        time.sleep(0.01)
        for _ in range(2):
            with stopwatch.stage("inner"):
                time.sleep(0.02)
                with stopwatch.stage("innermost"):
                    time.sleep(0.03)
    whole = time.perf_counter() - started
    assert sum(stopwatch.seconds.values()) == pytest.approx(whole, abs=0.005)
    assert stopwatch.seconds["innermost"] >= 0.06
    assert 0.04 <= stopwatch.seconds["inner"] <= whole - 0.07
    with pytest.raises(KeyError), stopwatch.stage("failing"):
        raise KeyError
    assert stopwatch.seconds["failing"] >= 0


def test_the_machine(device: torch.device) -> None:
    found = environment(device)
    assert found["device"] == str(device) and found["device name"]
    assert all(isinstance(value, str) for value in found.values())
    assert ("device" in peak_memory(device)) is (device.type == "cuda")
