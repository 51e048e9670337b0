"""What a run takes, and where it ran: seconds, memory, versions."""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("sapq-triton", "torch", "triton", "numpy")


class Stopwatch:
    """Seconds of named stages. A stage inside another one is no part of it: the sum is the whole.

    One thread at a time may be in a stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]  # seconds of the stages within each of those that are open

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.seconds.setdefault(name, 0.0)
        self._inside.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self._inside.pop()
            self._inside[-1] += spent


def environment(device: torch.device) -> dict[str, str]:
    """Versions, device, threads: what could make another machine's figures differ."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed; triton, off Linux
            found[package] = "not installed"
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["device"] = str(device)
    found["device name"] = _device_name(device)
    found["threads"] = str(torch.get_num_threads())
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the peak: of the process since its start, and of its tensors on a CUDA device since
    the start or the last `reset_peak_memory_stats`."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
