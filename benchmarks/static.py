"""What each kernel costs, from its machine code: compiled ahead of time, no GPU needed.

    python -m benchmarks.static --targets sm_90 gfx942 --json static.json

A launcher is called on meta tensors while a recorder stands in for its kernel. So what is compiled
is what would be launched, block sizes and warps included, and specialized as Triton does it: sizes
and strides of 1 are constants, multiples of 16 and pointers are marked as such. CASES names the
calls; a kernel in kernels/ that no case launches is an error.

registers     per thread (AMD: vector registers)
spills        bytes per thread in local memory (NVIDIA: stack and local, AMD: scratch). Where any
              is not zero, the exit status is 1
shared        bytes per program
instructions  of the whole kernel in machine code (SASS, AMD GCN), the padding at its end left out
step          of solve_columns on NVIDIA, whose SUB column steps are unrolled: SASS
              instructions per column, those of the loop over sub-tiles (addresses and loads
              included) less those of the loops over other columns within it, divided by SUB
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from sapq_triton.kernels import launch
from sapq_triton.spec import MSE_SHRINK
from sapq_triton.window import Window

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def grid_of(rows: int, groups: int, *group_shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale, zero_point [1, rows, groups], group int64"""
    scale, zero_point = meta(1, rows, groups), meta(1, rows, groups)
    return scale, zero_point, meta(*group_shape, dtype=torch.int64)


# In the solver's layouts: weights [B, C, R] seen as [B, R, C], tiles cut out of larger matrices.
# C = 4096 columns, R = 4096 rows, tiles of 128.


def quantize_groups(module: ModuleType, symmetric: bool, shrink: tuple[float, ...]) -> None:
    module.quantize_groups(meta(1, 4096, 4096), 128, 15, symmetric, shrink)


def column_sensitivity(module: ModuleType) -> None:
    diagonal = meta(1, 4096, 4096).diagonal(dim1=1, dim2=2)
    module.column_sensitivity(
        meta(1, 4096, 4096).mT, *grid_of(4096, 32, 1, 4096), diagonal, qmax=15
    )


def solve_columns(module: ModuleType, columns: int, groups: int, precision: str) -> None:
    weight = meta(1, columns, 4096).mT
    module.solve_columns(
        weight, weight, meta(1, columns, columns), *grid_of(4096, groups, 1, columns), 15, precision
    )


def compensate(module: ModuleType, precision: str) -> None:
    weight, error, rows = meta(1, 4096, 4096)[:, 128:].mT, meta(1, 4096, 128), meta(1, 128, 3968)
    module.compensate(weight, error, rows, *grid_of(4096, 32, 1, 3968), 15, precision)


def downdate(module: ModuleType, precision: str) -> None:
    module.downdate(meta(1, 4096, 4096)[:, 128:, 128:], meta(1, 128, 3968), precision)


def accumulate_rows(module: ModuleType, dtype: torch.dtype, precision: str = "ieee") -> None:
    inputs = meta(65536, 4096, 1, 1, 1, dtype=dtype)
    module.accumulate_hessian(meta(1, 4096, 4096), inputs, Window(), precision)


def accumulate_patches(module: ModuleType, dtype: torch.dtype, precision: str = "ieee") -> None:
    inputs = meta(32, 64, 1, 58, 58, dtype=dtype)
    module.accumulate_hessian(meta(1, 576, 576), inputs, Window(size=(1, 3, 3)), precision)


def accumulate_depthwise(module: ModuleType, dtype: torch.dtype, precision: str = "ieee") -> None:
    window = Window(size=(1, 3, 3), groups=64)
    inputs = meta(32, 64, 1, 58, 58, dtype=dtype)
    module.accumulate_hessian(meta(64, 9, 9), inputs, window, precision)


def solve_rows(module: ModuleType, columns: int) -> None:
    scale, zero_point, group = grid_of(256, 4, 256, columns)
    inverse = meta(256, columns, columns)
    module.solve_rows(meta(256, columns), inverse, scale[0], zero_point[0], group, 15, steps=32)


CASES: dict[str, dict[str, Callable[[ModuleType], None]]] = {
    "quantize_groups": {
        "absmax": lambda module: quantize_groups(module, False, (1.0,)),
        "absmax symmetric": lambda module: quantize_groups(module, True, (1.0,)),
        "mse": lambda module: quantize_groups(module, False, MSE_SHRINK),
        "mse symmetric": lambda module: quantize_groups(module, True, MSE_SHRINK),
    },
    "column_sensitivity": {"": column_sensitivity},
    "solve_columns": {
        "groups": lambda module: solve_columns(module, 4096, 32, "tf32x3"),
        "one group": lambda module: solve_columns(module, 4096, 1, "tf32x3"),
        "groups ieee": lambda module: solve_columns(module, 4096, 32, "ieee"),
        "ragged": lambda module: solve_columns(module, 4100, 1, "tf32x3"),
    },
    "compensate": {
        "": lambda module: compensate(module, "tf32x3"),
        "ieee": lambda module: compensate(module, "ieee"),
    },
    "downdate": {
        "": lambda module: downdate(module, "tf32x3"),
        "ieee": lambda module: downdate(module, "ieee"),
    },
    "accumulate_hessian": {
        "rows float32": lambda module: accumulate_rows(module, torch.float32, "tf32x3"),
        "rows float32 ieee": lambda module: accumulate_rows(module, torch.float32, "ieee"),
        "rows bfloat16": lambda module: accumulate_rows(module, torch.bfloat16),
        "patches float32": lambda module: accumulate_patches(module, torch.float32, "tf32x3"),
        "patches float32 ieee": lambda module: accumulate_patches(module, torch.float32, "ieee"),
        "patches bfloat16": lambda module: accumulate_patches(module, torch.bfloat16),
        "depthwise float32": lambda module: accumulate_depthwise(module, torch.float32, "tf32x3"),
        "depthwise bfloat16": lambda module: accumulate_depthwise(module, torch.bfloat16),
    },
    "solve_rows": {
        "128 columns": lambda module: solve_rows(module, 128),
        "2048 columns": lambda module: solve_rows(module, 2048),
    },
}


