"""Networks as they were taught, quantized on a device and on the CPU: do both come out alike?

Weights and images are those of `benchmarks.carry`, metrics those of `benchmarks.accuracy`.

A close call in one layer changes the inputs of all that follow, so two right quantizations have
different codes, and find different things in some images: here and on the CPU they need not agree
with each other. What they must share is how good they are. Two figures judge that:

- the mean layer error, which hardly depends on close calls;
- how much of what the original network finds is found again, image by image. Labels would say the
  same with more noise: top-1 and mAP are reported, and decide nothing.

And the original must find the same on both, or nothing of this has a meaning.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.accuracy import lite0
from benchmarks.accuracy.coco import Detections, Objects, evaluate
from benchmarks.accuracy.yolov5n import batches, detect
from benchmarks.carry import Carried, to_examples
from sapq_triton import QuantSpec, quantize
from sapq_triton.models.efficientnet_lite import EfficientNetLite0, preprocess
from sapq_triton.models.yolov5 import fuse_batchnorm, yolov5n
from sapq_triton.ops import Backend

CONFIDENT = 0.25  # score of a detection that a user gets to see
# Ten quantizations of YOLOv5n whose inputs differed by 1e-6, two of them with convolutions in TF32,
# had layer errors within 0.7 % (standard deviation 0.3 %). The order "activation" adds 5 %, weights
# stored 1 % too large 6 %, rounding to nearest 600 %.
SAME_ERROR = 0.015
SAME_FP32 = 0.98  # TF32 changed nothing
SIGMAS = 3


class Network(Protocol):
    """How to build a network, calibrate it, and judge what it finds in the evaluation images."""

    noise: float  # of `kept` of one image: rms change from one right quantization to another
    calibration: list[Tensor]
    truth: Any  # what the evaluation images show

    def __init__(self, carried: Carried) -> None: ...

    def build(self) -> nn.Module: ...

    def find(self, model: nn.Module) -> Any:
        """What the model says about each image."""

    def scores(self, found: Any) -> dict[str, float]:
        """Of all images together, by name."""

    def kept(self, found: Any, original: Any) -> Tensor:
        """How much of what the original found in an image: 0 to 1, float64 [images]"""


class Lite0:
    """EfficientNet-Lite0: classes int64 [images], top-1 in percent."""

    noise = 0.25  # 6 % of the predictions change

    def __init__(self, carried: Carried) -> None:
        self.pixels, self.truth = (
            torch.from_numpy(carried.evaluation[key]) for key in ("pixels", "labels")
        )
        calibration = torch.from_numpy(carried.calibration["pixels"])
        self.calibration = [preprocess(part) for part in calibration.split(lite0.BATCH)]

    def build(self) -> nn.Module:
        return EfficientNetLite0(image_size=self.pixels.shape[-1])

    def find(self, model: nn.Module) -> Tensor:
        return lite0.predict(model, self.pixels)

    def scores(self, found: Tensor) -> dict[str, float]:
        return {"top-1": 100 * self.kept(found, self.truth).mean().item()}

    def kept(self, found: Tensor, original: Tensor) -> Tensor:
        return (found == original).double()


class YOLOv5n:
    """YOLOv5n with folded BatchNorm: boxes with classes, mAP."""

    noise = 0.085  # 0.0174 in the mean of 24 images

    def __init__(self, carried: Carried) -> None:
        self.calibration = batches(to_examples(carried.calibration))
        self.examples = to_examples(carried.evaluation)
        self.truth = [example.objects for example in self.examples]

    def build(self) -> nn.Module:
        return fuse_batchnorm(yolov5n())

    def find(self, model: nn.Module) -> list[Detections]:
        return detect(model, self.examples)

    def scores(self, found: Sequence[Detections]) -> dict[str, float]:
        score = evaluate(found, self.truth)
        return {"mAP50": score.map50, "mAP50-95": score.map50_95}

    def kept(self, found: Sequence[Detections], original: Sequence[Detections]) -> Tensor:
        """mAP50-95 of each image alone, where the original saw something with confidence."""
        seen = [confident(one) for one in original]
        pairs = [(one, shown) for one, shown in zip(found, seen, strict=True) if len(shown.classes)]
        alone = [evaluate([one], [shown]).map50_95 for one, shown in pairs]
        return torch.tensor(alone, dtype=torch.float64)


def confident(found: Detections) -> Objects:
    seen = found.scores >= CONFIDENT
    return Objects(found.boxes[seen], found.classes[seen])


NETWORKS: dict[str, type[Network]] = {"lite0": Lite0, "yolov5n": YOLOv5n}


def end_to_end(
    network: Network, state: Mapping[str, Tensor], device: torch.device, backend: Backend
) -> dict[str, Any]:
    """The same network quantized on this device and on the CPU, side by side."""

    def run(device: torch.device | str, backend: Backend | None) -> tuple[Any, float, float]:
        model = network.build()
        model.load_state_dict(state)
        model.eval().to(device)
        error = taken = 0.0
        if backend is not None:
            inputs = [batch.to(device) for batch in network.calibration]
            report = quantize(model, inputs, QuantSpec(4), backend=backend, progress=False)
            error, taken = report.relative_error, report.seconds
        return network.find(model), error, taken

    original, _, _ = run("cpu", None)
    fp32, _, _ = run(device, None)
    here, error, taken = run(device, backend)
    cpu, cpu_error, cpu_taken = run("cpu", "reference")

    scores = {"fp32": original, "here": here, "on the CPU": cpu}
    fp32_kept, here_kept, cpu_kept = (network.kept(x, original) for x in (fp32, here, cpu))
    change = (here_kept - cpu_kept).mean().item()
    allowed = SIGMAS * network.noise / max(len(here_kept), 1) ** 0.5
    return {
        "images": [sum(map(len, network.calibration)), len(network.truth)],
        **{
            f"{name} {where}": score
            for where, found in scores.items()
            for name, score in network.scores(found).items()
        },
        "layer error": error,
        "layer error / CPU": error / cpu_error,
        "kept fp32": fp32_kept.mean().item(),
        "kept here": here_kept.mean().item(),
        "kept on the CPU": cpu_kept.mean().item(),
        "change": change,
        "allowed": allowed,
        backend: taken,
        "CPU": cpu_taken,
        "ok": abs(error / cpu_error - 1) <= SAME_ERROR
        and fp32_kept.mean().item() >= SAME_FP32
        and abs(change) <= allowed,
    }
