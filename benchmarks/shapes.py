"""What is benchmarked: layers of real networks by shape, and problems like theirs.

The shapes of ResNet-50, YOLOv5s and EfficientNet-Lite0 are read off a forward pass of
`sapq_triton.models` on the meta device, which computes nothing.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from sapq_triton import layers, models
from sapq_triton.window import Window

LLAMA_3_8B = {"hidden": 4096, "key_value": 1024, "intermediate": 14336, "blocks": 32}


@dataclass(frozen=True)
class Layer:
    """`groups` problems of [rows, columns]; what one image, or token, brings to the layer.

    inputs: [channels, D, H, W] with the padding, or [columns] where there is no window.
    """

    name: str
    groups: int
    rows: int
    columns: int
    inputs: tuple[int, ...]
    window: Window | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.groups, self.rows, self.columns


def walk(model: nn.Module, images: Tensor) -> tuple[Layer, ...]:
    """Every convolution and linear layer of `model`, in the order in which they run."""
    found: list[Layer] = []

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        groups, rows, columns = layers.weight_matrix(module).shape
        inputs, window = layers.input_rows(module, args[0])
        found.append(Layer(name, groups, rows, columns, tuple(inputs.shape[1:]), window))

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in model.named_modules()
        if layers.kind(module)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return tuple(found)


@cache
def resnet50() -> tuple[Layer, ...]:
    with torch.device("meta"):
        return walk(models.resnet50(), torch.empty(1, 3, 224, 224))


@cache
def yolov5s() -> tuple[Layer, ...]:
    with torch.device("meta"):
        return walk(models.yolov5s(), torch.empty(1, 3, 640, 640))


@cache
def efficientnet_lite0() -> tuple[Layer, ...]:
    with torch.device("meta"):
        return walk(models.EfficientNetLite0().eval(), torch.empty(1, 3, 224, 224))


@cache
def llama_3_8b() -> tuple[Layer, ...]:
    """The linear layers of one of its blocks."""
    hidden, key_value, intermediate, _ = LLAMA_3_8B.values()
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return tuple(Layer(name, 1, R, C, (C,)) for name, (R, C) in sizes.items())


@cache
def llama_3_8b_solves() -> tuple[Layer, ...]:
    """The same with layers that read the same input as one: a Hessian, and the rows of all."""
    by_name = {layer.name: layer for layer in llama_3_8b()}
    shared = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
    return tuple(
        replace(by_name[names[0]], name=" ".join(names), rows=sum(by_name[n].rows for n in names))
        for names in shared
    )


def distinct(found: Iterable[Layer]) -> tuple[Layer, ...]:
    """The first layer of each shape, fewest columns first."""
    by_shape: dict[tuple[int, int, int], Layer] = {}
    for layer in found:
        by_shape.setdefault(layer.shape, layer)
    return tuple(sorted(by_shape.values(), key=lambda layer: (layer.columns, layer.rows)))


def counted(found: Iterable[Layer]) -> dict[Layer, int]:
    """The first layer of each shape, and how many have it."""
    found = tuple(found)
    counts = Counter(layer.shape for layer in found)
    return {layer: counts[layer.shape] for layer in distinct(found)}


def problem(
    rows: int, columns: int, *, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight [R, C] and a Hessian [C, C] of correlated columns of very different power.

    H = P (M^T M + I / 20) P: the rows of M (half as many as columns) are directions whose strength
    falls with their number, and the powers P spread over two orders of magnitude. The same numbers
    on every device, up to the rounding of the product.
    """
    random = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, 1, generator=random).mul(0.3).exp()
    weight = torch.randn(rows, columns, generator=random) * scale / columns**0.5
    rank = max(1, columns // 2)
    strength = torch.arange(1.0, rank + 1).pow(-0.75)
    strength /= strength.square().sum().sqrt()
    directions = torch.randn(rank, columns, generator=random) * strength[:, None]
    power = torch.randn(columns, generator=random).mul(0.8).exp()
    directions, power = directions.to(device), power.to(device)
    hessian = directions.T @ directions
    hessian = (hessian + hessian.T) / 2
    hessian.diagonal().add_(0.05)
    return weight.to(device), hessian * power[:, None] * power


def problems(layer: Layer, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Weight and Hessian of a layer as `solve` takes them: with a batch where it has groups."""
    if layer.groups == 1:
        return problem(layer.rows, layer.columns, device=device)
    each = [problem(layer.rows, layer.columns, seed=seed) for seed in range(layer.groups)]
    weights, hessians = zip(*each, strict=True)
    return torch.stack(weights).to(device), torch.stack(hessians).to(device)


def inputs(
    layer: Layer,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """`batch` images, or tokens, at the layer: behind a ReLU, channels of unequal power."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, *layer.inputs, generator=random, device=device)
    power = torch.randn(layer.inputs[0], generator=random, device=device).mul(0.8).exp()
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x.relu_().mul_(power.view(shape)).to(dtype)
