"""The GPU gate on a CPU: it passes, and a wrong result of any kind ends it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import carried, carry, gate
from benchmarks.carried import Lite0
from sapq_triton import QuantSpec, layers, ops

TIMES = ["solve_times", "hessian_times", "kernel_times", "model_times"]
STAGES = [stage for stage in gate.LIMITS if stage != "tests"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny problems wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of a quick gate on the CPU."""
    status = gate.main(["--cpu", "--quick", "--commit", "0123abc", "--out", str(out), *arguments])
    part = "-part" if "--stages" in arguments else ""
    return status, json.loads((out / f"cpu-0123abc-quick{part}.json").read_text())


def test_gate_passes(tmp_path: Path) -> None:
    status, report = run(tmp_path, "--no-tests")
    assert (status, report["passed"], report["failures"]) == (0, True, [])
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["commit"] == "0123abc"
    assert not report["tested"] and report["whole"] and report["cut"] == {}
    assert list(report["stages"]) == list(report["seconds"]) == STAGES
    for rows in report["stages"].values():
        assert rows and all(row["ok"] for row in rows)
    for stage in TIMES:
        assert all(row["reference"] > 0 for row in report["stages"][stage])
    assert {row["precision"] for row in report["stages"]["parity"]} == set(gate.PRECISIONS)
    assert all(row["of 3 H + 2 W"] <= 1 for row in report["stages"]["memory"])
    assert report["stages"]["obq_times"][-1]["paper"] == "20–200"
    skipped = report["stages"]["carried"] + report["stages"]["peers"]
    assert len(skipped) == 3 and all(row["skipped"] for row in skipped)
    for row in report["stages"]["kernel_times"]:
        assert {"GB/s", "TFLOP/s"} & set(row)
    timed = {row["kernel"].split(",")[0] for row in report["stages"]["kernel_times"]}
    assert timed == {path.stem for path in Path(gate.ROOT, "kernels").glob("[!_]*.py")} - {
        "codes",
        "launch",
        "rounding",
        "triangle",
    }
    found = {row["ceiling"]: row["rate"] for row in report["stages"]["ceilings"]}
    assert set(found) == {"copy", "float32", "bfloat16"} and min(found.values()) > 0
    page = (tmp_path / "cpu-0123abc-quick.md").read_text()
    assert "cpu, 0123abc: passed" in page
    assert all(f"## {stage}" in page for stage in STAGES)


def first_column_flipped(codes: Tensor) -> Tensor:
    codes[..., 0] ^= 1
    return codes


def one_code_flipped(codes: Tensor) -> Tensor:
    codes[..., 0, 0] ^= 1
    return codes


def more_memory(out: Any, *_: Any) -> Any:
    torch.zeros(2**22)
    return out


FAULTS: list[Any] = [  # op, what becomes of its result and arguments, the stage that must notice
    pytest.param(
        "solve_columns",
        lambda out, *_: (first_column_flipped(out[0]), out[1]),
        "parity",
        id="codes",
    ),
    pytest.param(
        "solve_columns",
        lambda out, *_: (one_code_flipped(out[0]), out[1]),
        "parity",
        id="one-code",
    ),
    pytest.param("solve_columns", more_memory, "memory", id="memory"),
    pytest.param(
        "solve_columns",
        lambda out, *_: (out[0] ^ 15, out[1]),
        "model_times",
        id="codes-of-models",
    ),
    pytest.param(
        "accumulate_hessian",
        lambda out, total, *_: (total.diagonal(dim1=1, dim2=2).mul_(1.001), out)[1],
        "model_times",
        id="diagonal-of-a-block",
    ),
    pytest.param(
        "solve_rows",
        lambda out, *_: (out[0], first_column_flipped(out[1]), out[2]),
        "obq_times",
        id="obq-codes-of-models",
    ),
    pytest.param("compensate", lambda out, w, *_: w.zero_(), "parity", id="lost-weights"),
    pytest.param("downdate", lambda out, a, *_: a.mul_(2), "kernel_times", id="scaled-inverse"),
    pytest.param(
        "accumulate_hessian",
        lambda out, total, *_: (total.diagonal(dim1=1, dim2=2).mul_(1.001), out)[1],
        "hessian",
        id="diagonal",
    ),
    pytest.param(
        "accumulate_hessian",
        lambda out, total, *_: (total.mul_(1 + 1e-6 * torch.rand(())), out)[1],
        "determinism",
        id="another-sum-each-time",
    ),
    pytest.param("column_sensitivity", lambda out, *_: -out, "kernel_times", id="ranking"),
    pytest.param(
        "quantize_groups",
        lambda out, *_: (out[0], out[1] * 1.05, out[2]),
        "kernel_times",
        id="scale",
    ),
    pytest.param(
        "solve_rows",
        lambda out, *_: (out[0], first_column_flipped(out[1]), out[2]),
        "kernel_times",
        id="obq-codes",
    ),
]


