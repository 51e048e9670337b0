"""EfficientNet-Lite0 as ONNX files: size, latency in onnxruntime, agreement with fp32.

    python -m benchmarks.accuracy.onnx_lite0 --images IMAGES.zip --json onnx-lite0.json

The model is quantized once per number of bits (per output channel, MSE grid, paired BatchNorm) and
exported with floating-point activations (weight-only) and with 8-bit ones. IMAGES.zip is as in
`lite0`; a seed shuffles it, `--calibration` images calibrate, `--evaluation` others evaluate.

Latency: one image, sessions of all files take turns, medians; the ratio is fp32's over the file's,
so above 1 is faster. Difference: largest of any logit to PyTorch with the same weights, on the
evaluation images. BatchNorm left: not folded, as a channel of negative gamma has a weight of -128,
which has no negative in int8. Agreement: images on which top-1 is that of fp32.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from benchmarks.accuracy.lite0 import BATCH, read_images
from benchmarks.measure import environment, interleaved, markdown
from sapq_triton import QuantSpec, quantize
from sapq_triton.formats.onnx import export_onnx, exported_graph
from sapq_triton.formats.onnx_activations import ActivationDtype
from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

CPU = torch.device("cpu")
ACTIVATIONS: dict[str, ActivationDtype | None] = {"weight-only": None, "uint8 activations": "uint8"}
HEADER = (
    "file", "size, of fp32", "latency, ms", "speed, of fp32", "integer operators", "BatchNorm left",
    "difference to PyTorch", "top-1 agreement, %", "top-1, %",
)  # fmt: skip


def start(path: Path, optimized: Path | None = None) -> Any:
    """A session with as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, images: Tensor) -> np.ndarray:
    """float32 [N, classes]"""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: x.numpy()})[0] for x in images.split(BATCH)]
    return np.concatenate(parts)


def integer_operators(path: Path, folder: Path) -> int:
    """Operators that onnxruntime merged into integer ones."""
    start(path, folder / "optimized.onnx")
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return sum(node.op_type.startswith(("QLinear", "QGemm")) for node in nodes)


@torch.inference_mode()
def logits(model: torch.nn.Module, images: Tensor) -> np.ndarray:
    return torch.cat([model(part) for part in images.split(BATCH)]).numpy()


def write_files(
    bits: list[int], batches: list[Tensor], images: Tensor, folder: Path
) -> dict[str, tuple[Path, np.ndarray, int]]:
    """File, PyTorch's output with the same weights, BatchNorms not folded, by name; fp32 first."""
    model = load_efficientnet_lite0()
    onnx.save(exported_graph(model, batches[0][:2]), folder / "fp32.onnx")
    files = {"fp32": (folder / "fp32.onnx", logits(model, images), 0)}
    for each in bits:
        spec = QuantSpec(each, symmetric=each == 8)
        model = load_efficientnet_lite0()
        quantize(model, batches, spec, pack=True, progress=False)
        expected = logits(model, images)
        for name, activations in ACTIVATIONS.items():
            path = folder / f"w{each}-{name}.onnx"
            notes = export_onnx(
                model, batches[0][:2], path, batches=batches, activations=activations
            )
            kept = sum(note.startswith("not folded") for note in notes.values())
            files[f"W{each} {name}"] = path, expected, kept
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--evaluation", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0, help="of latency measurements")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pixels, labels = read_images(options.images)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed))
    first, last = options.calibration, options.calibration + options.evaluation
    batches = [preprocess(part) for part in pixels[order[:first]].split(BATCH)]
    images, truth = preprocess(pixels[order[first:last]]), labels[order[first:last]].numpy()

    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(options.bits, batches, images, folder)
        sessions = {name: start(path) for name, (path, *_) in files.items()}
        taken = interleaved(
            {name: partial(run, each, images[:1]) for name, each in sessions.items()},
            CPU,
            budget=options.seconds,
        )
        reference = files["fp32"][1].argmax(1)
        for name, (path, expected, kept) in files.items():
            found = run(sessions[name], images)
            rows[name] = {
                "bytes": path.stat().st_size,
                "size": path.stat().st_size / files["fp32"][0].stat().st_size,
                "latency": 1000 * taken[name],
                "speed": taken["fp32"] / taken[name],
                "integer_operators": integer_operators(path, folder),
                "batchnorms": kept,
                "difference": float(np.abs(found - expected).max()),
                "agreement": 100 * float((found.argmax(1) == reference).mean()),
                "top1": 100 * float((found.argmax(1) == truth).mean()),
            }
    result = {
        "environment": environment(CPU) | {"onnxruntime": onnxruntime.__version__},
        "calibration": options.calibration,
        "evaluation": options.evaluation,
        "seed": options.seed,
        "files": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    shown = list(HEADER)
    cells = [[name, *[v for k, v in row.items() if k != "bytes"]] for name, row in rows.items()]
    print(
        f"EfficientNet-Lite0, {options.calibration} calibration and {options.evaluation} "
        f"evaluation images, onnxruntime {onnxruntime.__version__}, "
        f"threads: {torch.get_num_threads()}\n\n{markdown(shown, cells)}"
    )


if __name__ == "__main__":
    main()
