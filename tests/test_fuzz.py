"""Readers of files meet changed files: a clear refusal, or something legal, and nothing else.

The long run, with its figures: python -m pytest -m slow tests/test_fuzz.py -s
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fuzz import harness
from tests.fuzz.harness import case, fuzz
from tests.fuzz.readers import READERS, Changed, Reader

ROOT = Path(__file__).parents[1]
FEW = 14
MANY = {
    "sapq": 6000, "sapq-shards": 6000, "sapq-signed": 9000, "gptq-ours": 4000, "gptq": 9000,
    "gptq_v2": 8000, "compressed": 9000, "compressed-ours": 4000, "config": 6000, "onnx": 7000,
    "onnx-old": 4000, "onnx-activations": 4000, "onnx-inspect": 8000, "npy": 7000, "npz": 9000,
    "images": 6000, "report": 6000, "text": 2000,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_few_changed_files(name: str, tmp_path: Path) -> None:
    tally = fuzz(READERS[name](), tmp_path, range(FEW))
    assert not tally.faults
    assert tally.cases == FEW and tally.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files(name: str, tmp_path: Path) -> None:
    """In a process of its own, whose end by a signal would not be the end of this one."""
    progress = tmp_path / "case"
    command = [sys.executable, "-m", "tests.fuzz.harness", name, "--cases", str(MANY[name])]
    ended = subprocess.run(
        [*command, "--progress", str(progress)], cwd=ROOT, capture_output=True, text=True,
        errors="replace", timeout=900,
    )  # fmt: skip
    last = progress.read_text() if progress.exists() else "-"
    assert ended.returncode == 0, f"ended at case {last}: {ended.stderr[-3000:]}"
    found = json.loads(ended.stdout)
    print({key: value for key, value in found.items() if key != "faults"})
    assert not found["faults"]
    assert found["refused"] > 0 and found["accepted"] > 0


def test_the_long_run_is_long() -> None:
    assert MANY.keys() == READERS.keys() and sum(MANY.values()) * 0.97 >= 100_000


# the harness itself


def _reader(read: Any) -> Reader:
    def make(folder: Path) -> None:
        (folder / "text.txt").write_text("abc" * 9)

    return Reader("fake", make, lambda folder, changed: not changed or read())


def _fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "read, fault",
    [
        (lambda: _fail(KeyError("x")), "KeyError: 'x'"),
        (lambda: b"\xff".decode(), "unclear UnicodeDecodeError"),
        (lambda: time.sleep(1), "Hang: more than"),
        (lambda: np.empty(2**40, np.uint8), "MemoryError"),
        (lambda: torch.zeros(2**40), "RuntimeError"),
        (lambda: _fail(AssertionError("accepted")), "AssertionError: accepted"),
    ],
)
def test_a_reader_at_fault_is_seen(
    read: Any, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.02)
    tally = fuzz(_reader(read), tmp_path, range(3))
    assert set(tally.faults) and all(text.startswith(fault) for text in tally.faults.values())


def test_what_one_case_takes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = itertools.accumulate(itertools.repeat(2**26))
    monkeypatch.setattr(harness, "WARM", 0)
    monkeypatch.setattr(harness, "_peak", lambda: next(peaks))  # a real one would be gigabytes
    tally = fuzz(_reader(lambda: True), tmp_path, range(2))
    assert next(iter(tally.faults.values())).startswith("took")


def test_cases_are_the_same_everywhere(tmp_path: Path) -> None:
    reader: Reader = READERS["gptq"]()
    reader.make(tmp_path)
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    here: list[Changed] = [case(files, "gptq", number) for number in range(30)]
    assert here == [case(files, "gptq", number) for number in range(30)]
    assert len({str(changed) for changed in here}) == 30
