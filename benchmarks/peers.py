"""One layer, solved by us and by other implementations of GPTQ, in turn, on one device.

    OMP_NUM_THREADS=1 python -m benchmarks.peers --json peers.json

ours            sapq_triton.solve(measure=False): the others compute no error of that kind.
published       GPTQ in eager PyTorch as Frantar et al. publish it: three factorizations, a loop
                over columns, blocks of 128. Written for this comparison; it sums up no losses.
llm-compressor  its `quantize_weight`, eager; on a GPU also with its Triton kernel. What it is given
                it overwrites, so a copy of weight and Hessian is part of its time.
GPTQModel       its `GPTQ.quantize`, eager; on a GPU also with its CUDA kernel.

The last two are optional: what is not installed is named, and left out. All are given the same
weight, Hessian and damping (0.01 of the mean diagonal), and round to the same asymmetric 4-bit
grid. That is the grid of the full range, because GPTQModel takes no other from outside; its
finding that again, in two passes over the weight, is part of its time. The search for a better grid
is part of nobody's. Groups keep the grid of the original weight in every order.

Before anything is timed, everyone must have the layer error that ours has in the same order, to
1e-3, and order "sensitivity" that of the same algorithm in float64.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bench_solve import error_ratio, textbook, tolerance
from benchmarks.measure import environment, interleaved, markdown, peak_memory
from benchmarks.shapes import problem
from sapq_triton import QuantSpec, SolveResult, dequantize, layer_error, solve
from sapq_triton.spec import Order

SHAPES = ((1024, 1024), (512, 4608), (4096, 4096))  # rows, columns
QUICK_SHAPES = ((128, 256),)
BITS, DAMP, BLOCK = 4, 0.01, 128
ORDERS: tuple[Order, ...] = ("natural", "activation")  # those that all implementations know
CLOSE = 1e-3  # relative difference of layer errors
BUDGET = 20.0  # seconds of timing for each shape, three rounds at least


@dataclass(frozen=True)
class Problem:
    """weight [R, C], hessian [C, C], scale, zero_point [R, G]"""

    weight: Tensor
    hessian: Tensor
    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    @classmethod
    def of(cls, rows: int, columns: int, group_size: int, device: torch.device) -> "Problem":
        weight, hessian = problem(rows, columns, device=device)
        spec = QuantSpec(BITS, group_size, scale_search="absmax")
        grid = solve(weight, hessian, spec, order="nearest", measure=False)
        return cls(weight, hessian, grid.scale, grid.zero_point, spec)

    @property
    def group_size(self) -> int:
        return self.spec.columns_per_group(self.weight.shape[1])

    def solve(self, order: Order) -> SolveResult:
        return solve(
            self.weight, self.hessian, self.spec, order=order, damp=DAMP, measure=False,
            scale=self.scale, zero_point=self.zero_point,
        )  # fmt: skip

    def codes(self, out: Tensor) -> Tensor:
        """Of what a solver returned: codes uint8, or weights that must lie on the grid."""
        if out.dtype == torch.uint8:
            return out
        s, z = (t.repeat_interleave(self.group_size, 1) for t in (self.scale, self.zero_point))
        codes = (out / s).round() + z
        torch.testing.assert_close((codes - z) * s, out.to(s), rtol=1e-5, atol=0)
        assert codes.min() >= 0 and codes.max() <= self.spec.qmax, "codes beyond the range"
        return codes.to(torch.uint8)

    def error(self, codes: Tensor) -> float:
        """Relative layer error."""
        quantized = dequantize(codes, self.scale, self.zero_point)
        all_of_it = layer_error(self.weight, torch.zeros_like(quantized), self.hessian)
        return (layer_error(self.weight, quantized, self.hessian) / all_of_it).item()


# --- solvers: codes, or the weights they stand for, [R, C] ----------------------------------------

Solver = Callable[[Problem, Order], Tensor]


def ours(made: Problem, order: Order) -> Tensor:
    return made.solve(order).codes


def published(made: Problem, order: Order) -> Tensor:
    """Frantar et al. 2022, arXiv 2210.17323, algorithm 1; in the precision of the weight."""
    C = made.weight.shape[1]
    columns = torch.arange(C, device=made.weight.device)
    w, h = made.weight.clone(), made.hessian.clone()
    if order == "activation":
        columns = h.diagonal().argsort(descending=True)
        w, h = w[:, columns], h[columns][:, columns]
    h.diagonal().add_(DAMP * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    grids = list(zip(made.scale.unbind(1), made.zero_point.unbind(1), strict=True))
    grid_of = [grids[group] for group in (columns // made.group_size).tolist()]
    codes = torch.empty_like(w)
    for start in range(0, C, BLOCK):
        end = min(start + BLOCK, C)
        now, u = w[:, start:end].clone(), upper[start:end, start:end]
        error = torch.empty_like(now)
        for k in range(end - start):
            scale, zero_point = grid_of[start + k]
            code = ((now[:, k] / scale).round() + zero_point).clamp(0, made.spec.qmax)
            error[:, k] = (now[:, k] - (code - zero_point) * scale) / u[k, k]
            now[:, k:] -= error[:, k, None] * u[k, k:]
            codes[:, start + k] = code
        w[:, end:] -= error @ upper[start:end, end:]
    return codes.to(torch.uint8)[:, columns.argsort()]


def llm_compressor(device: torch.device) -> dict[str, Solver]:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    half = 2 ** (BITS - 1)  # its codes are signed

    def call(made: Problem, order: Order, eager: bool) -> Tensor:
        os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = str(int(eager))
        quantized, _, gave_up = quantize_weight(
            made.weight[None].clone(),
            made.hessian[None].clone(),
            made.scale[None],
            made.zero_point[None] - half,
            None,
            QuantizationArgs(
                num_bits=BITS,
                symmetric=False,
                strategy="channel" if made.spec.group_size == -1 else "group",
                group_size=None if made.spec.group_size == -1 else made.group_size,
                actorder="static" if order == "activation" else None,
            ),
            blocksize=BLOCK,
            percdamp=DAMP,
        )
        assert not gave_up.any(), "rounded to nearest"
        return quantized[0]

    found: dict[str, Solver] = {"llm-compressor": partial(call, eager=True)}
    if device.type == "cuda":
        found["llm-compressor, Triton"] = partial(call, eager=False)
    return found


def gptqmodel(device: torch.device) -> dict[str, Solver]:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.quantization.gptq_cuda import block_update_available

    def call(made: Problem, order: Order, eager: bool) -> Tensor:
        os.environ["GPTQMODEL_DISABLE_GPTQ_CUDA"] = str(int(eager))
        rows, columns = made.weight.shape
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(made.weight, requires_grad=False)
        config = QuantizeConfig(
            bits=BITS,
            group_size=made.spec.group_size,
            sym=False,
            desc_act=order == "activation",
            act_group_aware=False,
            static_groups=made.spec.group_size != -1,
            damp_percent=DAMP,
            mse=0.0,
            offload_to_disk=False,
        )
        task = GPTQ(layer, config)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = made.hessian, 1
        quantized, scale, zero_point, *_ = task.quantize(blocksize=BLOCK)
        same = torch.equal(scale, made.scale) and torch.equal(zero_point, made.zero_point)
        assert same, "another grid than ours"
        return quantized

    found: dict[str, Solver] = {"GPTQModel": partial(call, eager=True)}
    if device.type == "cuda" and block_update_available():
        found["GPTQModel, CUDA"] = partial(call, eager=False)
    return found


# package -> its solvers on a device; ImportError where it is not installed
PEERS: dict[str, Callable[[torch.device], dict[str, Solver]]] = {
    "llmcompressor": llm_compressor,
    "gptqmodel": gptqmodel,
}


def solvers(device: torch.device) -> tuple[dict[str, Solver], dict[str, str]]:
    """By name, ours first; and of each package its version, or why it is left out."""
    found: dict[str, Solver] = {"ours": ours, "published": published}
    packages = {}
    for package, load in PEERS.items():
        try:
            found |= load(device)
            packages[package] = version(package)
        except ImportError as missing:
            packages[package] = f"left out: {missing}"
    return found, packages


# --- compare, then measure ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """agreement: share of codes that are ours in the same order. memory: extra bytes, on a GPU."""

    solver: str
    order: Order
    rows: int
    columns: int
    group_size: int
    seconds: float
    ratios: dict[Order, float]  # to the seconds of ours in each order
    error: float
    agreement: float
    memory: int | None


class Quality(NamedTuple):
    error: float
    agreement: float


def check_sensitivity(made: Problem) -> Quality:
    """There is none to compare with but the algorithm itself, in float64."""
    result = made.solve("sensitivity")
    expected = textbook(made.weight, made.hessian, result, made.spec.qmax)
    ratio = error_ratio(made.weight, made.hessian, result, expected)
    if not abs(ratio - 1) < tolerance(len(made.weight)):
        raise AssertionError(f"order sensitivity has {ratio:.6f} times the error of float64")
    return Quality(made.error(result.codes), 1.0)


def check(made: Problem, found: Mapping[str, Solver]) -> dict[tuple[str, Order], Quality]:
    """Everyone must be as good as ours in the same order."""
    out: dict[tuple[str, Order], Quality] = {}
    for order in ORDERS:
        own = made.codes(found["ours"](made, order))
        expected = made.error(own)
        for name, solver in found.items():
            codes = made.codes(solver(made, order))
            quality = Quality(made.error(codes), (codes == own).double().mean().item())
            if not abs(quality.error / expected - 1) < CLOSE:
                raise AssertionError(
                    f"{name} in order {order} has a layer error of {quality.error:.6g}, "
                    f"ours {expected:.6g}; {quality.agreement:.4f} of the codes agree"
                )
            out[name, order] = quality
    return out | {("ours", "sensitivity"): check_sensitivity(made)}


def measure(
    layer: tuple[int, int], group_size: int, found: Mapping[str, Solver], device: torch.device
) -> list[Row]:
    made = Problem.of(*layer, group_size, device)
    quality = check(made, found)
    calls = {key: partial(found[key[0]], made, key[1]) for key in quality}
    taken = interleaved(calls, device, budget=BUDGET, warm=True)
    gpu = device.type == "cuda"  # the profiler that counts on a CPU sees no NumPy, which is in ours
    memory = {key: peak_memory(call, device) if gpu else None for key, call in calls.items()}
    own = {order: seconds for (name, order), seconds in taken.items() if name == "ours"}
    return [
        Row(
            *key, *layer, group_size,
            seconds=taken[key],
            ratios={order: taken[key] / seconds for order, seconds in own.items()},
            error=quality[key].error,
            agreement=quality[key].agreement,
            memory=memory[key],
        )
        for key in sorted(calls, key=lambda key: list(found).index(key[0]))
    ]  # fmt: skip


HEADER = (
    "solver", "order", "seconds", "/ ours natural", "/ ours activation", "/ ours sensitivity",
    "layer error", "codes as ours", "extra memory MB",
)  # fmt: skip


def cells(row: Row) -> tuple[object, ...]:
    ratios = (f"{row.ratios[order]:.2f}" for order in (*ORDERS, "sensitivity"))
    memory = "not measured" if row.memory is None else f"{row.memory / 1e6:.0f}"
    return (
        row.solver, row.order, row.seconds, *ratios, f"{row.error:.6f}", f"{row.agreement:.5f}",
        memory,
    )  # fmt: skip


def title(row: Row) -> str:
    grid = "per channel" if row.group_size == -1 else f"groups of {row.group_size}"
    return f"{row.rows}x{row.columns}, {BITS} bits, {grid}"


def shape(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help="one small layer only")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument(
        "--shape", nargs="+", type=shape, default=SHAPES, help="rows x columns, like 512x4608"
    )
    parser.add_argument(
        "--group-size", nargs="+", type=int, default=[-1, 128], help="-1: per channel"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    found, packages = solvers(device)
    where = environment(device, of=options.commit) | {"packages": packages}
    print("{device}, {threads} threads, torch {torch}, {commit}".format(**where))
    print("".join(f"{package} {state}\n" for package, state in packages.items()))
    rows: list[Row] = []
    for group_size in options.group_size:
        for layer in QUICK_SHAPES if options.quick else options.shape:
            rows += measure(layer, group_size, found, device)
            print(f"{title(rows[-1])}: done", file=sys.stderr)
    for heading, table in groupby(rows, title):
        print(f"{heading}\n\n{markdown(HEADER, map(cells, table))}\n")
    if options.json:
        report = {"environment": where, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
