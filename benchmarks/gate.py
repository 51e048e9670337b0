"""What a GPU must show: right results first, then how fast they come.

    python -m benchmarks.gate --out benchmarks/results

tests        the test suite, in a process of its own
parity       solve on kernels against the reference path, and against a textbook form in float64
determinism  ten runs, bit for bit
hessian      X^T X of the kernels against float64
timings      solve and the Hessian, kernels against the reference path in turns, and each kernel
             against the ceilings of the device (copy, matrix product), all measured in this run

The stages run in this order and the first wrong result ends the gate: nothing wrong is timed. One
JSON for each device and commit, and a Markdown table beside it, are written in any case.

Exit status: 0 passed, 1 something is wrong, 2 there is no GPU. --cpu runs small sizes on the
reference path instead, which tests the gate and says nothing about kernels.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_accumulate_hessian,
    bench_column_sensitivity,
    bench_compensate,
    bench_downdate,
    bench_hessian,
    bench_quantize_groups,
    bench_solve_columns,
    bench_solve_rows,
)
from benchmarks.bench_accumulate_hessian import CONVOLUTIONS, DEPTHWISE, LINEAR, SMALL
from benchmarks.bench_solve import BLOCK, SWEEPS, error_ratio, textbook, tolerance
from benchmarks.measure import (
    ROOT,
    Case,
    ceilings,
    environment,
    interleaved,
    markdown,
    rates,
)
from benchmarks.shapes import Layer, inputs, problem
from sapq_triton import QuantSpec, solve
from sapq_triton.hessian import HessianSum
from sapq_triton.ops import Backend
from sapq_triton.spec import Order

TESTS_LIMIT = 300  # seconds
HESSIAN_TOLERANCE = 1e-4  # of sqrt(H_ii H_jj)
RUNS = 10
OPTIONS: dict[str, Any] = {"block": BLOCK, "sweeps": SWEEPS}
ORDERS: tuple[Order, ...] = ("natural", "activation", "sensitivity")
DTYPES = (torch.float32, torch.bfloat16)

Result = dict[str, Any]  # one row of a table; "ok" tells whether it is right


@dataclass(frozen=True)
class Sizes:
    """What is run.

    solves: R, C. hessians: layer, images or tokens in a batch. obq: rows, columns, steps.
    budget: seconds for one row of timings; three rounds are made in any case.
    """

    solves: tuple[tuple[int, int], ...]
    hessians: tuple[tuple[Layer, int], ...]
    obq: tuple[int, int, int]
    group_size: int = 128
    budget: float = 1.0


FULL = Sizes(
    solves=((512, 4608), (2048, 512), (4096, 4096)),
    hessians=(
        (LINEAR["q_proj"], 16384),
        (LINEAR["down_proj"], 4096),
        (CONVOLUTIONS["layer3.1.conv2"], 256),
    ),
    obq=(1024, 512, 32),
)
QUICK = Sizes(
    solves=((128, 576), (512, 512)),
    hessians=((Layer("256 columns", 1, 256, 256, (256,)), 2048), (SMALL, 32), (DEPTHWISE, 8)),
    obq=(64, 256, 32),
    budget=0.3,
)
TINY = Sizes(
    solves=((64, 160),),
    hessians=((Layer("64 columns", 1, 64, 64, (64,)), 256), (SMALL, 4), (DEPTHWISE, 2)),
    obq=(8, 64, 16),
    group_size=32,
    budget=0.0,
)


@dataclass(frozen=True)
class Gate:
    """The stages; each yields rows."""

    sizes: Sizes
    device: torch.device

    @property
    def backend(self) -> Backend:
        """What stands to the proof: on a CPU only the reference path can."""
        return "triton" if self.device.type == "cuda" else "reference"

    @property
    def backends(self) -> tuple[Backend, ...]:
        return ("triton", "reference") if self.backend == "triton" else ("reference",)

    def tests(self) -> Iterator[Result]:
        command = [sys.executable, "-m", "pytest", "-q"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=TESTS_LIMIT,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines() or [""]
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        yield {
            "command": " ".join(["python", *command[1:]]),
            "status": done.returncode,
            "summary": lines[-1].strip("= "),
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
            "ok": done.returncode == 0,
        }

    def parity(self) -> Iterator[Result]:
        for R, C in self.sizes.solves:
            weight, hessian = problem(R, C, device=self.device)
            for group_size in (-1, self.sizes.group_size):
                for order in ORDERS:
                    spec = QuantSpec(4, group_size)
                    run = partial(solve, weight, hessian, spec, order=order, **OPTIONS)
                    expected = run(backend="reference")
                    # one grid for both: where two scales are equally good either may be found
                    actual = run(
                        backend=self.backend, scale=expected.scale, zero_point=expected.zero_point
                    )
                    exact = textbook(weight, hessian, actual, spec.qmax)
                    ratio = (actual.report.error / expected.report.error).item()
                    exact_ratio = error_ratio(weight, hessian, actual, exact)
                    same_order = torch.equal(actual.columns, expected.columns)
                    yield {
                        "shape": [R, C],
                        "group_size": group_size,
                        "order": order,
                        "relative error": actual.report.relative_error.item(),
                        "error / reference": ratio,
                        "codes unlike reference": differing(actual.codes, expected.codes),
                        "error / float64": exact_ratio,
                        "codes unlike float64": differing(actual.codes, exact),
                        "same order": same_order,
                        "ok": abs(ratio - 1) <= tolerance(R, same_order)
                        and abs(exact_ratio - 1) <= tolerance(R),
                    }

    def determinism(self) -> Iterator[Result]:
        R, C = self.sizes.solves[0]
        weight, hessian = problem(R, C, device=self.device)
        for order in ORDERS:

            def run(order: Order = order) -> tuple[torch.Tensor, ...]:
                spec = QuantSpec(4, self.sizes.group_size)
                result = solve(weight, hessian, spec, order=order, backend=self.backend, **OPTIONS)
                return result.codes, result.scale, result.zero_point, result.report.error

            yield {"call": f"solve {R}x{C} {order}", "runs": RUNS, "ok": repeats(run)}
        for layer, batch in self.sizes.hessians:
            x = inputs(layer, batch, device=self.device)

            def accumulate(layer: Layer = layer, x: torch.Tensor = x) -> tuple[torch.Tensor, ...]:
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

    def ceilings(self) -> Iterator[Result]:
        for name, rate in ceilings(self.device).items():
            unit = "GB/s" if name == "copy" else "TFLOP/s"
            yield {"ceiling": name, "rate": rate, "unit": unit, "ok": True}

    def solve_times(self) -> Iterator[Result]:
        """The shapes whose results `parity` has compared."""
        for R, C in self.sizes.solves:
            weight, hessian = problem(R, C, device=self.device)
            for group_size in (-1, self.sizes.group_size):
                for order in ORDERS:
                    spec = QuantSpec(4, group_size)
                    run = partial(solve, weight, hessian, spec, order=order, **OPTIONS)
                    taken = self.in_turns(lambda backend, run=run: run(backend=backend))
                    yield {"shape": [R, C], "group_size": group_size, "order": order, **taken}

    def hessian_times(self) -> Iterator[Result]:
        for layer, batch in self.sizes.hessians:
            for dtype in DTYPES:
                case = bench_hessian.case(layer, batch, dtype, self.device)
                yield {
                    "layer": layer.name,
                    "columns": layer.columns,
                    "dtype": name_of(dtype),
                    **self.checked(case),
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
        }
        for layer, batch in self.sizes.hessians:
            for dtype in DTYPES:
                made[f"accumulate_hessian, {layer.name}, {name_of(dtype)}"] = partial(
                    bench_accumulate_hessian.case, layer, batch, dtype, device
                )
        for name, make in made.items():
            yield {"kernel": name, **self.checked(make())}

    def checked(self, case: Case) -> Result:
        """Seconds and rates of a case, after its check."""
        case.check(self.backend)
        taken = self.in_turns(case.call)
        return taken | rates(case, taken[self.backend], self.device)

    def in_turns(self, call: Callable[[Backend], object]) -> Result:
        calls = {backend: partial(call, backend) for backend in self.backends}
        taken: Result = dict(interleaved(calls, self.device, budget=self.sizes.budget))
        if "triton" in taken:
            taken["ratio"] = taken["reference"] / taken["triton"]
        return taken | {"ok": True}


def differing(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual != expected).double().mean().item()


def repeats(run: Callable[[], tuple[torch.Tensor, ...]]) -> bool:
    first = run()
    return all(all(map(torch.equal, first, run())) for _ in range(RUNS - 1))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the report -----------------------------------------------------------------------------------


def run(stages: dict[str, Callable[[], Iterator[Result]]], report: Result, write: Callable) -> None:
    """Stage after stage into the report, written after each, until something is wrong."""
    for name, stage in stages.items():
        start, rows = time.perf_counter(), report["stages"].setdefault(name, [])
        try:
            for row in stage():
                rows.append(row)
                print(name, *(f"{key}={brief(value)}" for key, value in row.items()), flush=True)
                if not row["ok"]:
                    report["failures"].append(f"{name}: {row}")
        except Exception as error:  # whatever it is, the report must say so
            traceback.print_exc()
            report["failures"].append(f"{name}: {type(error).__name__}: {error}")
        report["seconds"][name] = time.perf_counter() - start
        write(report)
        if report["failures"]:
            return
    report["passed"] = True
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
        f"Python {where['python']}. Times are medians in seconds.",
        *(f"**{failure}**" for failure in report["failures"]),
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
    gate = Gate((FULL, QUICK, TINY)[options.cpu + options.quick], device)
    where = environment(device, of=options.commit)
    stages = {
        "tests": gate.tests,
        "parity": gate.parity,
        "determinism": gate.determinism,
        "hessian": gate.hessian,
        "ceilings": gate.ceilings,
        "solve_times": gate.solve_times,
        "hessian_times": gate.hessian_times,
        "kernel_times": gate.kernel_times,
    }
    if options.no_tests:
        del stages["tests"]
    report: Result = {
        "environment": where,
        "quick": options.quick,
        "tested": not options.no_tests,
        "passed": False,
        "failures": [],
        "seconds": {},
        "stages": {},
    }
    device_name = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    name = f"{device_name}-{where['commit']}" + ("-quick" if options.quick else "")
    options.out.mkdir(parents=True, exist_ok=True)

    def write(report: Result) -> None:
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{name}.md").write_text(text(report))

    run(stages, report, write)
    print(f"{'passed' if report['passed'] else 'FAILED'}: {options.out / name}.json")
    for failure in report["failures"]:
        print(failure, file=sys.stderr)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