@pytest.mark.parametrize("name, fault, stage", FAULTS)
def test_wrong_result_ends_the_gate(
    name: str,
    fault: Callable[..., Any],
    stage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **kw: fault(right(*args, **kw), *args))
    status, report = run(tmp_path, "--stages", stage, "peers")
    assert status == 1 and not report["passed"] and not report["whole"]
    assert report["failures"][0].startswith(f"{stage}: ")
    assert list(report["stages"]) == [stage]
    assert "not passed" in (tmp_path / "cpu-0123abc-quick-part.md").read_text()


def test_model_that_holds_other_weights_ends_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layers.store_weight
    monkeypatch.setattr(layers, "store_weight", lambda layer, w: right(layer, w * 1.01))
    status, report = run(tmp_path, "--stages", "model_times")
    assert status == 1 and "holds other weights" in report["failures"][0]


# --- what is carried in ---------------------------------------------------------------------------


class SmallNetwork(Lite0):
    def build(self) -> nn.Module:
        layers_ = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers_, nn.Linear(8 * 6**2, 10))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It holds one of two networks."""
    monkeypatch.setattr(gate, "NETWORKS", {"small": SmallNetwork, "absent": SmallNetwork})
    pixels = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8).numpy()
    images = {"pixels": pixels, "labels": torch.randint(0, 10, (24,)).numpy()}
    carry.pack(tmp_path / "carried", "small", SmallNetwork.build(None).state_dict(), images, 8)
    return tmp_path / "carried"


def test_carried_network_is_quantized_here_and_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    status, report = run(tmp_path, "--stages", "carried", "--carried", str(folder))
    assert status == 0
    row, absent = report["stages"]["carried"]
    assert row["model"] == "small" and row["images"] == [8, 16] and row["change"] == 0
    assert absent["model"] == "absent" and absent["skipped"]


def test_carried_network_that_comes_out_worse_ends_the_gate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, bits = carried.quantize, iter((3, 4))
    monkeypatch.setattr(
        carried, "quantize", lambda m, x, spec, **kw: right(m, x, QuantSpec(next(bits)), **kw)
    )
    status, report = run(tmp_path, "--stages", "carried", "--carried", str(folder))
    assert status == 1 and report["failures"][0].startswith("carried: ")
    assert len(report["stages"]["carried"]) == 1


@pytest.mark.parametrize("status", [0, 1])
def test_peers_run_with_what_was_carried_in(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.whl").touch()
    seen = {}

    class Done:
        returncode, stdout = status, "AssertionError: other codes"

    def peers(command: list[str], env: dict[str, str], **_: object) -> type[Done]:
        seen.update(command=command, path=env["PYTHONPATH"])
        row = {"solver": "ours", "seconds": 0.1, "ratios": {"natural": 1.0}}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [row]}))
        return Done

    monkeypatch.setattr(gate.subprocess, "run", peers)
    got, report = run(tmp_path, "--stages", "peers", "--peers", str(tmp_path))
    assert got == status
    assert seen["command"][1:5] == ["-m", "benchmarks.peers", "--device", "cpu"]
    assert seen["path"].split(":")[:2] == [str(tmp_path), str(tmp_path / "some.whl")]
    (row,) = report["stages"]["peers"]
    if status:
        assert "other codes" in row["last"]
    else:
        assert row == {"solver": "ours", "seconds": 0.1, "/ ours natural": 1.0, "ok": True}


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, passed", [("hessian", False), ("peers", True)])
def test_stage_over_its_limit_is_cut_short(name: str, passed: bool) -> None:
    """Timings may be missing; checks may not."""
    report: dict[str, Any] = {
        "stages": {}, "seconds": {}, "failures": [], "cut": {}, "passed": False
    }  # fmt: skip
    stages = {name: lambda: iter([{"ok": True}] * 3), "solve_times": lambda: iter([{"ok": True}])}
    written = []
    gate.run(stages, {name: -1.0, "solve_times": 60.0}.__getitem__, report, written.append)
    assert report["stages"] == {name: [{"ok": True}], "solve_times": [{"ok": True}]}
    assert list(report["cut"]) == [name]
    assert report["passed"] is passed and bool(report["failures"]) is not passed
    assert written[-1] is report


def test_limits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gate.Gate(gate.FULL, torch.device("cuda"), started=1000.0)
    monkeypatch.setattr(gate.time, "perf_counter", lambda: 1000.0)
    assert made.limit("parity") == gate.LIMITS["parity"]
    monkeypatch.setattr(gate.time, "perf_counter", lambda: 1000.0 + gate.LIMIT - 7)
    assert made.limit("parity") == 7
    assert replace(made, device=torch.device("cpu")).limit("parity") == float("inf")


def test_crash_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "solve_columns", crash)
    status, report = run(tmp_path, "--no-tests")
    assert status == 1
    assert report["failures"] == ["parity: RuntimeError: an illegal memory access was encountered"]


@pytest.mark.parametrize("returncode", [1, 5])
def test_failing_suite_ends_the_gate(
    returncode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        stdout = "FAILED tests/test_x.py::test_y - assert 1 == 2\n=== 1 failed in 0.01s ==="

    Done.returncode = returncode
    commands = []
    monkeypatch.setattr(gate.subprocess, "run", lambda c, **_: commands.append(c) or Done)
    status, report = run(tmp_path)
    assert status == 1 and report["tested"]
    # what `platform` runs is not asked for
    assert [x[1:3] for x in commands if "pytest" in x] == [["-m", "pytest"]]
    (row,) = report["stages"]["tests"]
    assert row["failed"] == ["tests/test_x.py::test_y"]
    assert row["summary"] == "1 failed in 0.01s"
    assert list(report["stages"]) == ["tests"]


def test_a_suite_that_takes_too_long_ends_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what had failed until then. The suite here is a program that prints, and goes on."""
    printed = (
        "[gw1] [ 7%] FAILED tests/test_x.py::test_y[a b] \\n[gw0] [ 8%] PASSED tests/test_z.py"
    )
    program = f"print('{printed}', flush=True); import time; time.sleep(60)"
    real = subprocess.run
    other = [sys.executable, "-c", program]
    monkeypatch.setattr(gate.subprocess, "run", lambda _, **options: real(other, **options))
    monkeypatch.setattr(gate.Gate, "limit", lambda *_: 2.0)
    made = gate.Gate(gate.TINY, torch.device("cuda"))
    (row,) = made.tests()
    assert not row["ok"] and row["status"] == -1
    assert row["failed"] == ["tests/test_x.py::test_y[a b]"]
    assert row["summary"] == "stopped after 2 s"


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gate.main(["--out", str(tmp_path / "new")]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_interpreted_kernels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gate.main(["--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
