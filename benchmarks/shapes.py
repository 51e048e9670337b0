"""What is benchmarked: layers of real networks by shape, and problems like theirs.

The shapes of ResNet-50 and YOLOv5s are read off a forward pass of `sapq_triton.models` on the meta
device, which computes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
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


def distinct(found: Iterable[Layer]) -> tuple[Layer, ...]:
    """The first layer of each shape, fewest columns first."""
    by_shape: dict[tuple[int, int, int], Layer] = {}
    for layer in found:
        by_shape.setdefault(layer.shape, layer)
    return tuple(sorted(by_shape.values(), key=lambda layer: (layer.columns, layer.rows)))


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
