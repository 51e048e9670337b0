"""The graph of an ONNX model: its constants, who reads what, integer weights in place of floats.

What is not touched stays as it was, names and metadata included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray

# nodes through which a constant stays one: exporters put them between a weight and its layer
FOLDABLE = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# inputs of the nodes that may get new parameters
_LAYER = ("input", "weight", "bias")
PARAMETERS = dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _LAYER) | {
    "BatchNormalization": ("input", "scale", "bias", "mean", "variance")
}
PER_AXIS_OPSET, BLOCK_OPSET = 13, 21  # of DequantizeLinear
IR_VERSION = {PER_AXIS_OPSET: 7, BLOCK_OPSET: 10}  # that came with it


@dataclass(frozen=True)
class IntegerWeight:
    """A weight in the layout of its ONNX node: values * scale, zero point 0.

    values: int8. scale: float32; one per slice along `axis`, or, with block > 0, of the shape of
    `values` with one element for each `block` of them along `axis`. bits: of the codes.
    """

    values: Array
    scale: Array
    axis: int
    block: int = 0
    bits: int = 8

    def dequantize(self) -> Array:
        """float32, as DequantizeLinear computes it"""
        if self.block:
            return self.values * np.repeat(self.scale, self.block, self.axis)
        return self.values * self.along_axis(self.scale)

    def along_axis(self, channels: Array) -> Array:
        """One value per slice, broadcastable to `values`"""
        return np.expand_dims(channels, tuple(a for a in range(self.values.ndim) if a != self.axis))

    def times(self, factor: Array) -> "IntegerWeight | None":
        """The weight times a factor that broadcasts to its shape; None where int8 cannot hold it.

        The sign goes into the values, the size into the scale, so the grid stays what it was:
        only -128 has no negative. Where all values are 0, or the factor is, the scale stays.
        """
        values = self.values * np.sign(factor).astype(np.int16)
        if values.max(initial=0) > 127:
            return None
        shared = tuple(axis for axis, side in enumerate(factor.shape) if side == 1)
        used = values.any(shared, keepdims=True)  # a channel of zeros needs no small scale
        size = np.where(used, np.abs(factor), 1).astype(np.float64)
        if not self.block:
            size = size.reshape(-1)
        elif size.shape[self.axis] > 1:
            size = size.take(range(0, size.shape[self.axis], self.block), self.axis)
        scale = (self.scale * size).astype(np.float32)
        return IntegerWeight(values.astype(np.int8), scale, self.axis, self.block, self.bits)


class Graph:
    """A model whose nodes and constants can be changed; `model()` builds the result.

    Initializers that are listed as inputs too, defaults that a caller could replace, are constants.

    ValueError for a model without nodes, or with an operator set that has no DequantizeLinear per
    channel and cannot be converted to one that has.
    """

    def __init__(self, model: onnx.ModelProto, opset: int = PER_AXIS_OPSET) -> None:
        if not model.graph.node:
            raise ValueError("the ONNX model has no nodes")
        self.source = onnx.ModelProto()
        self.source.CopyFrom(with_opset(model, opset))
        self.nodes = list(self.source.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.source.graph.initializer}
        self.outputs = [value.name for value in self.source.graph.output]
        self.inputs = [
            value.name
            for value in self.source.graph.input
            if value.name not in self.initializers  # files of IR version 3 list those as well
        ]
        self._index()

    @property
    def opset(self) -> int:
        return opset_of(self.source)

    def _index(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in reads(node):
                self._readers.setdefault(name, []).append(node)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """Nodes that read a value, also from within their subgraphs."""
        return self._readers.get(name, [])

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that alone reads a value, which is no output of the graph; else None."""
        nodes = self.readers(name)
        return nodes[0] if len(nodes) == 1 and name not in self.outputs else None

    def constant(self, name: str) -> Array | None:
        """The value of a constant; None where it depends on the inputs, or is no tensor."""
        if name in self.initializers:
            return to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            (attribute,) = node.attribute
            value = helper.get_attribute_value(attribute)
            if attribute.name == "value":
                return to_array(value)
            known = _CONSTANT_DTYPES.get(attribute.name)  # none for strings and sparse tensors
            return None if known is None else np.array(value, known)
        if node.op_type not in FOLDABLE:
            return None
        feeds = {name: self.constant(name) for name in node.input if name}
        if any(value is None for value in feeds.values()):
            return None
        (value,) = ReferenceEvaluator(_alone(node, self.opset)).run(None, feeds)
        return np.asarray(value)

    def fresh(self, name: str) -> str:
        """The name, with underscores where it is taken."""
        taken = {*self.initializers, *self.producers, *self.inputs, *self._readers}
        while name in taken:
            name += "_"
        return name

    def set_constant(self, name: str, value: Array) -> None:
        """Let a value be this constant, whatever made it before."""
        producer = self.producers.get(name)
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if producer is not None:
            self.remove(producer)
        self._index()

    def constants_to_initializers(self) -> None:
        """Turn Constant nodes into initializers, so that every part of the graph has its own."""
        made = {node.output[0]: node for node in self.nodes if node.op_type == "Constant"}
        values = {name: self.constant(name) for name in made if name not in self.outputs}
        for name, value in values.items():
            if value is not None:
                self.initializers[name] = numpy_helper.from_array(value, name)
        moved = {id(made[name]) for name, value in values.items() if value is not None}
        self.nodes = [node for node in self.nodes if id(node) not in moved]
        self._index()

    def remove(self, *nodes: onnx.NodeProto) -> None:
        """Take nodes out, and the constants that only they read."""
        leaving = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in leaving]
        self._index()
        for name in {name for node in nodes for name in reads(node)}:
            self.drop_unread(name)

    def drop_unread(self, name: str) -> None:
        """Remove a constant that nothing reads any more, with what it was made from."""
        if self.readers(name) or name in self.outputs:
            return
        self.initializers.pop(name, None)
        node = self.producers.get(name)
        if node is not None and node.op_type in ("Constant", *FOLDABLE):
            self.remove(node)

    def insert(self, before: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        place = next(i for i, node in enumerate(self.nodes) if node is before)
        self.nodes[place:place] = nodes
        self._index()

    def set_weight(self, name: str, weight: IntegerWeight) -> None:
        """Let a DequantizeLinear node make the value that a layer reads as its weight."""
        readers, old = {id(node) for node in self.readers(name)}, self.constant(name)
        if producer := self.producers.get(name):
            self.remove(producer)
        self.initializers.pop(name, None)
        stored = [self.fresh(f"{name}_{part}") for part in ("quantized", "scale", "zero_point")]
        zeros = np.zeros(weight.scale.shape, weight.values.dtype)
        for part, value in zip(stored, (weight.values, weight.scale, zeros), strict=True):
            self.initializers[part] = numpy_helper.from_array(np.ascontiguousarray(value), part)
        made = name
        nodes = []
        if old is not None and old.dtype != np.float32:
            made = self.fresh(f"{name}_float32")
            kind = helper.np_dtype_to_tensor_dtype(old.dtype)
            nodes = [helper.make_node("Cast", [made], [name], f"{name}_cast", to=kind)]
        node = helper.make_node(
            "DequantizeLinear", stored, [made], f"{name}_dequantize", axis=weight.axis
        )
        if weight.block:
            node.attribute.append(helper.make_attribute("block_size", weight.block))
        self.insert(next(node for node in self.nodes if id(node) in readers), node, *nodes)

    def update_weight(self, name: str, weight: IntegerWeight) -> None:
        """Other integers and scales of the same shapes for a value that `set_weight` has set."""
        stored = self.producers[name].input
        for part, value in zip(stored, (weight.values, weight.scale), strict=False):
            self.initializers[part] = numpy_helper.from_array(np.ascontiguousarray(value), part)

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """The changed model; metadata is added to its metadata_props."""
        built = onnx.ModelProto()
        built.CopyFrom(self.source)
        graph = built.graph
        values = {*self.producers, *self.inputs, *self.initializers}
        for field, items in (
            (graph.node, self.nodes),
            (graph.initializer, list(self.initializers.values())),
            # no initializers, which may be renamed, reshaped or made by a node by now
            (graph.input, [item for item in graph.input if item.name in self.inputs]),
            (graph.value_info, [item for item in graph.value_info if item.name in values]),
        ):
            kept = [type(item).FromString(item.SerializeToString()) for item in items]
            del field[:]
            field.extend(kept)
        known = {item.key: item.value for item in built.metadata_props} | dict(metadata or {})
        helper.set_model_props(built, known)
        return built


_CONSTANT_DTYPES: dict[str, type[np.generic]] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def to_array(tensor: onnx.TensorProto) -> Array:
    """ValueError for a tensor of a type that NumPy has not, or with less data than its shape."""
    try:
        return numpy_helper.to_array(tensor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"constant {tensor.name!r} cannot be read: {error!r}") from error


def names(graph: onnx.GraphProto) -> Iterator[str]:
    """Of all nodes and values, those of subgraphs included."""
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        yield item.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        for inner in subgraphs(node):
            yield from names(inner)


def reads(node: onnx.NodeProto) -> set[str]:
    """Values that a node reads, those that its subgraphs take from outside included."""
    names = set(node.input) - {""}
    for graph in subgraphs(node):
        made = {item.name for item in (*graph.input, *graph.initializer)}
        made |= {name for inner in graph.node for name in inner.output}
        names |= {name for inner in graph.node for name in reads(inner)} - made
        names |= {item.name for item in graph.output} - made
    return names


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Those of If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """By name, strings decoded."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the operators of ONNX itself."""
    return next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), 1)


