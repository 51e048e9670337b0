"""What each kernel costs, from its machine code: compiled ahead of time, no GPU needed.

    python -m benchmarks.static --json benchmarks/results/static.json
    python -m benchmarks.static --short

A launcher is called on meta tensors while a recorder stands in for its kernel. So what is compiled
is what would be launched, block sizes and warps included, and specialized as Triton does it: sizes
and strides of 1 are constants, multiples of 16 and pointers are marked as such. CASES names the
calls; a kernel in kernels/ that no case launches is an error. Each target compiles the "default"
configuration of launch.json (a new device of its kind takes that), and its own where it has one.

registers     per thread (AMD: vector registers)
spills        bytes per thread in local memory (NVIDIA: stack and local, AMD: scratch)
shared        bytes per program
programs      resident on one multiprocessor (compute unit) at once: as many as its registers,
              shared memory, warps and program slots admit (DEVICES)
instructions  of the whole kernel in machine code (SASS, AMD GCN), the padding at its end left out
step          of solve_columns, whose SUB column steps are unrolled: instructions per column, those
              of the loop over sub-tiles (addresses and loads included) less those of the loops over
              other columns within it, divided by SUB

Exit status 1 where anything spills. --short compiles for sm_90 and gfx942 what these would launch,
and also fails where a step has more than 1.1 times the instructions of the committed static.json:
checked where that was written with this minor version of Triton, and said where not.

The ESTIMATE for solve_columns is a model and no measurement. Cycles per column, one program alone
on its multiprocessor:

chain         of one warp through its instructions in order, by the latencies of `cycles.py`: the
              step (one feedback product per earlier column of its SUB, division, rounding), and per
              SUB columns the exchange behind barriers and the product with earlier columns of the
              tile, (TILE / SUB - 1) / 2 iterations on average. Once with every load from L1, once
              with every load from L2: the truth is in between, as each row of the feedback comes
              from L2 first
issue         the same instructions, times the warps that share a scheduler
ns            the larger of the two, at the boost clock
far           ns of the product with the tiles before in a launch of SPAN columns, per column, loads
              taken as hidden; not part of ns
barriers      per SUB columns

Left out: other programs on the multiprocessor, and bandwidth. An H100 took longer than the estimate
with L2, with tiles of 128, blocks of 32 rows and 8 warps: the launch of 128 columns 63 us for 2048
rows with one group, that is 490 ns a column, and 101 us for 4096 rows with 32 groups, whose grids
lay with groups innermost then, a cache line for each row.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import sapq_triton.kernels
from benchmarks.cycles import Code
from sapq_triton.codebook import NF4, Codebook
from sapq_triton.kernels import launch
from sapq_triton.kernels.solve_columns import SPAN
from sapq_triton.packing import words
from sapq_triton.spec import MSE_SHRINK
from sapq_triton.window import Window

RESULTS = Path(__file__).parent / "results" / "static.json"
SHORT = ("sm_90", "gfx942")
GROWTH = 1.1  # of a column step over the committed one
COLUMNS = 4096  # of the layer in the cases below
TILE = 128  # columns of a tile of the re-ranked order


@dataclass(frozen=True)
class Device:
    """One multiprocessor or compute unit, as its vendor documents it.

    Four schedulers; for each `warps` and 512 registers per lane, given out eight at a time. shared:
    bytes, of which each program takes `reserved` more than it asks for. programs: at once. clock:
    GHz. latency: cycles of a load from L1, from L2. issue: cycles per instruction of one warp.
    """

    target: GPUTarget
    clock: float
    warps: int = 16
    shared: int = 228 * 1024
    reserved: int = 1024
    programs: int = 32
    latency: tuple[int, int] = (35, 260)
    issue: int = 1

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Programs of so many warps, registers per lane and bytes that fit at once."""
        fitting = 4 * min(self.warps, 512 // (-(-registers // 8) * 8))
        room = self.shared // max(shared + self.reserved, 1)
        return min(fitting // warps, room, self.programs)

    @property
    def precision(self) -> str:
        """What `ops.dot_precision` makes of the default."""
        return "ieee" if self.target.backend == "hip" else "tf32x3"


DEVICES = {  # A100, H100 SXM, B200, MI300X
    "sm_80": Device(GPUTarget("cuda", 80, 32), clock=1.41, shared=164 * 1024),
    "sm_90": Device(GPUTarget("cuda", 90, 32), clock=1.83),
    "sm_100": Device(GPUTarget("cuda", 100, 32), clock=1.86),
    "gfx942": Device(
        GPUTarget("hip", "gfx942", 64), clock=2.1, warps=8, shared=64 * 1024, reserved=0,
        programs=16, latency=(120, 300), issue=4,
    ),
}  # fmt: skip
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def grid_of(rows: int, groups: int, *group_shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale, zero_point [1, rows, groups], group int64"""
    scale, zero_point = meta(1, groups, rows).mT, meta(1, groups, rows).mT
    return scale, zero_point, meta(*group_shape, dtype=torch.int64)


# In the solver's layouts: weights [B, C, R] seen as [B, R, C], grids [B, G, R] as [B, R, G], tiles
# cut out of larger matrices.
# C = 4096 columns, R = 4096 rows, tiles of 128.


def quantize_groups(
    module: ModuleType,
    symmetric: bool,
    shrink: tuple[float, ...],
    qmax: int | Codebook = 15,
    weighted: bool = False,
) -> None:
    importance = meta(1, 4096) if weighted else None
    module.quantize_groups(meta(1, 4096, 4096), 128, qmax, symmetric, shrink, importance)


def column_sensitivity(module: ModuleType, qmax: int | Codebook = 15) -> None:
    diagonal = meta(1, 4096, 4096).diagonal(dim1=1, dim2=2)
    grid = grid_of(4096, 32, 1, 4096)
    module.column_sensitivity(meta(1, 4096, 4096).mT, *grid, diagonal, qmax)


def solve_columns(
    module: ModuleType,
    columns: int,
    groups: int,
    precision: str,
    qmax: int | Codebook = 15,
    sparse: bool = False,
) -> None:
    weight, feedback = meta(1, columns, 4096).mT, meta(1, columns, columns)
    if columns > TILE:
        feedback = feedback.mT  # as the factor of a whole layer lies in memory
    grid = grid_of(4096, groups, 1, columns)
    pruned = meta(1, columns, 4096, dtype=torch.bool).mT if sparse else None
    module.solve_columns(weight, weight, feedback, *grid, qmax, precision, pruned)


def compensate(module: ModuleType, precision: str, qmax: int | Codebook = 15) -> None:
    weight, error, rows = meta(1, 4096, 4096)[:, 128:].mT, meta(1, 4096, 128), meta(1, 128, 3968)
    module.compensate(weight, error, rows, *grid_of(4096, 32, 1, 3968), qmax, precision)


def downdate(module: ModuleType, precision: str) -> None:
    module.downdate(meta(1, 4096, 4096)[:, 128:, 128:], meta(1, 128, 3968), precision)


def accumulate_rows(module: ModuleType, dtype: torch.dtype, precision: str) -> None:
    inputs = meta(65536, 4096, 1, 1, 1, dtype=dtype)
    module.accumulate_hessian(meta(1, 4096, 4096), inputs, Window(), precision)


def accumulate_patches(module: ModuleType, dtype: torch.dtype, precision: str) -> None:
    inputs = meta(32, 64, 1, 58, 58, dtype=dtype)
    module.accumulate_hessian(meta(1, 576, 576), inputs, Window(size=(1, 3, 3)), precision)


def accumulate_depthwise(module: ModuleType, dtype: torch.dtype, precision: str) -> None:
    window = Window(size=(1, 3, 3), groups=64)
    inputs = meta(32, 64, 1, 58, 58, dtype=dtype)
    module.accumulate_hessian(meta(64, 9, 9), inputs, window, precision)


def solve_rows(module: ModuleType, columns: int, qmax: int | Codebook = 15) -> None:
    scale, zero_point, group = grid_of(256, 4, 256, columns)
    inverse = meta(256, columns, columns)
    module.solve_rows(meta(256, columns), inverse, scale[0], zero_point[0], group, qmax, steps=32)


def packed_weight(bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, scale, qzeros of [4096, 4096]"""
    groups = 4096 // group_size
    qweight, qzeros = (meta(4096, words(n, bits), dtype=torch.int32) for n in (4096, groups))
    return qweight, meta(4096, groups, dtype=torch.float16), qzeros


def dequantize_packed(module: ModuleType, bits: int) -> None:
    module.dequantize_packed(*packed_weight(bits, 128), bits, 4096, torch.bfloat16)


def matmul_packed(
    module: ModuleType, precision: str, bits: int, group_size: int = 128,
    dtype: torch.dtype = torch.float16, symmetric: bool = False,
) -> None:  # fmt: skip
    qweight, scale, qzeros = packed_weight(bits, group_size)
    zeros, x = None if symmetric else qzeros, meta(1, 4096, dtype=dtype)
    module.matmul_packed(x, qweight, scale, zeros, bits, precision)


# precision: of the target by default; "ieee" is left out where it is the default
CASES: dict[str, dict[str, Callable[[ModuleType, str], None]]] = {
    "quantize_groups": {
        "absmax": lambda module, _: quantize_groups(module, False, (1.0,)),
        "absmax symmetric": lambda module, _: quantize_groups(module, True, (1.0,)),
        "mse": lambda module, _: quantize_groups(module, False, MSE_SHRINK),
        "mse symmetric": lambda module, _: quantize_groups(module, True, MSE_SHRINK),
        "weighted": lambda module, _: quantize_groups(module, False, MSE_SHRINK, weighted=True),
        "mse codebook": lambda module, _: quantize_groups(module, True, MSE_SHRINK, NF4),
    },
    "column_sensitivity": {
        "": lambda module, _: column_sensitivity(module),
        "codebook": lambda module, _: column_sensitivity(module, NF4),
    },
    "solve_columns": {
        "tile": lambda module, precision: solve_columns(module, TILE, 32, precision),
        "tile one group": lambda module, precision: solve_columns(module, TILE, 1, precision),
        "groups": lambda module, precision: solve_columns(module, COLUMNS, 32, precision),
        "one group": lambda module, precision: solve_columns(module, COLUMNS, 1, precision),
        "groups ieee": lambda module, _: solve_columns(module, COLUMNS, 32, "ieee"),
        "ragged": lambda module, precision: solve_columns(module, COLUMNS + 4, 1, precision),
        # what the solver would launch on the last tile: the most registers
        "ragged pruned": lambda module, p: solve_columns(module, TILE - 2, 6, p, sparse=True),
        "codebook": lambda module, precision: solve_columns(module, COLUMNS, 32, precision, NF4),
    },
    "compensate": {
        "": compensate,
        "codebook": lambda module, precision: compensate(module, precision, NF4),
        "ieee": lambda module, _: compensate(module, "ieee"),
    },
    "downdate": {
        "": downdate,
        "ieee": lambda module, _: downdate(module, "ieee"),
    },
    "accumulate_hessian": {
        "rows float32": lambda module, p: accumulate_rows(module, torch.float32, p),
        "rows float32 ieee": lambda module, _: accumulate_rows(module, torch.float32, "ieee"),
        "rows bfloat16": lambda module, p: accumulate_rows(module, torch.bfloat16, p),
        "patches float32": lambda module, p: accumulate_patches(module, torch.float32, p),
        "patches float32 ieee": lambda module, _: accumulate_patches(module, torch.float32, "ieee"),
        "patches bfloat16": lambda module, p: accumulate_patches(module, torch.bfloat16, p),
        "depthwise float32": lambda module, p: accumulate_depthwise(module, torch.float32, p),
        "depthwise bfloat16": lambda module, p: accumulate_depthwise(module, torch.bfloat16, p),
    },
    "solve_rows": {
        "128 columns": lambda module, _: solve_rows(module, 128),
        "2048 columns": lambda module, _: solve_rows(module, 2048),
        "codebook": lambda module, _: solve_rows(module, 2048, NF4),
    },
    "dequantize_packed": {
        "3 bits": lambda module, _: dequantize_packed(module, 3),
        "4 bits": lambda module, _: dequantize_packed(module, 4),
    },
    "matmul_packed": {
        "2 bits": lambda module, p: matmul_packed(module, p, 2),
        "3 bits": lambda module, p: matmul_packed(module, p, 3),
        "3 bits one group": lambda module, p: matmul_packed(module, p, 3, 4096),
        "3 bits float32": lambda module, p: matmul_packed(module, p, 3, dtype=torch.float32),
        "4 bits": lambda module, p: matmul_packed(module, p, 4),
        "4 bits symmetric": lambda module, p: matmul_packed(module, p, 4, symmetric=True),
        "4 bits float32": lambda module, p: matmul_packed(module, p, 4, dtype=torch.float32),
        "8 bits": lambda module, p: matmul_packed(module, p, 8, dtype=torch.bfloat16),
        "3 bits ieee": lambda module, _: matmul_packed(module, "ieee", 3),
        "3 bits float32 ieee": lambda module, _: matmul_packed(
            module, "ieee", 3, dtype=torch.float32
        ),
    },
}


@dataclass(frozen=True)
class Cost:
    kernel: str
    variant: str
    target: str
    configuration: str  # of launch.json: "default" or the target
    registers: int
    spills: int
    shared: int
    programs: int
    instructions: int
    step: float | None = None
    estimate: dict[str, float] = field(default_factory=dict)  # a model, not measured


def key(cost: Mapping[str, Any]) -> tuple[str, ...]:
    return cost["kernel"], cost["variant"], cost["target"], cost["configuration"]


class Recorder:
    """Stands in for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def configuration(self) -> dict[str, Any]:
        """What may differ between the launches of one case."""
        fixed = {k: v for k, v in self.arguments.items() if not isinstance(v, Tensor)}
        return fixed | self.options

    def __getitem__(self, grid: object) -> "Recorder":
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, args, strict=False))
        self.arguments |= {name: value for name, value in kwargs.items() if name in names}
        self.options = {name: value for name, value in kwargs.items() if name not in names}


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    """The kernels that a file launches; its device functions have no such name."""
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction | InterpretedFunction) and name.endswith("_kernel")
    }
    if any(isinstance(kernel, InterpretedFunction) for kernel in found.values()):
        raise SystemExit(
            "TRITON_INTERPRET is set, and interpreted kernels are never compiled: unset it"
        )
    return found


@contextmanager
def recorded(module: ModuleType, target: str) -> Iterator[dict[str, Recorder]]:
    """Replace the kernels of a module, and the device family whose launch parameters it takes."""
    before, family = dict(vars(module)), launch.family
    recorders = {name: Recorder(kernel) for name, kernel in kernels_of(module).items()}
    vars(module).update(recorders)
    launch.family = lambda _: target
    try:
        yield recorders
    finally:
        vars(module).update(before)
        launch.family = family


def compiled(launch: Recorder, target: GPUTarget) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def measure(kernel: str, variant: str, target: str, configuration: str, launch: Recorder) -> Cost:
    device = DEVICES[target]
    binary = compiled(launch, device.target)
    shared = binary.metadata.shared
    if "cubin" in binary.asm:
        usage = nvidia_tool("cuobjdump", "-res-usage", binary.asm["cubin"])
        registers, stack, local = (
            number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL")
        )
        spills = stack + local
        code = Code.nvidia(nvidia_tool("nvdisasm", "-c", binary.asm["cubin"]))
    else:
        listing = binary.asm["amdgcn"]
        registers = amd_metadata(listing, "vgpr_count")
        spills = amd_metadata(listing, "private_segment_fixed_size")
        code = Code.amd(listing)
    warps = binary.metadata.num_warps
    step: float | None = None
    estimate: dict[str, Any] = {}
    if "SUB" in launch.arguments:
        step, estimate = column_step(code, device, warps, launch.arguments)
    return Cost(
        kernel, variant, target, configuration, registers, spills, shared,
        device.resident(warps, registers, shared), code.count(), step, estimate,
    )  # fmt: skip


def column_step(
    code: Code, device: Device, warps: int, blocks: Mapping[str, int]
) -> tuple[float, dict[str, float]]:
    """`step` and the estimate of the module docstring"""
    SUB, TILE, BLOCK_J = (blocks[name] for name in ("SUB", "TILE", "BLOCK_J"))
    columns = code.columns(SUB)
    parts = [(columns.step, 1.0), *((loop, (TILE / SUB - 1) / 2) for loop in columns.near)]
    sharing = device.issue * max(1.0, warps / 4)

    def per_column(cost: Callable[[list[int]], float]) -> float:
        return sum(times * cost(part) for part, times in parts) / SUB

    def chain(memory: int) -> float:
        return per_column(lambda part: code.cycles(part, memory))

    issue = per_column(code.count) * sharing
    l1, l2 = map(chain, device.latency)
    iterations = (SPAN - TILE) / 2 / BLOCK_J / TILE
    far = iterations * sum(
        max(code.cycles(loop, device.latency[0]), code.count(loop) * sharing)
        for loop in columns.far
    )
    estimate = {
        "issue": issue,
        "chain L1": l1,
        "chain L2": l2,
        "ns L1": max(issue, l1) / device.clock,
        "ns L2": max(issue, l2) / device.clock,
        "far": far / device.clock,
        "barriers": SUB * per_column(code.barriers),
    }
    return code.count(columns.step) / SUB, {name: round(x, 1) for name, x in estimate.items()}


def nvidia_tool(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def amd_metadata(listing: str, name: str) -> int:
    return number(rf"^\s+\.{name}:\s+(\d+)$", listing)


def number(pattern: str, listing: str) -> int:
    """The one that the pattern's group finds"""
    found = re.search(pattern, listing, re.MULTILINE)
    assert found is not None, pattern
    return int(found[1])


def launches(
    module: ModuleType, call: Callable[[ModuleType, str], None], target: str, own: bool
) -> Iterator[tuple[str, Recorder]]:
    """Configuration and launch, of each kernel that a case launches, the same launch once."""
    found = {}
    for configuration in (launch.DEFAULT, target):
        with recorded(module, configuration) as recorders:
            call(module, DEVICES[target].precision)
        found[configuration] = {n: r for n, r in recorders.items() if r.arguments}
    for name, default in found[launch.DEFAULT].items():
        other = found[target][name]
        same = other.configuration() == default.configuration()
        if same or not own:
            yield launch.DEFAULT, default
        if not same:
            yield target, other


def measurements(
    names: Sequence[str], targets: Sequence[str], skip: Sequence[str], own: bool
) -> Iterator[Cost]:
    """own: only what a target would launch, else also what it overrides"""
    paths = list(sapq_triton.kernels.__path__)
    modules = {
        info.name: importlib.import_module(f"sapq_triton.kernels.{info.name}")
        for info in pkgutil.iter_modules(paths)
    }
    written = {name for name, module in modules.items() if kernels_of(module)}
    if written != set(CASES):
        raise SystemExit(f"CASES and kernels/ differ: {', '.join(sorted(written ^ set(CASES)))}")
    for name in names:
        for target in targets:
            idle = set(kernels_of(modules[name]))
            for variant, call in CASES[name].items():
                if variant in skip or variant.endswith(DEVICES[target].precision):
                    continue
                for configuration, recorder in launches(modules[name], call, target, own):
                    idle.discard(recorder.kernel.__name__)
                    yield measure(name, variant, target, configuration, recorder)
            if idle:
                raise SystemExit(f"no case of {name} launches {', '.join(sorted(idle))}")


# --- reports --------------------------------------------------------------------------------------


def line(cost: Cost, *cells: object) -> str:
    name = f"{cost.kernel} {cost.variant}".strip()
    return f"{name:40}{cost.target:8}{cost.configuration:8}" + "".join(f"{c:>10}" for c in cells)


def row(cost: Cost) -> str:
    counts = cost.registers, cost.spills, cost.shared, cost.programs, cost.instructions
    return line(cost, *counts, "" if cost.step is None else f"{cost.step:.1f}")


def text(costs: Sequence[Cost]) -> str:
    """One cost a line."""
    rows = ",\n".join(f"  {json.dumps(asdict(cost))}" for cost in costs)
    about = (
        "compiled ahead of time; each estimate is a model, not measured: see benchmarks/static.py"
    )
    return (
        f'{{\n "about": {json.dumps(about)},\n "triton": {json.dumps(triton.__version__)},\n'
        f' "costs": [\n{rows}\n ]\n}}\n'
    )


def longer(costs: Sequence[Cost], committed: Path) -> list[str]:
    """What is wrong with the column steps beside the committed ones."""
    steps = [cost for cost in costs if cost.step is not None]
    if not steps:
        return []
    if not committed.exists():
        return [f"no committed figures: write them with --json {committed}"]
    known = json.loads(committed.read_text())
    minor, here = (version.split(".")[:2] for version in (known["triton"], triton.__version__))
    if minor != here:
        print(
            f"column steps not compared: {committed.name} was written with triton "
            f"{known['triton']}, this is {triton.__version__}"
        )
        return []
    before = {key(cost): cost["step"] for cost in known["costs"]}
    wrong = []
    for cost in steps:
        allowed = before.get(key(asdict(cost)))
        if allowed is None:
            wrong.append(f"no committed column step, write them with --json: {row(cost)}")
        elif cost.step > GROWTH * allowed:
            wrong.append(f"column step longer than the committed {allowed:.1f}: {row(cost)}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.static", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=DEVICES, help="all, or those of --short")
    parser.add_argument("--kernels", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--skip", nargs="+", default=[], help="variants to leave out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--short", action="store_true", help="the check of every change")
    options = parser.parse_args(arguments)
    targets = options.targets or (SHORT if options.short else tuple(DEVICES))

    print(f"triton {triton.__version__}")
    unknown = set(launch.table()) - {launch.DEFAULT, *DEVICES}
    if unknown:
        print(f"not compiled, no such target here: {', '.join(sorted(unknown))}")
    heads = "registers", "spills", "shared", "programs", "instr.", "step"
    print(f"{'kernel':40}{'target':8}{'launch':8}" + "".join(f"{head:>10}" for head in heads))
    costs = []
    for cost in measurements(options.kernels, targets, options.skip, options.short):
        costs.append(cost)
        print(row(cost), flush=True)
    estimated = [cost for cost in costs if cost.estimate]
    if estimated:
        print("\nESTIMATED, not measured, per column; see the docstring of benchmarks/static.py")
        print(" " * 56 + "".join(f"{head:>10}" for head in estimated[0].estimate))
        print(*(line(cost, *cost.estimate.values()) for cost in estimated), sep="\n")
    wrong = [f"spills registers to memory: {row(cost)}" for cost in costs if cost.spills]
    if options.short:
        wrong += longer(costs, RESULTS)
    if options.json:
        options.json.write_text(text(costs))
    for message in wrong:
        print(message, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
