"""Launch parameters for the GPU at hand: candidates checked, then timed in turns.

    python -m benchmarks.tune --out kernels/launch.json
    python -m benchmarks.tune --kernels solve_columns --dry-run

For each entry of launch.json that this GPU uses: every candidate of JOBS must pass the check of
each of its cases, so that nothing wrong is timed; what does not compile, needs more than the GPU
has, or is wrong, is told and left out. Those that remain are timed in turns. The best, by the
geometric mean over the cases, becomes the entry of this GPU's family, where it takes at least 2 %
less time than what would be launched now. Other families stay as they are.

Another block size is another order of sums, and so may give other codes near ties. Afterwards
`make test` and `python -m benchmarks.static --json benchmarks/results/static.json` tell whether all
results hold and whether anything spills.

Exit status: 0 done, 1 what would be launched now is wrong, 2 there is no GPU.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import (
    bench_accumulate_hessian,
    bench_column_sensitivity,
    bench_compensate,
    bench_dequantize_packed,
    bench_downdate,
    bench_matmul_packed,
    bench_quantize_groups,
    bench_solve_columns,
    bench_solve_rows,
)
from benchmarks.bench_accumulate_hessian import CONVOLUTIONS, LINEAR
from benchmarks.measure import Case, interleaved
from benchmarks.shapes import Layer
from sapq_triton import QuantSpec, ops
from sapq_triton.kernels import launch
from sapq_triton.kernels.launch import DEFAULT, Entry, Table
from sapq_triton.window import Window

GAIN = 0.98  # of the time now: less is not worth another sum
BUDGET = 1.0  # seconds for all candidates of a case; three rounds in any case

Times = Callable[[Mapping[str, Callable[[], object]], torch.device], Mapping[str, float]]
IN_TURNS: Times = partial(interleaved, budget=BUDGET)


@dataclass(frozen=True)
class Sizes:
    """solves: R, C. tile: columns of a group, and of a tile of the solver. hessians: layer, images
    or tokens in a batch. obq: rows, columns, steps."""

    solves: tuple[tuple[int, int], ...]
    tile: int
    hessians: tuple[tuple[Layer, int], ...]
    obq: tuple[tuple[int, int, int], ...]


FULL = Sizes(
    solves=((512, 4608), (4096, 4096)),
    tile=128,
    hessians=((LINEAR["q_proj"], 16384), (CONVOLUTIONS["layer3.1.conv2"], 64)),
    obq=((1024, 512, 32), (64, 2048, 32)),
)
TINY = Sizes(  # for the tests, in Triton's interpreter
    solves=((8, 40),),
    tile=20,
    hessians=(
        (Layer("rows", 1, 16, 16, (16,)), 40),
        (Layer("patches", 1, 2, 18, (2, 1, 5, 5), Window((1, 3, 3))), 2),
    ),
    obq=((2, 264, 2),),
)


@dataclass(frozen=True)
class Job:
    """cases: what to time. precision: of the products of float32, None for that of the device."""

    cases: Callable[[Sizes, torch.device], Iterator[Case]]
    candidates: list[Entry]
    precision: str | None = None


def grid(**values: Sequence[int]) -> list[Entry]:
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def quantize_groups(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for R, C in sizes.solves:
        for spec in (
            QuantSpec(4, sizes.tile),
            QuantSpec(4, -1),
            QuantSpec(4, -1, scale_search="absmax"),
        ):
            yield bench_quantize_groups.case(R, C, spec, device)


def column_sensitivity(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for R, C in sizes.solves:
        yield bench_column_sensitivity.case(R, C, sizes.tile, device)


def solve_columns(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for R, C in sizes.solves:
        yield bench_solve_columns.case(R, sizes.tile, device)  # order "sensitivity"
        yield bench_solve_columns.case(R, C, device)  # static orders


def compensate(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for R, C in sizes.solves:
        yield bench_compensate.case(R, C - sizes.tile, sizes.tile, device)


def downdate(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for _, C in sizes.solves:
        yield bench_downdate.case(C - sizes.tile, sizes.tile, device)


def accumulate_hessian(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for layer, batch in sizes.hessians:
        yield bench_accumulate_hessian.case(layer, batch, dtype, device)


def solve_rows(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for size in sizes.obq:
        yield bench_solve_rows.case(*size, device)


def dequantize_packed(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for (R, C), bits in itertools.product(sizes.solves, (3, 4)):
        yield bench_dequantize_packed.case(R, C, bits, C // 8, torch.float16, device)


def matmul_packed(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for (R, C), bits, rows in itertools.product(sizes.solves, (3, 4), (1, 16)):
        yield bench_matmul_packed.case(rows, R, C, bits, C // 8, torch.float16, device)


COLUMNS = [  # BLOCK_J divides TILE
    *grid(TILE=[64], BLOCK_J=[16, 32, 64], BLOCK_R=[16, 32], num_warps=[4, 8]),
    *grid(TILE=[128], BLOCK_J=[32], BLOCK_R=[16, 32], num_warps=[4, 8]),
    *grid(TILE=[32], BLOCK_J=[32], BLOCK_R=[32], num_warps=[1, 2, 4]),
    *grid(TILE=[16], BLOCK_J=[16], BLOCK_R=[32], num_warps=[1, 2]),
]
HESSIAN = [
    *grid(BLOCK_C=[64], BLOCK_ROWS=[32, 64], num_warps=[4], num_stages=[2, 3]),
    *grid(BLOCK_C=[128], BLOCK_ROWS=[16, 32, 64], num_warps=[4, 8], num_stages=[2, 3]),
]
PRODUCTS = [
    *grid(BLOCK_M=[8, 16], BLOCK_N=[16, 32], BLOCK_P=[16], num_warps=[2], num_stages=[1, 2, 3]),
    *grid(BLOCK_M=[8, 16], BLOCK_N=[32, 64], BLOCK_P=[16], num_warps=[4], num_stages=[2, 3]),
]
JOBS: dict[str, Job] = {
    "quantize_groups": Job(
        quantize_groups,
        grid(BLOCK_C=[128, 256, 512], ELEMENTS=[512, 1024, 2048], num_warps=[2, 4]),
    ),
    "column_sensitivity": Job(
        column_sensitivity, grid(BLOCK_F=[8, 16, 32], BLOCK_R=[64, 128, 256], num_warps=[4])
    ),
    "solve_columns": Job(solve_columns, COLUMNS),
    "solve_columns ieee": Job(solve_columns, COLUMNS, "ieee"),
    "compensate": Job(
        compensate, grid(BLOCK_F=[64, 128], BLOCK_R=[64, 128], BLOCK_T=[16, 32], num_warps=[4, 8])
    ),
    "downdate": Job(downdate, grid(BLOCK_F=[64, 128], BLOCK_T=[16, 32, 64], num_warps=[4, 8])),
    "accumulate_hessian": Job(partial(accumulate_hessian, torch.float32), HESSIAN),
    "accumulate_hessian 16-bit": Job(partial(accumulate_hessian, torch.bfloat16), HESSIAN),
    "accumulate_hessian ieee": Job(partial(accumulate_hessian, torch.float32), HESSIAN, "ieee"),
    "solve_rows": Job(solve_rows, grid(BLOCK_F=[256, 512, 1024], num_warps=[2, 4])),
    "dequantize_packed": Job(
        dequantize_packed, grid(BLOCK_R=[2, 4, 8], BLOCK_C=[128, 256, 512], num_warps=[2, 4])
    ),
    "matmul_packed": Job(matmul_packed, PRODUCTS),
    "matmul_packed ieee": Job(matmul_packed, PRODUCTS, "ieee"),
}


@contextmanager
def products(precision: str | None) -> Iterator[None]:
    """Within the block all kernels multiply float32 so; None: as the device does by default."""
    before = ops.dot_precision
    if precision is not None:
        ops.dot_precision = lambda _: precision  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.dot_precision = before


def used(name: str) -> bool:
    """Where the default is "ieee" anyway, nothing else is launched."""
    twin = ops.dot_precision("tf32x3") == "ieee" and f"{name} ieee" in JOBS
    return not twin


def now(name: str, device: torch.device) -> Entry:
    """What an entry of this name would launch."""
    kernel, _, variant = name.partition(" ")
    return launch.parameters(kernel, device, variant)


def failure(name: str, entry: Entry, cases: Sequence[Case]) -> str | None:
    """Why this candidate cannot be used."""
    try:
        with launch.override(name, entry):
            for case in cases:
                case.check("triton")
    except Exception as error:  # compilers and drivers raise what they like
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def best(name: str, job: Job, sizes: Sizes, device: torch.device, times: Times) -> Entry:
    """ValueError where what would be launched now fails its own check."""
    present = now(name, device)
    cases = list(job.cases(sizes, device))
    right = []
    for entry in [present, *(x for x in job.candidates if x != present)]:
        reason = failure(name, entry, cases)
        if reason is None:
            right.append(entry)
        elif entry is present:
            raise ValueError(f"{name}: {written(present)} must pass its check, got {reason}")
        else:
            print(f"{name}: {written(entry)} left out, {reason}", flush=True)

    def call(case: Case, entry: Entry) -> object:
        with launch.override(name, entry):
            return case.call("triton")

    scores = dict.fromkeys(map(written, right), 1.0)
    for case in cases:
        taken = times({written(x): partial(call, case, x) for x in right}, device)
        for key in scores:
            scores[key] *= (taken[key] / taken[written(present)]) ** (1 / len(cases))
    for key, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"{name}: {key} takes {score:.3f} of the time now", flush=True)
    chosen = min(right, key=lambda entry: scores[written(entry)])
    return chosen if scores[written(chosen)] <= GAIN else present


def tuned(
    table: Table,
    family: str,
    device: torch.device,
    *,
    names: Sequence[str] = tuple(JOBS),
    sizes: Sizes = FULL,
    times: Times = IN_TURNS,
) -> Table:
    """A copy of the table with the best entries under `family`, in the order of the default's.

    times: seconds of each call. ValueError for the family "default", which no device stands for,
    and where what would be launched now is wrong.
    """
    if family == DEFAULT:
        raise ValueError(f"family must be that of a GPU (sm_90, gfx942, ...), got {family!r}")
    entries = dict(table.get(family, {}))
    for name in names:
        if used(name):
            with products(JOBS[name].precision):
                entries[name] = best(name, JOBS[name], sizes, device, times)
    order = list(table[DEFAULT])
    return table | {family: {name: entries[name] for name in sorted(entries, key=order.index)}}


def written(entry: Entry) -> str:
    return json.dumps(entry)


def text(table: Table) -> str:
    """launch.json: one line per entry."""
    families = (
        f' "{family}": {{\n'
        + ",\n".join(f'  "{name}": {written(entry)}' for name, entry in entries.items())
        + "\n }"
        for family, entries in table.items()
    )
    return "{\n" + ",\n".join(families) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=launch.PATH)
    parser.add_argument("--kernels", nargs="+", choices=JOBS, default=list(JOBS), help="entries")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here, and only that can time kernels", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "TRITON_INTERPRET is set, so no kernel would run on the GPU: unset it", file=sys.stderr
        )
        return 2
    device = torch.device("cuda")
    try:
        table = tuned(launch.table(), launch.family(device), device, names=options.kernels)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.dry_run:
        print(text(table), end="")
    else:
        options.out.write_text(text(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