def with_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model, converted where its operators are older than `opset`."""
    if opset_of(model) < opset:
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except Exception as error:  # RuntimeError, ConvertError, InferenceError, IndexError, ...
            raise ValueError(
                f"the model has operators of opset {opset_of(model)}, {opset} is needed here, and "
                f"onnx cannot convert it: {error}"
            ) from error
    needed = max(version for since, version in IR_VERSION.items() if since <= opset)
    if model.ir_version >= needed:
        return model
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    newer.ir_version = needed
    return newer


def _alone(node: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    """A model of one node, whose inputs may be of any type."""
    inputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def fold_batchnorm(graph: Graph, weights: dict[str, IntegerWeight]) -> dict[str, str]:
    """Put each BatchNormalization that alone reads a quantized layer into that layer.

    weights: by the name of the value that the layer reads; changed in place. Exact on the codes:
    the scale of a channel is multiplied by gamma / sqrt(variance + epsilon), a negative one also
    negates its integers. Returns the nodes that stay although they follow such a layer, and why.
    """
    kept = {}
    for norm in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        layer = graph.producers.get(norm.input[0])
        if layer is None or len(layer.input) < 2 or layer.input[1] not in weights:
            continue
        if layer.op_type == "MatMul":  # has no bias to put beta into
            kept[norm.name or norm.output[0]] = "a MatMul has no bias"
        elif reason := _fold(graph, weights, layer, norm):
            kept[norm.name or norm.output[0]] = reason
    return kept


def _fold(
    graph: Graph, weights: dict[str, IntegerWeight], layer: onnx.NodeProto, norm: onnx.NodeProto
) -> str | None:
    """Why it cannot be folded; None where it was."""
    if reason := _obstacle(graph, layer, norm):
        return reason
    name, dtype = layer.input[1], getattr(graph.constant(norm.input[1]), "dtype", np.float32)
    gamma, beta, mean, variance, bias = _parameters(graph, layer, norm)
    epsilon: Any = attributes(norm).get("epsilon", 1e-5)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        factor = gamma / np.sqrt(variance + epsilon)
        shift = (factor * (bias - mean) + beta).astype(dtype)
        weight = weights[name].times(along_channels(layer, factor, weights[name].values.shape))
    if weight is None:
        return "gamma is negative where the layer has a weight of -128"
    if not (
        np.isfinite(factor).all() and np.isfinite(shift).all() and np.isfinite(weight.scale).all()
    ):
        return "its parameters make NaN or Inf of the weight or the bias"
    weights[name] = weight
    set_parameter(graph, layer, 2, shift)
    kept = [a for a in layer.attribute if a.name != "beta"]  # of a Gemm; 1 where it has none
    del layer.attribute[:]
    layer.attribute.extend(kept)
    layer.output[0] = norm.output[0]
    graph.remove(norm)
    return None


def _obstacle(graph: Graph, layer: onnx.NodeProto, norm: onnx.NodeProto) -> str | None:
    """Why a BatchNormalization is not a part of the layer before it; None where it is."""
    if graph.only_reader(norm.input[0]) is None:
        return "the output of the layer is read elsewhere as well"
    if graph.only_reader(layer.input[1]) is None:
        return "the weight of the layer is read elsewhere as well"
    if attributes(norm).get("training_mode", 0) or sum(map(bool, norm.output)) > 1:
        return "it is in training mode"
    names = [*norm.input[1:], *(name for name in layer.input[2:] if name)]
    if any(graph.constant(name) is None for name in names):
        return "its parameters are not constant"
    return None


def _parameters(graph: Graph, layer: onnx.NodeProto, norm: onnx.NodeProto) -> list[Array]:
    """gamma, beta, mean, variance, and what the layer adds to its product or 0, float64"""
    names = [*norm.input[1:], *(name for name in layer.input[2:] if name)]
    found = [np.asarray(graph.constant(name), np.float64) for name in names]
    if len(found) < 5:
        return [*found, np.zeros(1)]
    beta: Any = attributes(layer).get("beta", 1.0)  # a Gemm multiplies its bias by it
    return [*found[:4], beta * found[4]]


def make_gammas_positive(graph: Graph) -> None:
    """Negate the channels of a layer rather than let the BatchNormalization behind it do so.

    The graph computes the same numbers, and integers of 8 bits can be folded: -128 has no negative.
    """
    for norm in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        layer = graph.producers.get(norm.input[0])
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        weight, gamma = graph.constant(layer.input[1]), graph.constant(norm.input[1])
        if weight is None or gamma is None or _obstacle(graph, layer, norm) or (gamma >= 0).all():
            continue
        sign = np.where(gamma < 0, -1, 1)
        places = [(norm, 1), (norm, 3), *([(layer, 2)] if len(layer.input) > 2 else [])]
        for node, place in places:
            if node.input[place]:
                value = np.asarray(graph.constant(node.input[place]))
                set_parameter(graph, node, place, value * sign.astype(value.dtype))
        signs = along_channels(layer, sign, weight.shape).astype(weight.dtype)
        set_parameter(graph, layer, 1, weight * signs)


def along_channels(layer: onnx.NodeProto, channels: Array, shape: tuple[int, ...]) -> Array:
    """A value per output channel, broadcastable to the weight of a layer of that shape."""
    options = attributes(layer)
    if layer.op_type == "ConvTranspose":
        groups = int(options.get("group", 1))  # type: ignore[call-overload]
        rows = channels.reshape(groups, -1)
        if groups > 1:
            rows = rows.repeat(shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))
    if layer.op_type == "MatMul" or (layer.op_type == "Gemm" and not options.get("transB", 0)):
        return channels[None]
    return channels.reshape(-1, *(1,) * (len(shape) - 1))


def set_parameter(graph: Graph, node: onnx.NodeProto, place: int, value: Array) -> None:
    """Give a node another constant input, under the name that it had, unless others read that."""
    name = node.input[place] if place < len(node.input) else ""
    if not name or graph.only_reader(name) is not node:
        name = graph.fresh(f"{node.output[0]}_{PARAMETERS[node.op_type][place]}")
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = name
    graph.set_constant(name, value)


def fold_pads(graph: Graph) -> None:
    """Put each Pad of zeros that only one convolution reads into the padding of that convolution.

    onnxruntime has no integer kernel for a Pad between two quantized layers.
    """
    for pad in [node for node in graph.nodes if node.op_type == "Pad"]:
        layer = graph.only_reader(pad.output[0])
        if layer is None or layer.op_type != "Conv" or layer.input[0] != pad.output[0]:
            continue
        pads, value = graph.constant(pad.input[1]), 0.0
        if len(pad.input) > 2 and pad.input[2]:
            filled = graph.constant(pad.input[2])
            value = np.nan if filled is None else float(filled.reshape(-1)[0])
        mode = attributes(pad).get("mode", "constant")
        if mode != "constant" or value != 0 or pads is None or len(pad.input) > 3:
            continue
        options = attributes(layer)
        begin, end = np.split(pads, 2)
        axes = len(begin) - 2
        if pads.min() < 0 or begin[:2].any() or end[:2].any():
            continue
        if options.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        own = options.get("pads", [0] * 2 * axes)
        total = np.concatenate([begin[2:], end[2:]]) + np.array(own)
        kept = [a for a in layer.attribute if a.name not in ("pads", "auto_pad")]
        del layer.attribute[:]
        layer.attribute.extend([*kept, helper.make_attribute("pads", total.tolist())])
        layer.input[0] = pad.input[0]
        graph.remove(pad)
