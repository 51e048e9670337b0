"""SAPQ against exact OBQ on the layers of ResNet-50 with 512 columns or more, on one device.

    python -m benchmarks.obq --json obq.json

Both round to the same given grid, and neither measures its error in that time.

SAPQ      sapq_triton.solve(order="sensitivity"), its checks of arguments included.
OBQ       sapq_triton's exact OBQ with delayed updates, without these checks. Timed on a sample of
          rows and scaled linearly to all of them; the inverse of the Hessian, which the rows share
          at the start, is computed and counted once. Rows at a time and block are the fastest of
          those tried, for each number of columns. The small problems of a grouped convolution are
          solved all at once, their rows having inverses of their own.
literal   the same algorithm as published: after each weight a rank-one update of the inverse of
          every row. Timed on fewer rows and on its first steps, all of which cost the same, and
          scaled linearly to all.

`benchmarks.headline` sums this over whole models.

Before anything is timed the two forms of OBQ must choose the same codes in float64, and OBQ as it
is timed must have the layer error that it has in float64.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import environment, interleaved, markdown, synchronize
from benchmarks.shapes import Layer, distinct, problems, resnet50
from sapq_triton import QuantSpec, SolveResult, layer_error, ops, solve
from sapq_triton.hessian import inverse
from sapq_triton.obq import solve_obq
from sapq_triton.ops import Backend
from sapq_triton.solver import dequantize

SPEC = QuantSpec(bits=4)
DAMP = 0.01
MIN_COLUMNS, QUICK_COLUMNS = 512, 576
BLOCKS = (16, 256)  # the smallest and the largest that are tried
# bytes of inverses that rows at a time may take on a CPU, and those that are tried first
CHUNK_BYTES, CHUNK_AT_FIRST = 2**29, 2**26
CHECK_BYTES = 2e10  # memory that the literal form may move where it is compared,
LITERAL_BYTES = {"cpu": 4e9, "cuda": 4e11}  # and where it is timed
LITERAL_ROWS = {"cpu": 64, "cuda": 256}  # at a time: more are no faster by row
LITERAL_STEPS = 32  # at least
CHECK_ROWS = 8
CHECK_STEPS = 4 * 10**10  # elements of inverses that OBQ may update where its setting is checked


class Literal(NamedTuple):
    """Columns in the order in which they were quantized, and their codes: [N, steps] each."""

    picked: Tensor
    codes: Tensor


def in_place(inverse: Tensor, row: Tensor, share: Tensor) -> None:
    inverse.baddbmm_(row[:, :, None], share[:, None, :], alpha=-1)


def literal_obq(
    weight: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int,
    steps: int,
    update: Callable[[Tensor, Tensor, Tensor], None] = in_place,
) -> Literal:
    """Frantar & Alistarh 2022, arXiv 2208.11580, algorithm 3 with its outlier rule, N rows at once.

    weight [N, C], inverse [C, C] or [N, C, C], scale, zero_point [N, G]
    """
    N, C = weight.shape
    w, a = weight.clone(), inverse.expand(N, C, C).clone(memory_format=torch.contiguous_format)
    s, z = (grid.repeat_interleave(C // grid.shape[1], 1) for grid in (scale, zero_point))
    each = torch.arange(N, device=w.device)
    done = torch.zeros(N, C, dtype=torch.bool, device=w.device)
    picked = torch.empty(N, steps, dtype=torch.int64, device=w.device)
    codes = torch.empty(N, steps, dtype=torch.uint8, device=w.device)
    for step in range(steps):
        code = ((w / s).round() + z).clamp(0, qmax)
        delta = w - (code - z) * s
        error = delta.square().masked_fill(done, -1)
        cost = (error / a.diagonal(dim1=1, dim2=2)).masked_fill(done, torch.inf)
        outlier = (error > s.square() / 4).any(1)
        j = torch.where(outlier, error.argmax(1), cost.argmin(1))
        row = a[each, j]
        share = row / row[each, j, None]
        w -= delta[each, j, None] * share
        update(a, row, share)
        picked[:, step], codes[:, step] = j, code[each, j]
        done[each, j] = True
    return Literal(picked, codes)


@dataclass(frozen=True)
class Setting:
    """How exact OBQ is run: rows at a time, and steps between two updates of their inverses."""

    rows: int
    block: int


@dataclass(frozen=True)
class Row:
    """Seconds of one layer; errors are relative, of the sampled rows. rows: of all groups."""

    layer: str
    groups: int
    rows: int
    columns: int
    sapq: float
    obq: float
    obq_rows: int
    setting: Setting
    literal: float
    literal_rows: int
    literal_steps: int
    compared_rows: int
    compared_steps: int
    sapq_error: float
    obq_error: float

    @property
    def ratio(self) -> float:
        return self.obq / self.sapq


class Problem(NamedTuple):
    """The rows of all groups, one below the other.

    weight [N, C], hessian, inverse [B, C, C], scale, zero_point [N, 1]: the grid of SAPQ, to which
    OBQ rounds as well. codes [N, C]: of SAPQ.
    """

    weight: Tensor
    hessian: Tensor
    inverse: Tensor
    scale: Tensor
    zero_point: Tensor
    codes: Tensor

    @classmethod
    def of(cls, layer: Layer, device: torch.device) -> "Problem":
        weight, hessian = problems(layer, device=device)
        found = solve(weight, hessian, SPEC, damp=DAMP)
        hessian = hessian.reshape(-1, layer.columns, layer.columns)
        rows = (t.reshape(-1, t.shape[-1]) for t in (found.scale, found.zero_point, found.codes))
        return cls(weight.reshape(-1, layer.columns), hessian, shared_inverse(hessian), *rows)

    @property
    def groups(self) -> int:
        return len(self.hessian)

    def of_rows(self, matrices: Tensor, rows: slice | Tensor) -> Tensor:
        """Those of a matrix per group that belong to these rows: one for all, or one for each."""
        if self.groups == 1:
            return matrices[0]
        group = torch.arange(len(self.weight), device=self.weight.device)
        return matrices[(group // (len(self.weight) // self.groups))[rows]]

    def sapq(self, backend: Backend = "auto") -> SolveResult:
        weight, scale, zero_point = (
            t.unflatten(0, (self.groups, -1)) for t in (self.weight, self.scale, self.zero_point)
        )
        return solve(
            weight, self.hessian, SPEC, damp=DAMP, scale=scale, zero_point=zero_point,
            measure=False, backend=backend,
        )  # fmt: skip

    def obq(
        self,
        rows: slice | Tensor,
        setting: Setting,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> Tensor:
        """Codes of these rows, `setting.rows` at a time."""
        w, s, z = (t[rows].to(dtype) for t in (self.weight, self.scale, self.zero_point))
        a = self.of_rows(self.inverse, rows).to(dtype)
        if self.groups > 1:
            return exact_obq(w, a, s, z, backend)
        parts = zip(*(t.split(setting.rows) for t in (w, s, z)), strict=True)
        group = torch.zeros(1, len(a), dtype=torch.int64, device=w.device)
        call = partial(
            solve_obq, group=group, qmax=SPEC.qmax, block=setting.block, precision="tf32x3",
            backend=backend,
        )  # fmt: skip
        return torch.cat([call(w[None], a[None], s[None], z[None])[0][0] for w, s, z in parts])

    def literal(self, rows: slice, steps: int, dtype: torch.dtype = torch.float32) -> Literal:
        w, s, z = (t[rows].to(dtype) for t in (self.weight, self.scale, self.zero_point))
        a = self.of_rows(self.inverse, rows).to(dtype)
        return literal_obq(w, a, s, z, SPEC.qmax, steps)

    def error(self, codes: Tensor, rows: Tensor) -> float:
        """Relative layer error of these rows."""
        w = self.weight[rows]
        q = dequantize(codes, self.scale[rows], self.zero_point[rows])
        h = self.of_rows(self.hessian, rows)
        if self.groups > 1:
            w, q = w[:, None], q[:, None]
        zero = torch.zeros_like(w)
        return (layer_error(w, q, h).sum() / layer_error(w, zero, h).sum()).item()


def exact_obq(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero_point: Tensor, backend: Backend
) -> Tensor:
    """All steps before the first update of an inverse: codes [N, C] of rows with few columns."""
    N, C = weight.shape
    group = torch.zeros(N, C, dtype=torch.int64, device=weight.device)
    grid = (scale, zero_point, group, SPEC.qmax)
    picked, code, _ = ops.solve_rows(weight.clone(), inverse, *grid, C, backend)
    return torch.empty_like(code).scatter_(1, picked, code)


def shared_inverse(hessian: Tensor) -> Tensor:
    """[B, C, C] float32"""
    return inverse(hessian, DAMP)[0].float()


def literal_size(columns: int, itemsize: int, budget: float, most: int = 8) -> tuple[int, int]:
    """Rows and steps within the bytes that the literal form may move."""
    each = 2 * itemsize * columns**2  # read and written for each weight
    least = min(columns, LITERAL_STEPS)
    rows = int(min(most, max(1, budget / each / least)))
    return rows, int(min(columns, max(least, budget / each / rows)))


def check(made: Problem) -> tuple[int, int]:
    """Both forms of OBQ must choose the same codes; returns the rows and steps compared."""
    rows, steps = literal_size(made.weight.shape[1], 8, CHECK_BYTES, min(8, len(made.weight)))
    expected = made.literal(slice(rows), steps, torch.float64)
    actual = made.obq(slice(rows), Setting(rows, 32), torch.float64, "reference").gather(
        1, expected.picked
    )
    if not torch.equal(actual, expected.codes):
        same = (actual == expected.codes).double().mean().item()
        raise AssertionError(f"the two forms of OBQ agree on {same:.4f} of the codes only")
    return rows, steps


def check_setting(made: Problem, setting: Setting) -> None:
    """OBQ as it is timed must be as good as in float64.

    Greedy choices that differ at a close call differ ever after. At 128x1152 nine rows of twelve
    choose the same codes, the others move by up to 27 % either way: so of `CHECK_ROWS` rows one at
    least must agree to 5 %, and all together to 40 %. Fewer, of many columns, may all have met a
    close call.
    """
    R, C = made.weight.shape
    rows = torch.arange(min(R, CHECK_ROWS, max(2, CHECK_STEPS // C**3)))
    fresh = made._replace(inverse=shared_inverse(made.hessian))
    expected = fresh.obq(rows, Setting(len(rows), 32), torch.float64, "reference")
    actual = made.obq(rows, setting)
    ratios = [
        made.error(actual[i : i + 1], row) / made.error(expected[i : i + 1], row)
        for i, row in enumerate(rows.split(1))
    ]
    together = made.error(actual, rows) / made.error(expected, rows)
    one_agrees = min(abs(ratio - 1) for ratio in ratios) <= 0.05 or len(rows) < CHECK_ROWS
    if not one_agrees or not 1 / 1.4 < together < 1.4:
        raise AssertionError(
            f"OBQ with {setting} has {together:.4g} times the error of float64; by row {ratios}"
        )


def fastest(made: Problem, device: torch.device) -> Setting:
    """Doubling and halving what is fastest so far, until neither helps."""
    R, C = made.weight.shape
    memory = CHUNK_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
    most = max(1, min(R, memory // (4 * C * C)))

    @cache
    def per_row(setting: Setting) -> float:
        times: list[float] = []
        while sum(times) < 0.2:
            start = time.perf_counter()
            made.obq(slice(setting.rows), setting)
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times) / setting.rows

    few = max(1, min(4, R, CHUNK_AT_FIRST // (4 * C * C)))
    best = Setting(few if device.type == "cpu" else most, 64)
    while True:
        near = [Setting(best.rows, block) for block in (best.block // 2, best.block * 2)]
        near += [Setting(rows, best.block) for rows in (best.rows // 4, best.rows * 4)]
        legal = [n for n in near if 1 <= n.rows <= most and BLOCKS[0] <= n.block <= BLOCKS[1]]
        better = min(legal, key=per_row, default=best)
        if per_row(better) >= per_row(best):
            return best
        best = better


def measure(
    layer: Layer,
    setting_of: Callable[[Problem], Setting],
    device: torch.device,
    budget: float = 5.0,
) -> Row:
    made = Problem.of(layer, device)
    N, C = made.weight.shape
    compared = check(made)
    setting = setting_of(made)
    check_setting(made, setting)
    sample = min(N, max(setting.rows, 2))
    picked = torch.linspace(0, N - 1, sample, device=device).long()
    most = min(N, LITERAL_ROWS[device.type])
    rows, steps = literal_size(C, 4, LITERAL_BYTES[device.type], most)
    codes: dict[str, Tensor] = {}
    calls: dict[str, Callable[[], object]] = {
        "sapq": made.sapq,
        "inverse": lambda: shared_inverse(made.hessian),
        "obq": lambda: codes.update(obq=made.obq(picked, setting)),
        "literal": lambda: made.literal(slice(rows), steps),
    }
    taken = interleaved(calls, device, budget=budget)
    return Row(
        layer.name, layer.groups, N, C,
        sapq=taken["sapq"],
        obq=taken["inverse"] + taken["obq"] * N / sample,
        obq_rows=sample,
        setting=setting,
        literal=taken["inverse"] + taken["literal"] * N / rows * C / steps,
        literal_rows=rows,
        literal_steps=steps,
        compared_rows=compared[0],
        compared_steps=compared[1],
        sapq_error=made.error(made.codes[picked], picked),
        obq_error=made.error(codes["obq"], picked),
    )  # fmt: skip


def settings(device: torch.device) -> Callable[[Problem], Setting]:
    """The fastest one for each number of columns, looked for once."""
    found: dict[int, Setting] = {}

    def of(made: Problem) -> Setting:
        N, C = made.weight.shape
        if made.groups > 1:
            return Setting(N, C)
        if C not in found:
            found[C] = fastest(made, device)
        return found[C]

    return of


HEADER = (
    "layer", "shape", "SAPQ s", "OBQ s", "from", "OBQ / SAPQ", "literal OBQ s", "from",
    "literal / SAPQ", "error SAPQ", "error OBQ",
)  # fmt: skip


def cells(row: Row) -> tuple[object, ...]:
    sampled = f"{row.obq_rows} of {row.rows} rows" if row.obq_rows < row.rows else "all rows"
    steps = f"{row.literal_rows} rows, {row.literal_steps} of {row.columns} steps"
    return (
        row.layer, f"{row.rows}x{row.columns}", row.sapq, row.obq, sampled, row.ratio,
        row.literal, steps, row.literal / row.sapq, row.sapq_error, row.obq_error,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.obq", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_COLUMNS} columns only")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    most = QUICK_COLUMNS if options.quick else float("inf")
    chosen = [layer for layer in distinct(resnet50()) if MIN_COLUMNS <= layer.columns <= most]

    setting_of, rows = settings(device), []
    # the most rows first: they allow every number of rows at a time
    for layer in sorted(chosen, key=lambda layer: (layer.columns, -layer.rows)):
        rows.append(measure(layer, setting_of, device))
        print(f"{layer.name} {layer.rows}x{layer.columns}: {rows[-1].ratio:.1f}", file=sys.stderr)
    where = environment(device, of=options.commit)
    print("{device}, {threads} threads, torch {torch}, {commit}\n".format(**where))
    print(markdown(HEADER, map(cells, rows)))
    print(f"\nsmallest OBQ / SAPQ: {min(row.ratio for row in rows):.1f}")
    if options.json:
        report = {
            "environment": where,
            "layers": [asdict(row) | {"ratio": row.ratio} for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
