"""Layers as matrices: every supported module is a batch of [R, C] weights times rows of inputs.

A convolution is one problem per group: C = in_channels / groups * window size, R = out_channels /
groups, and a row is the patch under one window position. A transposed convolution is the ordinary
one over its input with zeros between the elements, by the mirrored window.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .window import Triple, Window

Layer = Any  # an nn.Module of a known kind, whose attributes no common type describes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind(module: nn.Module) -> str | None:
    """Name of the layer type, or None where the module is not a layer that can be quantized."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        return type(module).__name__
    # transformers' Conv1D, a linear layer with a transposed weight, without importing transformers
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "Conv1D"
    return None


def obstacle(module: nn.Module) -> str | None:
    """Why a layer of a known kind still cannot be quantized; None where it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if "qweight" in module._buffers:
        return "it is packed already"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "its weight is computed from other parameters"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized"
    if weight.device.type == "meta":
        return "its weight has no data (meta device)"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"its weight is {weight.dtype}, not float16, bfloat16, float32 or float64"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def weight_matrix(module: Layer) -> Tensor:
    """The weight as [groups, R, C]; a view where possible."""
    weight = module.weight.detach()
    if isinstance(module, _ConvTransposeNd):
        space = tuple(range(3, weight.ndim + 1))
        split = weight.unflatten(0, (module.groups, -1)).flip(space)  # [G, in / G, out / G, *size]
        return split.transpose(1, 2).flatten(2)
    if isinstance(module, CONVOLUTIONS):
        return weight.flatten(1).unflatten(0, (module.groups, -1))
    return (weight.mT if kind(module) == "Conv1D" else weight)[None]


def matrix_shape(module: Layer) -> tuple[int, int, int]:
    """That of `weight_matrix`, by the module's attributes: its weight may be packed."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        columns = module.in_channels // module.groups * math.prod(module.kernel_size)
        return module.groups, module.out_channels // module.groups, columns
    if kind(module) == "Conv1D":
        return 1, module.nf, len(module.weight)
    return 1, module.out_features, module.in_features


def window_size(module: Layer) -> int:
    """Columns of `weight_matrix` for one input channel; they lie together."""
    return math.prod(getattr(module, "kernel_size", (1,)))


def as_weight(module: Layer, matrix: Tensor) -> Tensor:
    """The inverse of `weight_matrix`: [groups, R, C] in the shape of the weight."""
    if isinstance(module, _ConvTransposeNd):
        split = matrix.unflatten(2, (-1, *module.kernel_size))  # [G, out / G, in / G, *size]
        return split.flip(tuple(range(3, split.ndim))).transpose(1, 2).flatten(0, 1)
    if isinstance(module, CONVOLUTIONS):
        return matrix.flatten(0, 1).unflatten(1, (-1, *module.kernel_size))
    return matrix[0].mT if kind(module) == "Conv1D" else matrix[0]


@torch.no_grad()
def store_weight(module: Layer, matrix: Tensor) -> None:
    """Put a matrix as of `weight_matrix` into the weight, in place, in its dtype."""
    overwrite(module.weight, as_weight(module, matrix))


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """In place, in its dtype; autocast, if a `forward` turns it on, may keep a cast of what was."""
    with torch.no_grad():
        tensor.copy_(value)
    torch.clear_autocast_cache()


def called_with(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer, however it was passed."""
    value = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} takes a tensor, but was called with {type(value).__name__}")
    return value


def input_rows(
    module: Layer, inputs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Window | None]:
    """What `HessianSum.add` takes, from the input of the module's forward.

    mask: bool of the leading shape of a linear layer's input; rows where it is False are left out.
    """
    if is_linear(module):
        return counted(module, inputs, mask).reshape(-1, inputs.shape[-1]), None
    axes = len(module.kernel_size)
    if inputs.ndim == axes + 1:  # an image without a batch axis
        inputs = inputs[None]
    if isinstance(module, _ConvTransposeNd):
        inputs, stride = _spread(module, inputs), (1,) * axes
    else:
        inputs, stride = _padded(module, inputs), module.stride
    window = Window(
        _triple(module.kernel_size), _triple(stride), _triple(module.dilation), module.groups
    )
    unused = (1,) * (3 - axes)
    return inputs.reshape(*inputs.shape[:2], *unused, *inputs.shape[2:]), window


def is_linear(module: Layer) -> bool:
    return kind(module) in ("Linear", "Conv1D") or isinstance(module, nn.Linear)


def counted(module: Layer, values: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs or outputs of a layer without those of tokens that a mask leaves out."""
    fits = mask is not None and is_linear(module) and mask.shape == values.shape[:-1]
    return values[mask] if fits else values


def row_geometry(module: Layer) -> tuple[object, ...]:
    """Equal for modules for which `input_rows` makes the same rows of the same input."""
    groups, _, columns = weight_matrix(module).shape
    if not isinstance(module, _ConvNd):
        return groups, columns
    return (
        groups, columns, module.transposed, module.kernel_size, module.stride, module.padding,
        module.padding_mode, module.output_padding, module.dilation,
    )  # fmt: skip


def _triple(values: tuple[int, ...]) -> Triple:
    d, h, w = (1,) * (3 - len(values)) + tuple(values)
    return d, h, w


def _padded(module: Layer, inputs: Tensor) -> Tensor:
    """The input as the convolution sees it, borders included."""
    if module.padding == "valid":
        return inputs
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [module.padding[axis]] * 2
    if not any(amounts):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, amounts, mode=mode)


def _spread(module: Layer, inputs: Tensor) -> Tensor:
    """Zeros between the elements, and the borders of a transposed convolution."""
    space = inputs.shape[2:]
    sides = [(side - 1) * stride + 1 for side, stride in zip(space, module.stride, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *sides)
    steps: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in module.stride))
    spread[steps] = inputs
    amounts: list[int] = []
    for axis in reversed(range(len(space))):
        border = module.dilation[axis] * (module.kernel_size[axis] - 1) - module.padding[axis]
        amounts += [border, border + module.output_padding[axis]]
    return F.pad(spread, amounts)


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers of a known kind by qualified name, in the order of definition."""
    return {name: module for name, module in model.named_modules() if kind(module)}
