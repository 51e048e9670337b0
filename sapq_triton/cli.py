"""The command line: sapq-triton quantize MODEL, inspect MODEL, report RUN."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from .compare import compare
from .formats import FORMATS, Stored
from .formats.folder import CONFIG, read_json
from .language import DTYPES, check_device, quantize_folder
from .preset import PresetName
from .report import Report
from .report_files import read_report
from .report_html import report_page
from .spec import Order, QuantSpec

MEGABYTE = 10**6
# options of `quantize` that one kind of model alone has
FOLDER_OPTIONS = (
    "format", "samples", "sequence_length", "seed", "output_layer", "device", "dtype", "spill",
    "restart", "deterministic", "timeout",
)  # fmt: skip
ONNX_OPTIONS = ("activations", "mean", "std", "size")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 after one line that says what is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"sapq-triton: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sapq-triton", description="Post-training quantization.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("quantize", help="quantize a model and save it")
    command.add_argument(
        "model", type=Path, help="folder of a transformers language model, or an ONNX file"
    )
    command.add_argument("--out", type=Path, required=True, metavar="PATH")
    command.add_argument(
        "--calibration", type=Path, required=True, metavar="PATH",
        help="UTF-8 text; for an ONNX file .npz, .npy, or a folder of images",
    )  # fmt: skip
    command.add_argument("--bits", type=int, default=4, help="2 to 8 (default 4)")
    command.add_argument(
        "--group-size", type=int, help="columns of one scale, -1: all (default 128, ONNX -1)"
    )
    grid = command.add_mutually_exclusive_group()
    grid.add_argument("--symmetric", action="store_true", default=True, help="(default)")
    grid.add_argument(
        "--asymmetric", action="store_false", dest="symmetric", help="a zero point for each scale"
    )
    command.add_argument("--format", choices=FORMATS, default="gptq", help="(default gptq)")
    command.add_argument(
        "--preset", choices=get_args(PresetName), default="best",
        help="best: the least loss, a copy of the model beside it (default); fast: GPTQ's time",
    )  # fmt: skip
    command.add_argument("--order", choices=get_args(Order), help="(default that of the preset)")
    command.add_argument(
        "--samples", type=int, default=128, help="calibration sequences (default 128)"
    )
    command.add_argument("--sequence-length", type=int, default=512, help="tokens (default 512)")
    command.add_argument("--seed", type=int, default=0, help="of the choice of sequences")
    command.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="layers to leave, repeatable"
    )
    command.add_argument("--output-layer", action="store_true", help="quantize lm_head as well")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: as stored)")

    command.add_argument(
        "--spill", action="store_true",
        help="keep activations on the disk, and those of one batch in memory: slower",
    )  # fmt: skip
    command.add_argument(
        "--restart", action="store_true", help="begin anew where an earlier run was interrupted"
    )
    command.add_argument(
        "--deterministic", action="store_true",
        help="the same bits by any number of processes; memory for a Hessian per batch",
    )  # fmt: skip
    command.add_argument(
        "--timeout", type=float, default=30.0, metavar="MINUTES",
        help="that processes started by torchrun wait for each other (default 30)",
    )  # fmt: skip

    onnx = command.add_argument_group("ONNX files")
    onnx.add_argument(
        "--activations", choices=("uint8", "int8"), help="quantize them too (default: floats)"
    )
    onnx.add_argument("--mean", type=float, nargs="+", default=[0.0], help="of pixels, 0 to 255")
    onnx.add_argument("--std", type=float, nargs="+", default=[255.0], help="of pixels")
    onnx.add_argument("--size", type=int, help="side of the images (default: what the model takes)")
    # None until the kind of the model is known, so that an option in vain is seen
    defaults = {name: command.get_default(name) for name in (*FOLDER_OPTIONS, *ONNX_OPTIONS)}
    command.set_defaults(run=partial(_quantize, defaults), **dict.fromkeys(defaults))

    command = commands.add_parser("inspect", help="show what a quantized folder or ONNX file holds")
    command.set_defaults(run=_inspect)
    command.add_argument("folder", type=Path, metavar="MODEL")

    command = commands.add_parser("report", help="show what a run did, or compare two runs")
    command.set_defaults(run=_report)
    command.add_argument(
        "run_of", type=Path, metavar="RUN", help="folder that quantize wrote, or its report.json"
    )
    command.add_argument("--compare", type=Path, metavar="RUN", help="another one, beside it")
    command.add_argument("--out", type=Path, metavar="HTML", help="also write a page")
    return parser


def _quantize(defaults: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """ValueError for options of the other kind of model."""
    onnx = arguments.model.suffix == ".onnx"
    given = {name for name in defaults if getattr(arguments, name) is not None}
    vain = [name for name in (FOLDER_OPTIONS if onnx else ONNX_OPTIONS) if name in given]
    if vain:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in vain)
        kind = "folders of language models" if onnx else "ONNX files, *.onnx"
        raise ValueError(f"{options}: only for {kind}; the model is {arguments.model}")
    for name in defaults.keys() - given:
        setattr(arguments, name, defaults[name])
    if onnx:
        _quantize_onnx(arguments)
    else:
        _quantize_folder(arguments)


def _quantize_onnx(arguments: argparse.Namespace) -> None:
    from .formats.onnx import quantize_onnx

    group_size = -1 if arguments.group_size is None else arguments.group_size
    report = quantize_onnx(
        arguments.model,
        arguments.calibration,
        QuantSpec(arguments.bits, group_size, arguments.symmetric),
        arguments.out,
        activations=arguments.activations,
        mean=arguments.mean,
        std=arguments.std,
        size=arguments.size,
        preset=arguments.preset,
        order=arguments.order,
        skip=arguments.skip,
    )
    print(report)
    sizes = [path.stat().st_size / MEGABYTE for path in (arguments.model, arguments.out)]
    print(f"{arguments.out}: ONNX, {sizes[1]:.1f} MB of {sizes[0]:.1f} MB")


@contextmanager
def _processes(device: str, minutes: float) -> Iterator[tuple[bool, str]]:
    """Whether torchrun started this process among others, and the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield False, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        check_device(device)
        torch.cuda.set_device(device)
    # what is no tensor of a device goes by gloo, which knows at once when a process is gone
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield True, device
    finally:
        torch.distributed.destroy_process_group()


