"""Layers that hold packed codes in place of their weight.

`weight` of a packed layer is computed from the codes whenever it is read, so that everything else
is what the plain layer does: padding modes, strides, output sizes, and whoever reads the weight of
a layer without calling it. Linear layers on a GPU multiply by the codes themselves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import layers, ops, reference
from .layers import Layer
from .packing import pack, unpack, words
from .spec import QuantSpec

Tensors = Mapping[str, Tensor | None]  # the buffers of a packed layer by name
BUFFERS = ("qweight", "scale", "qzeros")


class PackedWeight(nn.Module):
    """What the packed layers have in common; each takes the arguments of its plain layer, and spec.

    A new one holds scales of 0, hence a weight of 0, for `load_state_dict` to fill. With R output
    channels, C columns of `layers.weight_matrix` (its groups one after another), G groups of
    columns, the buffers are

    qweight: int32 [R, words(C)], codes as in `packing`.
    scale: [R, G] in spec.scale_dtype, whatever dtype the module is cast to.
    qzeros: int32 [R, words(G)], zero points as in `packing`; None where spec is symmetric.

    weight_dtype: of the weight that is computed; `.half()` and `.to(dtype)` change it.

    ValueError for a group size that does not divide the columns, a spec that `check_spec` refuses,
    and for a state of another dtype.
    """

    spec: QuantSpec
    qweight: Tensor
    scale: Tensor
    qzeros: Tensor | None
    weight_dtype: torch.dtype

    def __init__(self, *args: Any, spec: QuantSpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self._parameters["weight"].device  # type: ignore[union-attr]
        _hold(self, spec, _empty(layers.matrix_shape(self), spec, device))

    def reset_parameters(self) -> None:
        if (bias := self._parameters["bias"]) is not None:
            nn.init.zeros_(bias)

    def codes(self) -> Tensor:
        """uint8 [R, C]"""
        return unpack(self.qweight, self.spec.bits, layers.matrix_shape(self)[2])

    def zero_points(self) -> Tensor:
        """uint8 [R, G]"""
        if self.qzeros is None:
            return torch.full_like(self.scale, 2 ** (self.spec.bits - 1), dtype=torch.uint8)
        return unpack(self.qzeros, self.spec.bits, self.scale.shape[1])

    def dequantize(self) -> Tensor:
        """The weight in the shape and dtype of the plain layer's."""
        groups, _, columns = layers.matrix_shape(self)
        # on a CPU in operators that any exporter knows
        on_gpu = ops.uses_triton(self.qweight, "auto")
        matrix = (ops if on_gpu else reference).dequantize_packed(
            self.qweight, self.scale, self.qzeros, self.spec.bits, columns, self.weight_dtype
        )
        return layers.as_weight(self, matrix.unflatten(0, (groups, -1)))

    weight: Any = property(dequantize)

    def extra_repr(self) -> str:
        spec = self.spec
        grid = f"bits={spec.bits}, group_size={spec.group_size}, symmetric={spec.symmetric}"
        return f"{super().extra_repr()}, {grid}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        before = {name: self._buffers[name] for name in BUFFERS}
        like = torch.empty(0, dtype=self.weight_dtype, device=self.qweight.device)
        super()._apply(fn, recurse)
        self.weight_dtype = fn(like).dtype
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is None or moved is None:
                continue
            if moved.dtype != tensor.dtype:
                moved = tensor.to(moved.device)  # as it was before the cast
            # in place where that can be, as parameters are: a twin holds the same tensor
            if torch._has_compatible_shallow_copy_type(tensor, moved) and not tensor.is_inference():
                tensor.data = moved
                moved = tensor
            self._buffers[name] = moved
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in BUFFERS:
            tensor, mine = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(tensor, Tensor) and mine is not None and tensor.dtype != mine.dtype:
                raise ValueError(f"{prefix}{name} must be {mine.dtype}, got {tensor.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantLinear(PackedWeight, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in ops.FLOATS or not ops.uses_triton(input, "auto"):
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input must be [..., {self.in_features}], got {list(input.shape)}")
        rows = input.reshape(-1, self.in_features)
        y = ops.matmul_packed(rows, self.qweight, self.scale, self.qzeros, self.spec.bits)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*input.shape[:-1], self.out_features)


class QuantConv1d(PackedWeight, nn.Conv1d):
    pass


class QuantConv2d(PackedWeight, nn.Conv2d):
    pass


class QuantConv3d(PackedWeight, nn.Conv3d):
    pass


class QuantConvTranspose1d(PackedWeight, nn.ConvTranspose1d):
    pass


class QuantConvTranspose2d(PackedWeight, nn.ConvTranspose2d):
    pass


class QuantConvTranspose3d(PackedWeight, nn.ConvTranspose3d):
    pass