@dataclass(frozen=True)
class Cost:
    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    instructions: int
    step: float | None = None


class Recorder:
    """Stands in for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] | None = None
        self.options: dict[str, Any] = {}

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
def recorded(module: ModuleType, target: str) -> Iterator[list[Recorder]]:
    """Replace the kernels of a module, and the device family whose launch parameters it takes."""
    before, family = dict(vars(module)), launch.family
    recorders = {name: Recorder(kernel) for name, kernel in kernels_of(module).items()}
    vars(module).update(recorders)
    launch.family = lambda _: target
    try:
        yield list(recorders.values())
    finally:
        vars(module).update(before)
        launch.family = family


def compiled(launch: Recorder, target: GPUTarget) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if name == "PRECISION" and target.backend == "hip":
            value = "ieee"  # as ops.dot_precision has it
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


def measure(kernel: str, variant: str, target: str, launch: Recorder) -> Cost:
    binary = compiled(launch, TARGETS[target])
    shared = binary.metadata.shared
    if "cubin" not in binary.asm:
        listing = binary.asm["amdgcn"]
        return Cost(
            kernel, variant, target,
            registers=amd_metadata(listing, "vgpr_count"),
            spills=amd_metadata(listing, "private_segment_fixed_size"),
            shared=shared,
            instructions=len(amd_instructions(listing)),
        )  # fmt: skip
    usage = nvidia_tool("cuobjdump", "-res-usage", binary.asm["cubin"])
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    code = nvidia_instructions(nvidia_tool("nvdisasm", "-c", binary.asm["cubin"]))
    sub = launch.arguments.get("SUB")
    return Cost(
        kernel, variant, target,
        registers=registers,
        spills=stack + local,
        shared=shared,
        instructions=sum(not line.endswith(":") for line in code),
        step=None if sub is None else column_step(code, sub),
    )  # fmt: skip


def nvidia_tool(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvidia_instructions(listing: str) -> list[str]:
    """Labels (ending in a colon) and instructions, in order, without the padding NOPs."""
    pattern = r"^(?:(\.L\w+:)|\s+/\*[0-9a-f]+\*/\s+([^;\n]+?)\s*;.*)$"
    found = re.findall(pattern, listing, re.MULTILINE)
    return [label or code for label, code in found if label or not code.startswith("NOP")]


def column_step(code: Sequence[str], sub: int) -> float:
    """`step` of the module docstring"""
    ends = [index for index, line in enumerate(code) if re.match(r"(@!?U?P\d )?EXIT", line)]
    divisions = [index for index, line in enumerate(code[: ends[-1]]) if "MUFU.RCP" in line]
    if len(divisions) != sub:
        raise RuntimeError(f"expected {sub} divisions, one per column step, found {len(divisions)}")
    labels = {line[:-1]: index for index, line in enumerate(code) if line.endswith(":")}
    loops = []
    for index, line in enumerate(code):
        jump = re.search(r"\bBRA\b.*?`\((\.L\w+)\)", line)
        if jump and labels[jump[1]] < index:
            loops.append(range(labels[jump[1]], index + 1))
    around = [loop for loop in loops if loop[0] < divisions[0] and divisions[-1] < loop[-1]]
    body = set(min(around, key=len))
    for loop in loops:
        if loop not in around:
            body -= set(loop)
    return sum(not code[index].endswith(":") for index in body) / sub


def amd_metadata(listing: str, name: str) -> int:
    return int(re.search(rf"^\s+\.{name}:\s+(\d+)$", listing, re.MULTILINE)[1])


def amd_instructions(listing: str) -> list[str]:
    body = listing[: listing.index(".Lfunc_end0:")]
    return re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)


def measurements(
    names: Sequence[str], targets: Sequence[str], skip: Sequence[str]
) -> Iterator[Cost]:
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
            launched = set()
            for variant, call in CASES[name].items():
                if variant in skip:
                    continue
                with recorded(modules[name], target) as recorders:
                    call(modules[name])
                for recorder in recorders:
                    if recorder.arguments is not None:
                        launched.add(recorder.kernel.__name__)
                        yield measure(name, variant, target, recorder)
            idle = set(kernels_of(modules[name])) - launched
            if idle:
                raise SystemExit(f"no case of {name} launches {', '.join(sorted(idle))}")


def row(cost: Cost) -> str:
    name = f"{cost.kernel} {cost.variant}".strip()
    steps = "" if cost.step is None else f"{cost.step:6.0f}"
    return (
        f"{name:36}{cost.target:8}{cost.registers:9}{cost.spills:8}{cost.shared:8}"
        f"{cost.instructions:14}{steps}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.static", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--skip", nargs="+", default=[], help="variants to leave out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)

    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':36}{'target':8}{'registers':>9}{'spills':>8}{'shared':>8}{'instructions':>14}"
        f"{'step':>6}"
    )
    costs = []
    for cost in measurements(options.kernels, options.targets, options.skip):
        costs.append(cost)
        print(row(cost), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    spilled = [row(cost) for cost in costs if cost.spills]
    if spilled:
        print("spills registers to memory:", *spilled, sep="\n", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