def _quantize_folder(arguments: argparse.Namespace) -> None:
    with _processes(arguments.device, arguments.timeout) as (distributed, device):
        report = _quantized_folder(arguments, distributed, device)
        if distributed and torch.distributed.get_rank() > 0:
            return
    print(report)
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) / MEGABYTE
        for folder in (arguments.model, arguments.out)
    ]
    print(f"{arguments.out}: {arguments.format}, {sizes[1]:.1f} MB of {sizes[0]:.1f} MB")
    dtype = read_json(arguments.out / CONFIG)["dtype"]
    if arguments.format in ("gptq", "gptq_v2") and dtype == "bfloat16":
        print(
            "Scales are float16, and the model bfloat16: programs that compute in bfloat16 round "
            "them. Run it in float16, or use --dtype float16 or --format compressed-tensors."
        )


def _quantized_folder(arguments: argparse.Namespace, distributed: bool, device: str) -> Report:
    return quantize_folder(
        arguments.model,
        arguments.out,
        arguments.calibration,
        bits=arguments.bits,
        group_size=128 if arguments.group_size is None else arguments.group_size,
        symmetric=arguments.symmetric,
        format=arguments.format,
        preset=arguments.preset,
        order=arguments.order,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        skip=arguments.skip,
        output_layer=arguments.output_layer,
        device=device,
        dtype=arguments.dtype,
        spill=arguments.spill,
        restart=arguments.restart,
        distributed=distributed,
        deterministic=arguments.deterministic,
    )


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.folder.suffix == ".onnx":
        from .formats.onnx import inspect_onnx

        print(*inspect_onnx(arguments.folder), sep="\n")
        return
    stored = Stored.of(arguments.folder)
    width = max(map(len, stored.layers))
    print(f"{'layer':{width}} {'kind':16} {'weight':>18} bits  group  zero point        MB  error")
    total = 0
    for name, layer in stored.layers.items():
        spec, shape = layer.spec, "x".join(map(str, layer.shape))
        size = stored.tensors.bytes_of(stored.format.owned(layer))
        total += size
        error = stored.manifest.get("layers", {}).get(name, {}).get("relative_error")
        print(
            f"{name:{width}} {layer.kind:16} {shape:>18} {spec.bits:4} {spec.group_size:6}  "
            f"{'symmetric' if spec.symmetric else 'asymmetric':10} {size / MEGABYTE:9.3f}  "
            f"{'-' if error is None else f'{error:.3e}'}"
        )
    print(
        f"{arguments.folder}: {stored.format.name}, {len(stored.layers)} layers, "
        f"{total / MEGABYTE:.1f} MB of {stored.tensors.bytes / MEGABYTE:.1f} MB"
    )


def _report(arguments: argparse.Namespace) -> None:
    report = read_report(arguments.run_of)
    if arguments.compare is None:
        print(report)
        html = report_page(report)
    else:
        names = str(arguments.run_of), str(arguments.compare)
        both = compare(report, read_report(arguments.compare), names)
        print(both)
        html = both.page()
    if arguments.out is not None:
        arguments.out.write_text(html, encoding="utf-8")
        print(f"{arguments.out} is the page")
