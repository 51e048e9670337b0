"""Quantizing again and again takes no more memory, files or threads than at first.

The figures: python -m pytest -m slow tests/test_soak.py -s
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, quantize, save

ROOT = Path(__file__).parents[1]
WARM, RUNS = 100, 300  # allocators and caches fill for some 80 runs
SPEC = QuantSpec(4, symmetric=False, scale_dtype="float16")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.query, self.key = nn.Linear(16, 32), nn.Linear(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.stem(x)).relu()).mean((2, 3))
        return self.head(self.query(x) * self.key(x))


def once(folder: Path, number: int) -> None:
    """One model there and back, and one that fails half-way, by an exception in the second pass."""
    torch.manual_seed(number)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    model = Mixed().eval()
    report = quantize(model, batches, SPEC, pack=True, progress=False, replay=number % 2 == 0)
    save(model, folder / "net", report=report)
    loaded = load(folder / "net", Mixed().eval())
    assert torch.equal(loaded(batches[0]), model(batches[0]))

    calls = []

    def forward(module: nn.Module, batch: Tensor) -> object:
        calls.append(1)
        output = module(batch)
        if len(calls) > 6:
            raise KeyError("on purpose")
        return output

    with pytest.raises(KeyError):
        quantize(Mixed().eval(), batches, SPEC, forward=forward, progress=False)


def once_onnx(folder: Path, number: int) -> None:
    import onnx

    from sapq_triton.formats.onnx import inspect_onnx, quantize_onnx
    from tests.fuzz.readers import small_cnn

    source, out = folder / "model.onnx", folder / "out.onnx"
    onnx.save(small_cnn(), source)
    images = np.random.default_rng(number).standard_normal((8, 3, 4, 4)).astype(np.float32)
    spec = QuantSpec(4, symmetric=True)
    quantize_onnx(source, images, spec, out, activations="uint8", progress=False)
    assert inspect_onnx(out)


def measure() -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "anonymous KiB": int(anonymous.split()[1]),
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "tensors": sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
    }


def soak(run: Callable[[Path, int], None], folder: Path, warm: int, runs: int) -> Any:
    for number in range(warm):
        run(folder, number)
    before = measure()
    for number in range(warm, runs):
        run(folder, number)
    after = measure()
    print({name: (before[name], after[name]) for name in before})
    return {name: after[name] - before[name] for name in before}


def assert_flat(grown: dict[str, int], runs: int) -> None:
    """By less than one small thing in a run. safetensors 0.8 itself keeps an integer or two of each
    tensor that it reads, 30 bytes each: 4 KiB in a run.
    """
    assert grown["threads"] <= 0 and grown["files"] <= 0 and grown["tensors"] <= 0
    assert grown["objects"] < runs
    assert grown["anonymous KiB"] < 8 * runs


@pytest.mark.slow
@pytest.mark.parametrize("run", ["once", "once_onnx"])
def test_two_hundred_runs_are_flat(run: str) -> None:
    """In a process of its own: a test run has memory of its own as well."""
    command = [sys.executable, "-m", "tests.test_soak", run]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(ended.stdout)
    assert_flat(json.loads(ended.stdout.splitlines()[-1]), RUNS - WARM)


def test_a_few_runs_leave_no_tensor_file_or_thread(tmp_path: Path) -> None:
    grown = soak(once, tmp_path, 1, 2)
    assert grown["threads"] <= 0 and grown["files"] <= 0 and grown["tensors"] <= 0


def test_leaks_are_seen(tmp_path: Path) -> None:
    kept: list[Any] = []
    ended = threading.Event()

    def leak(folder: Path, number: int) -> None:
        kept.extend([torch.zeros(1), open(os.devnull), b"x" * 2**20, {"a": []}])  # noqa: SIM115
        threading.Thread(target=ended.wait, daemon=True).start()

    try:
        grown = soak(leak, tmp_path, 1, 40)
    finally:
        ended.set()
        for file in kept[1::4]:
            file.close()
    flat = dict.fromkeys(grown, 0)
    assert_flat(flat, 39)
    for name, by in grown.items():
        with pytest.raises(AssertionError):
            assert_flat(flat | {name: by}, 39)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"once": once, "once_onnx": once_onnx}[sys.argv[1]]
        print(json.dumps(soak(chosen, Path(folder), WARM, RUNS)))
