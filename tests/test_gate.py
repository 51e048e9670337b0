"""The GPU gate on a CPU: it passes, and a wrong result of any kind ends it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate
from sapq_triton import ops

CHECKS = ["parity", "determinism", "hessian"]
TIMES = ["solve_times", "hessian_times", "kernel_times"]
STAGES = [*CHECKS, "ceilings", *TIMES]


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
    return status, json.loads((out / "cpu-0123abc-quick.json").read_text())


def test_gate_passes(tmp_path: Path) -> None:
    status, report = run(tmp_path, "--no-tests")
    assert (status, report["passed"], report["failures"]) == (0, True, [])
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["commit"] == "0123abc"
    assert not report["tested"]
    assert list(report["stages"]) == list(report["seconds"]) == STAGES
    for rows in report["stages"].values():
        assert rows and all(row["ok"] for row in rows)
    for stage in TIMES:
        assert all(row["reference"] > 0 for row in report["stages"][stage])
    for row in report["stages"]["kernel_times"]:
        assert {"GB/s", "TFLOP/s"} & set(row)
    timed = {row["kernel"].split(",")[0] for row in report["stages"]["kernel_times"]}
    assert timed == {path.stem for path in Path(gate.ROOT, "kernels").glob("[!_]*.py")} - {
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


FAULTS: list[Any] = [  # op, what becomes of its result and arguments, the stage that must notice
    pytest.param(
        "solve_columns",
        lambda out, *_: (first_column_flipped(out[0]), out[1]),
        "parity",
        id="codes",
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
    status, report = run(tmp_path, "--no-tests")
    assert status == 1 and not report["passed"]
    assert report["failures"][0].startswith(f"{stage}: ")
    assert list(report["stages"])[-1] == stage
    assert "not passed" in (tmp_path / "cpu-0123abc-quick.md").read_text()


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
    assert [command[1:3] for command in commands] == [["-m", "pytest"]]
    (row,) = report["stages"]["tests"]
    assert row["failed"] == ["FAILED tests/test_x.py::test_y - assert 1 == 2"]
    assert row["summary"] == "1 failed in 0.01s"
    assert list(report["stages"]) == ["tests"]


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
