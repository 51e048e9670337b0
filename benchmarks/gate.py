"""What a GPU must show: right results first, then how fast they come.

    python -m benchmarks.gate --out benchmarks/results

tests         those that run on a device, in processes of their own
parity        solve on kernels against the reference path, small ones in each precision, and
              against a textbook form in float64; in a static order every code must be the nearest
              one, given those before it, but for close calls
determinism   ten runs, bit for bit
hessian       X^T X of the kernels against float64
memory        peak extra memory of solve, at most 3 Hessians and 2 weights
ceilings      of the device: copy, matrix product
solve_times   the solver alone (measure=False: the error of the result is not computed)
hessian_times from calibration data in batches
kernel_times  each kernel, against the ceilings
model_times   ResNet-50 with the Hessians given, and with calibration on images at random weights;
              a block of Llama-3-8B with its Hessians; experts, in one batch and one by one
obq_times     SAPQ against exact OBQ on the shapes of ResNet-50, see `benchmarks.headline`
carried       networks as they were taught, quantized here and on the CPU, see `benchmarks.carried`:
              with --carried DIR, which `benchmarks.carry` fills
peers         other implementations, see `benchmarks.peers`; --peers DIR adds a folder, or the
              wheels in it, to the path

The stages run in this order and the first wrong result ends the gate: nothing wrong is timed. Each
has a limit of seconds, and all together nine minutes: a stage that reaches its limit is cut short,
which the report says; one of the checks cut short fails the gate. One JSON for each device and
commit, and a Markdown table beside it, are written in any case.

Exit status: 0 passed, 1 something is wrong, 2 there is no GPU. --cpu runs small sizes on the
reference path instead, which tests the gate and says nothing about kernels.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import (
    bench_accumulate_hessian,
    bench_column_sensitivity,
    bench_compensate,
    bench_dequantize_packed,
    bench_downdate,
    bench_experts,
    bench_hessian,
    bench_matmul_packed,
    bench_models,
    bench_quantize_groups,
    bench_solve_columns,
    bench_solve_rows,
    headline,
)
from benchmarks.bench_accumulate_hessian import CONVOLUTIONS, DEPTHWISE, LINEAR, SMALL
from benchmarks.bench_models import total_error
from benchmarks.bench_solve import BLOCK, SWEEPS, error_ratio, in_same_order, textbook, tolerance
from benchmarks.bench_solve_columns import TIE
from benchmarks.carried import NETWORKS, end_to_end
from benchmarks.carry import read
from benchmarks.measure import (
    ROOT,
    Case,
    ceilings,
    environment,
    interleaved,
    markdown,
    memory,
    rates,
    seconds,
    size,
)
from benchmarks.shapes import LLAMA_3_8B, Layer, inputs, problem
from sapq_triton import QuantSpec, SolveResult, solve
from sapq_triton.hessian import HessianSum, feedback_factor
from sapq_triton.ops import Backend, Precision
from sapq_triton.spec import Order

LIMIT = 540  # seconds of all stages together
LIMITS = {
    "tests": 180,
    "parity": 120,
    "determinism": 30,
    "hessian": 30,
    "memory": 30,
    "ceilings": 5,
    "solve_times": 40,
    "hessian_times": 25,
    "kernel_times": 25,
    "model_times": 75,
    "obq_times": 60,
    "carried": 90,
    "peers": 150,  # one of them compiles for a minute
}
CHECKS = ("tests", "parity", "determinism", "hessian", "memory")  # must come to their end
HESSIAN_TOLERANCE = 1e-4  # of sqrt(H_ii H_jj)
RUNS = 10
FAILED = re.compile(r"(?:FAILED|ERROR) (tests/.*?)(?: - .*| *)$")  # of a line of pytest's
PROCESSES = 12  # that share a GPU for the tests
OPTIONS: dict[str, Any] = {"block": BLOCK, "sweeps": SWEEPS}
ORDERS: tuple[Order, ...] = ("natural", "activation", "sensitivity")
DTYPES = (torch.float32, torch.bfloat16)
# how far from 1 the ratio of errors may be, in units of `tolerance`, and which part of the codes
# may differ from the reference where both took the same order: a close call changes what follows
PRECISIONS: dict[Precision, tuple[float, float]] = {
    "ieee": (1, 0.02),
    "tf32x3": (1, 0.02),
    "tf32": (3, 0.05),
}
# the reference path is timed, and other precisions than the default are compared, up to these
REFERENCE_ELEMENTS, REFERENCE_COLUMNS = 2**20, 4608

Result = dict[str, Any]  # one row of a table; "ok" tells whether it is right


@dataclass(frozen=True)
class Sizes:
    """What is run.

    solves: R, C, compared and timed. large: only timed, behind a shorter check. hessians: layer,
    images or tokens in a batch. obq: rows, columns, steps. block: as in `bench_models.BLOCKS`.
    images: as in `bench_models.IMAGES`. models: by name, their layers divided by `shrunk`, each in
    all `orders`.
    budget: seconds for one row of timings; three rounds are made in any case.
    """

    solves: tuple[tuple[int, int], ...]
    hessians: tuple[tuple[Layer, int], ...]
    obq: tuple[int, int, int]
    block: tuple[int, int, int]
    images: tuple[bool, int, int, int]
    large: tuple[tuple[int, int], ...] = ()
    memory: tuple[tuple[int, int], ...] = ()
    models: tuple[str, ...] = ("ResNet-50", "YOLOv5s")
    orders: tuple[Order, ...] = ("activation", "sensitivity")
    shrunk: int = 1
    group_size: int = 128
    budget: float = 0.5


FULL = Sizes(
    solves=((2048, 512), (512, 4608), (4096, 4096)),
    large=((14336, 4096), (4096, 14336), (8192, 28672)),
    memory=((512, 4608), (4096, 4096), (14336, 4096)),
    hessians=(
        (LINEAR["q_proj"], 65536),
        (LINEAR["down_proj"], 65536),
        (CONVOLUTIONS["layer3.1.conv2"], 256),
    ),
    obq=(1024, 512, 32),
    block=(1, 16, 16384),
    images=(True, 224, 1024, 64),
)
QUICK = Sizes(
    solves=((128, 576), (512, 512)),
    memory=((256, 1024),),
    hessians=((Layer("256 columns", 1, 256, 256, (256,)), 2048), (SMALL, 32), (DEPTHWISE, 8)),
    obq=(64, 256, 32),
    block=(32, 2, 512),
    images=(False, 32, 8, 4),
    shrunk=8,
    budget=0.3,
)
TINY = Sizes(
    solves=((64, 160),),
    memory=((64, 512),),
    hessians=((Layer("64 columns", 1, 64, 64, (64,)), 256), (SMALL, 4), (DEPTHWISE, 2)),
    obq=(8, 64, 16),
    block=(64, 2, 256),
    images=(False, 32, 2, 1),
    models=("ResNet-50",),
    orders=("sensitivity",),
    shrunk=32,
    group_size=32,
    budget=0.0,
)


@dataclass(frozen=True)
class Gate:
    """The stages; each yields rows."""

    sizes: Sizes
    device: torch.device
    carried_in: Path | None = None
    peers_in: Path | None = None
    commit: str | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def backend(self) -> Backend:
        """What stands to the proof: on a CPU only the reference path can."""
        return "triton" if self.device.type == "cuda" else "reference"

    @property
    def backends(self) -> tuple[Backend, ...]:
        return ("triton", "reference") if self.backend == "triton" else ("reference",)

    def limit(self, stage: str) -> float:
        """Seconds that a stage may take from now on; a CPU, which only tests this, may be slow."""
        if self.device.type == "cpu":
            return float("inf")
        left = LIMIT - (time.perf_counter() - self.started)
        return max(1.0, min(LIMITS[stage], left))

    # --- checks

    def tests(self) -> Iterator[Result]:
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short"]
        command += ["-m", "(device or gpu) and not slow"]
        if find_spec("xdist"):  # most of the time compiles kernels
            command += ["-n", str(min(os.cpu_count() or 1, PROCESSES))]
        limit = None if self.device.type == "cpu" else self.limit("tests")
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=limit,
            )  # fmt: skip
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:  # whose output is bytes whatever was asked for
            status, output = -1, (late.stdout or b"").decode(errors="replace")
            output += f"\nstopped after {limit:.0f} s"
        lines = output.strip().splitlines() or [""]
        if status:
            print(output, file=sys.stderr)
        yield {
            "command": " ".join(["python", *command[1:]]),
            "status": status,
            "summary": lines[-1].strip("= "),
            "failed": sorted({name for line in lines for name in FAILED.findall(line)}),
            "ok": status == 0,
        }

    def parity(self) -> Iterator[Result]:
        for R, C in self.sizes.solves:
            weight, hessian = problem(R, C, device=self.device)
            for group_size in (-1, self.sizes.group_size):
                for order in ORDERS:
                    spec = QuantSpec(4, group_size)
                    run = partial(solve, weight, hessian, spec, order=order, **OPTIONS)
                    expected = run(backend="reference")
                    for precision in PRECISIONS:
                        if precision != "tf32x3" and R * C > REFERENCE_ELEMENTS:
                            continue
                        # one grid for all: where two scales are equally good either may be found
                        actual = run(
                            backend=self.backend, precision=precision,
                            scale=expected.scale, zero_point=expected.zero_point,
                        )  # fmt: skip
                        yield {
                            "shape": [R, C],
                            "group_size": group_size,
                            "order": order,
                            "precision": precision,
                            **compared(weight, hessian, spec, actual, expected, precision),
                        }

    def determinism(self) -> Iterator[Result]:
        R, C = self.sizes.solves[0]
        weight, hessian = problem(R, C, device=self.device)
        for order in ORDERS:

            def run(order: Order = order) -> tuple[Tensor, ...]:
                spec = QuantSpec(4, self.sizes.group_size)
                result = solve(weight, hessian, spec, order=order, backend=self.backend, **OPTIONS)
                return result.codes, result.scale, result.zero_point, result.report.error

            yield {"call": f"solve {R}x{C} {order}", "runs": RUNS, "ok": repeats(run)}
        for layer, batch in self.sizes.hessians:
            x = inputs(layer, batch, dtype=torch.bfloat16, device=self.device)

            def accumulate(layer: Layer = layer, x: Tensor = x) -> tuple[Tensor, ...]:
                total = HessianSum(layer.groups, layer.columns, self.device)
                total.add(x, layer.window, backend=self.backend)
                return (total.hessian(),)

            yield {"call": f"Hessian of {layer.name}", "runs": RUNS, "ok": repeats(accumulate)}

    def hessian(self) -> Iterator[Result]:
        for layer, batch in self.sizes.hessians:
            for dtype in DTYPES:
                x = inputs(layer, batch, dtype=dtype, device=self.device)
                error = bench_accumulate_hessian.relative_error(layer, x, self.backend)
                yield {
                    "layer": layer.name,
                    "columns": layer.columns,
                    "groups": layer.groups,
                    "dtype": name_of(dtype),
                    "relative error": error,
                    "ok": error <= HESSIAN_TOLERANCE,
                }

    def memory(self) -> Iterator[Result]:
        for R, C in self.sizes.memory:
            weight, hessian = problem(R, C, device=self.device)
            for group_size in (-1, self.sizes.group_size):
                for order in ("activation", "sensitivity"):
                    for measure in (False, True):
                        run = partial(
                            solve, weight, hessian, QuantSpec(4, group_size), order=order,
                            measure=measure, backend=self.backend, **OPTIONS,
                        )  # fmt: skip
                        used = memory(run, size(weight), size(hessian), self.device)
                        yield {
                            "shape": [R, C],
                            "group_size": group_size,
                            "order": order,
                            "measure": measure,
                            **used,
                            "ok": used["of 3 H + 2 W"] <= 1,
                        }

    # --- timings

    def ceilings(self) -> Iterator[Result]:
        for name, rate in ceilings(self.device).items():
            unit = "GB/s" if name == "copy" else "TFLOP/s"
            yield {"ceiling": name, "rate": rate, "unit": unit, "ok": True}

    def solve_times(self) -> Iterator[Result]:
        """The shapes whose results `parity` has compared; large ones are looked at here."""
        compared = [(shape, g) for shape in self.sizes.solves for g in (-1, self.sizes.group_size)]
        large = [(shape, self.sizes.group_size) for shape in self.sizes.large]
        for (R, C), group_size in compared + large:
            weight, hessian = problem(R, C, device=self.device)
            spec = QuantSpec(4, group_size)
            for order in self.sizes.orders if (R, C) in self.sizes.large else ORDERS:
                run = partial(solve, weight, hessian, spec, order=order, measure=False, **OPTIONS)
                row: Result = {"shape": [R, C], "group_size": group_size, "order": order}
                if (R, C) in self.sizes.large:
                    row |= plausible(weight, hessian, run(backend=self.backend))
                    if not row["ok"]:
                        yield row
                        continue

                def call(backend: Backend, run: Callable[..., SolveResult] = run) -> SolveResult:
                    return run(backend=backend)

                backends = self.backends if R * C <= REFERENCE_ELEMENTS else self.backends[:1]
                yield row | self.in_turns(call, backends)

    def hessian_times(self) -> Iterator[Result]:
        for layer, batch in self.sizes.hessians:
            small = layer.columns <= REFERENCE_COLUMNS
            for dtype in DTYPES if small else DTYPES[1:]:
                case = bench_hessian.case(layer, batch, dtype, self.device)
                yield {
                    "layer": layer.name,
                    "columns": layer.columns,
                    "tokens or images": batch * bench_hessian.BATCHES,
                    "dtype": name_of(dtype),
                    **self.checked(case, self.backends if small else self.backends[:1]),
                }

    def kernel_times(self) -> Iterator[Result]:
        R, C = self.sizes.solves[-1]
        each, device = self.sizes.group_size, self.device
        absmax, mse = QuantSpec(4, each, scale_search="absmax"), QuantSpec(4, each)
        made: dict[str, Callable[[], Case]] = {
            "quantize_groups, absmax": lambda: bench_quantize_groups.case(R, C, absmax, device),
            "quantize_groups, mse": lambda: bench_quantize_groups.case(R, C, mse, device),
            "column_sensitivity": lambda: bench_column_sensitivity.case(R, C, each, device),
            "solve_columns": lambda: bench_solve_columns.case(R, each, device),
            # of the first tile on all others
            "compensate": lambda: bench_compensate.case(R, C - each, each, device),
            "downdate": lambda: bench_downdate.case(C - each, each, device),
            "solve_rows": lambda: bench_solve_rows.case(*self.sizes.obq, device),
            "dequantize_packed": lambda: bench_dequantize_packed.case(
                R, C, 4, each, torch.float16, device
            ),
        }
        for rows, bits in itertools.product((1, 16), (3, 4)):
            made[f"matmul_packed, {rows} x {C}, {bits} bits"] = partial(
                bench_matmul_packed.case, rows, R, C, bits, each, torch.float16, device
            )
        for layer, batch in self.sizes.hessians:
            for dtype in DTYPES if layer.columns <= REFERENCE_COLUMNS else ():
                made[f"accumulate_hessian, {layer.name}, {name_of(dtype)}"] = partial(
                    bench_accumulate_hessian.case, layer, batch, dtype, device
                )
        for name, make in made.items():
            yield {"kernel": name, **self.checked(make())}

    def model_times(self) -> Iterator[Result]:
        """Times of the path that stands to the proof only; the check has run each call before."""
        sizes, device = self.sizes, self.device
        for name in sizes.models:
            for order in sizes.orders:
                find, spec = bench_models.MODELS[name]
                case = bench_models.case(find(), spec, order, device, sizes.shrunk)
                what = "solves, Hessians given"
                yield {"model": name, "what": what, "order": order, **self.once(case)}
        for order in sizes.orders:
            case = bench_models.block_case(order, device, *sizes.block)
            tokens = sizes.block[1] * sizes.block[2]
            row = self.once(case)
            yield {
                "model": "Llama-3-8B block",
                "what": f"Hessians of {tokens} tokens, and solves",
                "order": order,
                **row,
                f"x {LLAMA_3_8B['blocks']} blocks": LLAMA_3_8B["blocks"] * row[self.backend],
            }
        for order in sizes.orders:
            case = bench_models.quantize_case(order, device, *sizes.images)
            what = f"quantize, {sizes.images[2]} images of {sizes.images[1]}"
            yield {"model": "ResNet-50", "what": what, "order": order, **self.once(case)}
        for way in get_args(bench_experts.Way):
            rows, columns = (n // sizes.shrunk for n in bench_experts.PROJECTIONS["up and gate"])
            case = bench_experts.case(8, rows, columns, way, device)
            name = f"8 experts of {rows} x {columns}"
            yield {"model": name, "what": way, "order": "sensitivity", **self.once(case)}

    def obq_times(self) -> Iterator[Result]:
        quick = self.sizes is not FULL
        found = []
        for shape in headline.shapes(
            ["ResNet-50"], headline.any_setting, self.device, budget=0.0, quick=quick
        ):
            found.append(shape)
            row = shape.row
            yield {
                "shape": [row.rows, row.columns],
                "count": shape.count,
                "SAPQ": row.sapq,
                "OBQ": row.obq,
                "literal": row.literal,
                "OBQ / SAPQ": row.ratio,
                "literal / SAPQ": row.literal / row.sapq,
                "OBQ rows": row.obq_rows,
                "literal rows": row.literal_rows,
                "literal steps": row.literal_steps,
                "ok": True,  # the choices were compared before
            }
        whole = headline.Total.of("ResNet-50", found).summary()
        yield {
            "shape": ["whole model"] if not quick else ["these shapes"],
            "count": whole["layers"],
            "SAPQ": whole["sapq"],
            "OBQ": whole["obq"],
            "literal": whole["literal"],
            "OBQ / SAPQ": whole["OBQ / SAPQ"],
            "literal / SAPQ": whole["literal / SAPQ"],
            "paper": whole["paper"],
            "ok": True,
        }

    # --- what was carried in

    def carried(self) -> Iterator[Result]:
        for name, network in NETWORKS.items():
            found = read(self.carried_in, name) if self.carried_in else None
            if found is None:
                yield {"model": name, "skipped": "nothing was carried in", "ok": True}
                continue
            row = end_to_end(network(found), found.state, self.device, self.backend)
            yield {"model": name, **row}

    def peers(self) -> Iterator[Result]:
        if self.peers_in is None:
            yield {"skipped": "no --peers folder", "ok": True}
            return
        if not (ROOT / "benchmarks" / "peers.py").exists():
            yield {"skipped": "there is no benchmarks/peers.py", "ok": True}
            return
        path = [self.peers_in, *sorted(self.peers_in.glob("*.whl"))]
        before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        command = [sys.executable, "-m", "benchmarks.peers", "--device", self.device.type]
        command += ["--group-size", "128"]
        command += ["--commit", self.commit] if self.commit else []
        command += ["--quick"] if self.sizes is not FULL else []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "peers.json")
            done = subprocess.run(
                [*command, "--json", str(file)], cwd=ROOT, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
                timeout=None if self.device.type == "cpu" else self.limit("peers"),
                env=os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *before])},
            )  # fmt: skip
            if done.returncode:
                print(done.stdout, file=sys.stderr)
                yield {"status": done.returncode, "last": done.stdout[-300:], "ok": False}
                return
            rows = json.loads(file.read_text())["rows"]
        for row in rows:
            ratios = {f"/ ours {order}": ratio for order, ratio in row.pop("ratios", {}).items()}
            yield {**row, **ratios, "ok": True}

    # --- how a time is taken

    def checked(self, case: Case, backends: Sequence[Backend] | None = None) -> Result:
        """Seconds and rates of a case, after its check."""
        case.check(self.backend)
        taken = self.in_turns(case.call, backends)
        return taken | rates(case, taken[self.backend], self.device)

    def in_turns(
        self, call: Callable[[Backend], object], backends: Sequence[Backend] | None = None
    ) -> Result:
        calls: dict[str, Callable[[], object]] = {
            backend: partial(call, backend) for backend in backends or self.backends
        }
        taken: Result = dict(interleaved(calls, self.device, budget=self.sizes.budget))
        if len(taken) > 1:
            taken["ratio"] = taken["reference"] / taken["triton"]
        return taken | {"ok": True}

    def once(self, case: Case) -> Result:
        """Seconds of a long call, after its check: three runs, or one where that takes seconds."""
        case.check(self.backend)
        times = [seconds(partial(case.call, self.backend), self.device)]
        while len(times) < 3 and sum(times) < 2:
            times.append(seconds(partial(case.call, self.backend), self.device))
        taken = median(times)
        return {self.backend: taken, **rates(case, taken, self.device), "ok": True}


def compared(
    weight: Tensor, hessian: Tensor, spec: QuantSpec,
    actual: SolveResult, expected: SolveResult, precision: Precision,
) -> Result:  # fmt: skip
    """What a precision does to codes and error; with the default one also against float64."""
    wider, unlike_allowed = PRECISIONS[precision]
    ratio = (actual.report.error / expected.report.error).item()
    same_order = in_same_order(actual, expected)
    unlike = differing(actual.codes, expected.codes)
    ok = abs(ratio - 1) <= wider * tolerance(len(weight), same_order)
    ok &= not same_order or unlike <= unlike_allowed
    row: Result = {
        "relative error": actual.report.relative_error.item(),
        "error / reference": ratio,
        "codes as reference": 1 - unlike,
        "same order": same_order,
    }
    if actual.report.order != "sensitivity":
        row["codes not nearest"] = not_nearest(weight, hessian, actual, spec.qmax)
        ok &= precision == "tf32" or row["codes not nearest"] == 0
    if precision == "tf32x3":
        exact = textbook(weight, hessian, actual, spec.qmax)
        row["error / float64"] = error_ratio(weight, hessian, actual, exact)
        row["codes as float64"] = 1 - differing(actual.codes, exact)
        ok &= abs(row["error / float64"] - 1) <= tolerance(len(weight))
    return row | {"ok": ok}


def not_nearest(weight: Tensor, hessian: Tensor, result: SolveResult, qmax: int) -> float:
    """Codes of a static order that are not the nearest, given the errors before them, in float64.

    Those too close to the middle between two codes do not count.
    """
    columns, damp = result.columns, result.report.damp.item()
    assert columns is not None
    factor, _ = feedback_factor(hessian[None], damp, columns[None])
    code = result.codes[:, columns].double()
    s, z = (
        grid.double().repeat_interleave(weight.shape[1] // grid.shape[1], 1)[:, columns]
        for grid in (result.scale, result.zero_point)
    )
    w = weight.double()[:, columns]
    steps = (w + (w - (code - z) * s) @ factor[0].double().triu(1)) / s
    tied = (steps.frac().abs() - 0.5).abs() < TIE
    return ((code != (steps.round() + z).clamp(0, qmax)) & ~tied).double().mean().item()


def plausible(weight: Tensor, hessian: Tensor, result: SolveResult) -> Result:
    """A shorter check of what is too large for the others: better than rounding to nearest, and in
    a static order every code the nearest one."""
    nearest = solve(weight, hessian, result.spec, order="nearest", backend="reference")
    ratio = (total_error(weight, hessian, result) / nearest.report.relative_error).item()
    row: Result = {"error / rounding": ratio, "ok": ratio < 1 and not result.report.fallback}
    if result.report.order != "sensitivity":
        row["codes not nearest"] = not_nearest(weight, hessian, result, result.spec.qmax)
        row["ok"] &= row["codes not nearest"] == 0
    return row


def differing(actual: Tensor, expected: Tensor) -> float:
    return (actual != expected).double().mean().item()


def repeats(run: Callable[[], tuple[Tensor, ...]]) -> bool:
    first = run()
    return all(all(map(torch.equal, first, run())) for _ in range(RUNS - 1))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the report -----------------------------------------------------------------------------------


def run(
    stages: dict[str, Callable[[], Iterator[Result]]],
    limit: Callable[[str], float],
    report: Result,
    write: Callable[[Result], None],
) -> None:
    """Stage after stage into the report, written after each, until something is wrong."""
    for name, stage in stages.items():
        start, rows = time.perf_counter(), report["stages"].setdefault(name, [])
        allowed = limit(name)
        try:
            for row in stage():
                rows.append(row)
                print(name, *(f"{key}={brief(value)}" for key, value in row.items()), flush=True)
                if not row["ok"]:
                    report["failures"].append(f"{name}: {row}")
                    break
                if time.perf_counter() - start > allowed:
                    report["cut"][name] = f"after {len(rows)} rows and {allowed:.0f} s"
                    break
        except Exception as error:  # whatever it is, the report must say so
            traceback.print_exc()
            report["failures"].append(f"{name}: {type(error).__name__}: {error}")
        report["seconds"][name] = time.perf_counter() - start
        write(report)
        if report["failures"]:
            return
    report["failures"] += [
        f"{name}: not finished, cut {report['cut'][name]}"
        for name in CHECKS
        if name in report["cut"]
    ]
    report["passed"] = not report["failures"]
    write(report)


def brief(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Result]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    return markdown(header, ([brief(row.get(key, "")) for key in header] for row in rows))


def text(report: Result) -> str:
    """The report in Markdown. Times in seconds, medians."""
    where = report["environment"]
    verdict = "passed" if report["passed"] else "not passed"
    parts = [
        f"# {where['device']}, {where['commit']}: {verdict}",
        f"{where['date']}, torch {where['torch']}, triton {where['triton']}, "
        f"Python {where['python']}, {sum(report['seconds'].values()):.0f} s in all. Times are "
        "medians in seconds; solves alone, without the error of their result.",
        *(f"**{failure}**" for failure in report["failures"]),
        *(f"**{name} was cut short {when}**" for name, when in report["cut"].items()),
    ]
    for name, rows in report["stages"].items():
        if rows:
            parts += [f"## {name}, {report['seconds'].get(name, 0):.0f} s", table(rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--cpu", action="store_true", help="small sizes, reference path, no GPU")
    parser.add_argument("--no-tests", action="store_true", help="leave out the test suite")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, help="only these")
    parser.add_argument("--carried", type=Path, help="folder that benchmarks.carry has filled")
    parser.add_argument("--peers", type=Path, help="folder of packages or wheels to compare with")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        print("no GPU here: --cpu runs a small version on the reference path", file=sys.stderr)
        return 2
    if not options.cpu and os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "TRITON_INTERPRET is set, so no kernel would run on the GPU: unset it", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if options.cpu else "cuda")
    sizes = (FULL, QUICK, TINY)[options.cpu + options.quick]
    gate = Gate(sizes, device, options.carried, options.peers, options.commit)
    where = environment(device, of=options.commit)
    chosen = [name for name in LIMITS if name in (options.stages or LIMITS)]
    if options.no_tests and "tests" in chosen:
        chosen.remove("tests")
    report: Result = {
        "environment": where,
        "quick": options.quick,
        "tested": "tests" in chosen,
        "whole": options.stages is None,
        "passed": False,
        "failures": [],
        "cut": {},
        "seconds": {},
        "stages": {},
    }
    device_name = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    suffix = ("-quick" if options.quick else "") + ("-part" if options.stages else "")
    name = f"{device_name}-{where['commit']}{suffix}"
    options.out.mkdir(parents=True, exist_ok=True)

    def write(report: Result) -> None:
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{name}.md").write_text(text(report))

    run({name: getattr(gate, name) for name in chosen}, gate.limit, report, write)
    print(f"{'passed' if report['passed'] else 'FAILED'}: {options.out / name}.json")
    for failure in report["failures"]:
        print(failure, file=sys.stderr)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
