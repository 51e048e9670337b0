"""Reports for the tests of files and pages: of a real run, and of as many layers as one likes."""

from dataclasses import replace
from functools import cache

import torch
from torch import nn

from sapq_triton import LayerReport, QuantSpec, Report, quantize


@cache
def real_report() -> Report:
    """Of a small model with BatchNorm, a depthwise convolution, dead columns, a skipped layer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 4),
        )  # fmt: skip
        images = torch.randn(24, 3, 5, 5)
        images[:, 1] = 0
        batches = list(images.split(6))
        return quantize(
            model, batches, QuantSpec(4), skip=["8"], progress=False, bias_correction=True,
            overrides={"6": QuantSpec(3, 27, symmetric=True)},
        )  # fmt: skip


def of_layers(count: int, names: list[str] | None = None) -> Report:
    """The real layers over and over, with other names and errors."""
    report = real_report()
    layers: list[LayerReport] = []
    for number in range(count):
        layer = report.layers[number % len(report.layers)]
        factor = 1.5 ** (number % 7) / 4
        name = names[number] if names else f"model.layers.{number}.mlp.down_proj"
        layers.append(replace(layer, name=name, error=layer.error * factor, quantized=None))
    return replace(report, layers=tuple(layers))


EMPTY = Report((), {}, {}, 0.0)
