"""Time calls side by side on one device, beside what that device can do at best."""

import gc
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sapq_triton import ops
from sapq_triton.ops import Backend

Key = TypeVar("Key")

ROOT = Path(__file__).parents[1]
MIN_ROUNDS, MAX_ROUNDS = 3, 100
HESSIANS_ALLOWED, WEIGHTS_ALLOWED = 3, 2  # peak extra memory of a solve
CACHE = 2**29  # bytes written before each timed call on a GPU: more than any L2 cache


@dataclass(frozen=True)
class Case:
    """A call to time, and how to know that what it computes is right.

    check: raises AssertionError for a wrong result. moved: bytes that must cross memory at least
    once. flops: multiplications and additions. dtype: of the inputs, "float32" or "bfloat16", and
    so of the ceiling.
    """

    call: Callable[[Backend], object]
    check: Callable[[Backend], None]
    moved: int = 0
    flops: int = 0
    dtype: str = "float32"
    weight: int = 0
    hessian: int = 0


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- time -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _scratch(device: torch.device) -> Tensor:
    return torch.empty(CACHE, dtype=torch.int8, device=device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call. On a GPU between two events behind a write that empties the cache.

    That write also gives the launches a head start, so that a short kernel is not timed by them.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _scratch(device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    *,
    budget: float = 1.0,
    least: int = MIN_ROUNDS,
    warm: bool = False,
) -> dict[Key, float]:
    """Median seconds of each call; they take turns, for about `budget` seconds in all.

    A warm-up round, not counted, compiles and allocates, unless they are `warm` already; a second
    one sets the number of rounds, `least` at least.
    """
    for call in calls.values() if not warm else ():
        call()
    synchronize(device)
    times = {name: [seconds(call, device)] for name, call in calls.items()}
    round_ = sum(first for (first,) in times.values())
    rounds = min(max(int(budget / max(round_, 1e-9)), least), MAX_ROUNDS)
    for _ in range(rounds - 1):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: median(taken) for name, taken in times.items()}


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what was there before it; its result counts.

    On a GPU as the allocator counts them, on a CPU as the profiler does: temporaries inside an
    operator are seen, those of NumPy are not.
    """
    call()  # compiled kernels and workspaces of libraries come once
    gc.collect()  # what is freed during the second call would hide as much of what it takes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # acc_events: without it torch 2.11 warns of what is of no concern here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def memory(
    call: Callable[[], object], weight: int, hessian: int, device: torch.device
) -> dict[str, float]:
    """Peak extra memory of a call in units of its weight and Hessian, and of what it may take."""
    peak = peak_memory(call, device)
    allowed = HESSIANS_ALLOWED * hessian + WEIGHTS_ALLOWED * weight
    return {
        "extra MiB": peak / 2**20,
        "of Hessian": peak / hessian,
        "of weight": peak / weight,
        "of 3 H + 2 W": peak / allowed,
    }


# --- what a device can do -------------------------------------------------------------------------


@cache
def ceilings(device: torch.device) -> dict[str, float]:
    """copy: GB/s, bytes read and bytes written; float32 and bfloat16: TFLOP/s of a matrix product.

    float32 is what PyTorch does by default: no TF32.
    """
    gpu = device.type == "cuda"
    source = torch.zeros(2**30 if gpu else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    side = 8192 if gpu else 512
    factors = [torch.randn(side, side, device=device).to(d) for d in (torch.float, torch.bfloat16)]
    for matrix in factors:
        calls[str(matrix.dtype).removeprefix("torch.")] = partial(torch.matmul, matrix, matrix)
    best = interleaved(calls, device, budget=1.0 if gpu else 0.3)
    work = {"copy": 2 * size(source) * 1e-9}
    return {name: work.get(name, 2 * side**3 * 1e-12) / taken for name, taken in best.items()}


def rates(case: Case, taken: float, device: torch.device) -> dict[str, float]:
    """GB/s and TFLOP/s of a case that took so many seconds, and the fraction of the ceiling."""
    out = {}
    if case.moved:
        out["GB/s"] = case.moved / taken * 1e-9
        out["of copy"] = out["GB/s"] / ceilings(device)["copy"]
    if case.flops:
        out["TFLOP/s"] = case.flops / taken * 1e-12
        out["of matmul"] = out["TFLOP/s"] / ceilings(device)[case.dtype]
    return out


# --- where, with what -----------------------------------------------------------------------------


@cache
def commit() -> str:
    """Of the checkout, with "-dirty" where tracked files were changed; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def environment(
    device: torch.device, *, at: str | None = None, of: str | None = None
) -> dict[str, Any]:
    """Device, versions, commit `of` and date `at`: those of the checkout and of now by default."""
    gpu = device.type == "cuda"
    triton = None
    if ops.HAS_TRITON:
        import triton as module

        triton = module.__version__
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda if gpu else None,
        "commit": of or commit(),
        "date": at or datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# --- reports --------------------------------------------------------------------------------------


def record(
    benchmark: Any, case: Case, backend: Backend, device: torch.device, **info: object
) -> None:
    """Check a case, then time it with pytest-benchmark, and note what the time means.

    The table shows the time of a call as its caller sees it, launches included; `extra_info` has
    the rates, on a GPU from the time that the device took.
    """
    case.check(backend)

    def call() -> None:
        case.call(backend)
        synchronize(device)

    benchmark(call)
    benchmark.extra_info.update(environment(device), backend=backend, **info)
    if not benchmark.disabled:
        taken = benchmark.stats.stats.median
        if device.type == "cuda":
            taken = interleaved({"": lambda: case.call(backend)}, device, budget=0.2)[""]
            benchmark.extra_info["device seconds"] = taken
        benchmark.extra_info.update(rates(case, taken, device), ceilings=ceilings(device))
        if case.weight:
            used = memory(lambda: case.call(backend), case.weight, case.hessian, device)
            benchmark.extra_info.update(used)


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; floats with three digits."""

    def line(cells: Iterable[object]) -> str:
        return (
            "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )

    head = tuple(header)
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
