"""EfficientNet-Lite0 on ImageNet images: top-1 of RTN, GPTQ order, activation order and SAPQ.

    python -m benchmarks.accuracy.lite0 --images IMAGES.zip --bits 4 --json lite0.json

IMAGES.zip holds `CCC_*.jpg`, CCC the class index, at least 256 pixels square. For each seed the
images are shuffled; `--calibration` of them calibrate and all others evaluate. The standard error
of a difference to fp32 is that of the paired difference (images where only one of both is right).
With --json, cells that the file holds are not run again.
"""

import argparse
import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.methods import METHODS
from sapq_triton import QuantSpec, quantize
from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

BATCH = 32


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Centre crops uint8 [N, 3, 224, 224] and class indices int64 [N]."""
    from PIL import Image  # all else works without

    pixels, labels = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            pixels.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
            labels.append(int(Path(name).name[:3]))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


@torch.inference_mode()
def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    """Predicted classes int64 [N], on the CPU whatever the device of the model"""
    device = next(model.parameters()).device
    batches = (preprocess(part).to(device) for part in pixels.split(BATCH))
    return torch.cat([model(batch).argmax(1).cpu() for batch in batches])


def evaluate(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    reference: Tensor,
    calibration: Tensor,
    order: str,
    spec: QuantSpec,
    batchnorm: str,
) -> dict[str, Any]:
    """Quantize a copy on `calibration`, evaluate on all other images."""
    held_out = torch.ones(len(labels), dtype=torch.bool)
    held_out[calibration] = False
    quantized = copy.deepcopy(model)
    batches = [preprocess(part) for part in pixels[calibration].split(BATCH)]
    report = quantize(quantized, batches, spec, order=order, batchnorm=batchnorm, progress=False)
    right = predict(quantized, pixels[held_out])
    truth, before = labels[held_out], reference[held_out]
    change = (right == truth).double() - (before == truth).double()
    return {
        "top1": 100 * (right == truth).double().mean().item(),
        "fp32": 100 * (before == truth).double().mean().item(),
        "change": 100 * change.mean().item(),
        "standard_error": 100 * (change.std() / len(change) ** 0.5).item(),
        "agreement": 100 * (right == before).double().mean().item(),
        "layer_error": report.relative_error,
        "seconds": report.seconds,
        "images": int(held_out.sum()),
    }


def table(cells: dict[str, dict[str, Any]], bits: int, calibration: int, seeds: list[int]) -> str:
    lines = [
        f"EfficientNet-Lite0, W{bits} per channel (MSE grid), {calibration} calibration images, "
        f"all others evaluated, seeds {seeds}; change against fp32 in points, ± standard error of "
        "the paired difference (mean over seeds)",
        "",
        "| grid | BatchNorm | method | top-1 | change | agreement | layer error | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        settings, _, seed = key.rpartition(" | seed ")
        if settings.startswith(f"W{bits} ") and int(seed) in seeds:
            groups.setdefault(settings, []).append(cell)
    for settings, runs in groups.items():
        mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        _, grid, batchnorm, method = settings.split(" | ")
        lines.append(
            f"| {grid} | {batchnorm} | {method} | {mean['top1']:.1f} (fp32 {mean['fp32']:.1f}) "
            f"| {mean['change']:+.1f} ± {mean['standard_error']:.1f} | {mean['agreement']:.1f} "
            f"| {mean['layer_error']:.5f} | {mean['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--grids", nargs="+", default=["asymmetric", "symmetric"])
    parser.add_argument("--batchnorm", nargs="+", default=["paired"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    model = load_efficientnet_lite0()
    pixels, labels = read_images(options.images)
    reference = predict(model, pixels)
    print(f"fp32 on all {len(labels)} images: {100 * (reference == labels).double().mean():.1f}")
    for seed in options.seeds:
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        for grid in options.grids:
            for batchnorm in options.batchnorm:
                for method, order in METHODS.items():
                    key = (
                        f"W{options.bits} n{options.calibration} | {grid} | {batchnorm} | {method} "
                        f"| seed {seed}"
                    )
                    if key in cells:
                        continue
                    spec = QuantSpec(options.bits, symmetric=grid == "symmetric")
                    calibration = shuffled[: options.calibration]
                    cells[key] = evaluate(
                        model, pixels, labels, reference, calibration, order, spec, batchnorm
                    )
                    print(key, {k: round(v, 4) for k, v in cells[key].items()}, flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(cells, indent=1))
    print("\n" + table(cells, options.bits, options.calibration, options.seeds))


if __name__ == "__main__":
    main()
