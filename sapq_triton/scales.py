"""Scales as they are stored: rounded before the first column is quantized, which then compensates.

    float16, bfloat16   the nearest positive number
    power-of-two        2**k next to the scale, below or above: whichever rounds the weights of the
                        group with less squared error; k from -126 to 127 (E8M0 of OCP MX)
    uint8               (m + 1) / 256 * largest, m uint8, float16 the largest scale of the row:
                        double quantization (QLoRA, arXiv 2305.14314, section 3)

The last product is exact in float32, and `largest` itself is one of the scales of its row, so that
both parts can be read off them. A group of zeros takes the largest scale.
"""

import torch
from torch import Tensor

from . import reference
from .codebook import Codebook
from .spec import QuantSpec


def snapped(scale: Tensor, weight: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Scales of `spec.scale_dtype`, as float32: scale, zero_point [B, R, G], weight [B, R, C]

    ValueError for scales beyond the largest number of that format.
    """
    if spec.scale_dtype == "float32":
        return scale
    if spec.scale_dtype == "power-of-two":
        return _power_of_two(scale, weight, zero_point, spec.levels)
    if spec.scale_dtype == "uint8":
        return _double_quantized(scale, weight)
    return _nearest(scale, getattr(torch, spec.scale_dtype))


def _nearest(scale: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    if (scale > limits.max).any():
        raise ValueError(
            f"scales reach {scale.max().item():.3g}, beyond {limits.dtype}; "
            "choose another scale_dtype"
        )
    return scale.to(dtype).clamp_(min=limits.smallest_normal * limits.eps).float()


def _double_quantized(scale: Tensor, weight: Tensor) -> Tensor:
    # the scale of a group of zeros means nothing, and must not be the largest one
    means = (weight != 0).unflatten(2, (scale.shape[2], -1)).any(3)
    largest = scale.where(means, 0).amax(2, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    steps = (scale.where(means, largest) / largest * 256).round_().clamp_(min=1)
    return _nearest(largest, torch.float16) / 256 * steps


def _power_of_two(
    scale: Tensor, weight: Tensor, zero_point: Tensor, qmax: int | Codebook
) -> Tensor:
    limits = torch.finfo(torch.float32)
    # without its mantissa a number is the power of two below it
    below = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    below = below.clamp_(min=limits.smallest_normal)
    above = torch.where(scale > below, 2 * below, below).clamp_(max=2.0**127)
    errors = [_squared_error(weight, each, zero_point, qmax) for each in (below, above)]
    return torch.where(errors[0] <= errors[1], below, above)


def _squared_error(
    weight: Tensor, scale: Tensor, zero_point: Tensor, qmax: int | Codebook
) -> Tensor:
    """Of rounding to nearest, [B, R, G]"""
    w, s, z = weight.unflatten(2, (scale.shape[2], -1)), scale[..., None], zero_point[..., None]
    value = reference.to_value(reference.to_code(w, s, z, qmax), s, z, qmax)
    return value.sub_(w).square_().sum(3)