PACKED: dict[type[nn.Module], type[PackedWeight]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
}

# what nothing else of a layer may be called
NAMES = {
    name
    for name in (*PackedWeight.__annotations__, *vars(PackedWeight))
    if name != "weight" and not name.startswith("__")
}


def obstacle(module: Layer) -> str | None:
    """Why a layer that can be quantized still cannot be packed; None where it can."""
    if type(module) not in PACKED and layers.kind(module) != "Conv1D":
        return f"{type(module).__qualname__} may have a forward of its own"
    if layers.matrix_shape(module) != layers.weight_matrix(module).shape:
        return "its attributes do not tell the shape of its weight"
    holders = vars(module), module._parameters, module._buffers, module._modules
    if taken := sorted(NAMES & set().union(*holders)):
        return f"its attribute {taken[0]!r} has a name that packed layers use"
    return None


def check_spec(spec: QuantSpec) -> None:
    """ValueError for a spec whose codes or scales packed layers do not hold."""
    if spec.codebook != "int":
        raise ValueError(
            f"packed layers hold integers, not the levels of codebook {spec.codebook!r}"
        )
    if spec.scale_dtype in ("power-of-two", "uint8"):
        raise ValueError(
            "packed layers hold scales of float32, float16 or bfloat16, not scale_dtype "
            f"{spec.scale_dtype!r}"
        )


def pack_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensors:
    """The buffers of a packed layer.

    codes uint8 [R, C], scale and zero_point [R, G] of any dtype; all may have the groups of a
    convolution as one more axis in front. ValueError where they do not fit spec.
    """
    check_spec(spec)
    codes, scale, zero_point = (
        tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        for tensor in (codes, scale, zero_point)
    )
    R, C = codes.shape
    grid = R, C // spec.columns_per_group(C)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape != grid:
            raise ValueError(f"{name} must be {list(grid)}, got {list(tensor.shape)}")
    stored = scale.to(getattr(torch, spec.scale_dtype))
    if not torch.equal(stored.to(scale.dtype), scale):
        raise ValueError(f"scales are not numbers of {spec.scale_dtype}: solve with that spec")
    middle = 2 ** (spec.bits - 1)
    if spec.symmetric and not torch.equal(zero_point, torch.full_like(zero_point, middle)):
        raise ValueError(f"zero points of a symmetric spec must be {middle}")
    zeros = zero_point.to(torch.uint8)
    if not torch.equal(zeros.to(zero_point.dtype), zero_point):
        raise ValueError(f"zero points must be integers from 0 to {spec.qmax}")
    return {
        "qweight": pack(codes, spec.bits),
        "scale": stored.contiguous(),
        "qzeros": None if spec.symmetric else pack(zeros, spec.bits),
    }


def to_packed(module: Layer, spec: QuantSpec, tensors: Tensors | None = None) -> PackedWeight:
    """Turn a plain layer into a packed one in place: hooks and other references stay.

    tensors: as from `pack_weight`, moved to the device of the weight; by default empty ones, as in
    a new packed layer. ValueError for a layer that cannot be packed, and for tensors that are not
    its own, before anything is changed.
    """
    if reason := obstacle(module):
        raise ValueError(f"cannot be packed: {reason}")
    shape = layers.matrix_shape(module)
    device = module.weight.device
    if tensors is None:
        tensors = _empty(shape, spec, device)
    for name, like in _empty(shape, spec, torch.device("meta")).items():
        expected, got = (t is not None and (*t.shape, t.dtype) for t in (like, tensors[name]))
        if got != expected:
            raise ValueError(f"{name} must be {expected or None}, got {got or None}")
    if layers.kind(module) == "Conv1D":
        _, module.out_features, module.in_features = shape
    module.__class__ = PACKED.get(type(module), QuantLinear)
    _hold(module, spec, {name: t if t is None else t.to(device) for name, t in tensors.items()})
    return module


def _hold(module: Layer, spec: QuantSpec, tensors: Tensors) -> None:
    """Put codes where the weight was."""
    module.spec, module.weight_dtype = spec, module._parameters.pop("weight").dtype
    for name in BUFFERS:
        module.register_buffer(name, tensors[name])


def _empty(shape: tuple[int, int, int], spec: QuantSpec, device: torch.device) -> Tensors:
    """Buffers of a layer of [groups, R, C]."""
    check_spec(spec)
    R, C = shape[0] * shape[1], shape[2]
    G = C // spec.columns_per_group(C)
    qweight, qzeros = (
        torch.zeros(R, words(count, spec.bits), dtype=torch.int32, device=device)
        for count in (C, G)
    )
    scale = torch.zeros(R, G, dtype=getattr(torch, spec.scale_dtype), device=device)
    return {"qweight": qweight, "scale": scale, "qzeros": None if spec.symmetric else qzeros}
