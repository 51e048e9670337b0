"""Eight-bit activations for an ONNX graph with integer weights: ranges, and where they are put.

QuantizeLinear and DequantizeLinear pairs are placed so that onnxruntime merges them with the layer
between them into one integer operator (QLinearConv, QGemm, QLinearAdd, ...).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_graph import Array, Graph, IntegerWeight, attributes, reads
from .onnx_module import session

ActivationDtype = Literal["uint8", "int8"]
RangeRule = Literal["minmax", "mse", "percentile"]

# layers that onnxruntime has integer kernels for
LAYERS = ("Conv", "Gemm", "MatMul")
# merged into the layer before them where the range of their output says the same
CLAMPS = ("Relu", "Clip")
# whose output holds nothing but values of their first input
MOVES = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# other operators on activations that have integer kernels
ARITHMETIC = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid")

BINS = 2048
MSE_SHRINK = tuple(1 - step / 100 for step in range(80))  # first one that wins stays
KEPT = 0.9999  # of the values, by "percentile": half of the others on each side
LARGEST_BIAS = 2**30  # of int32; the other half is for the products


@dataclass(frozen=True)
class Grid:
    """value ~ (code - zero_point) * scale, codes of the dtype of zero_point"""

    scale: np.float32
    zero_point: Array


def grid(low: float, high: float, dtype: ActivationDtype) -> Grid:
    """The grid of 256 codes that spans low to high, and 0, which is a code."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    first = np.iinfo(dtype).min
    # where one end is 0 that end must be met: onnxruntime then drops the Relu or Clip before it
    zero_point = np.clip(np.rint(-low / scale), 0, 255) + first
    return Grid(scale, zero_point.astype(dtype))


def quantize_activations(
    graph: Graph,
    weights: dict[str, IntegerWeight],
    batches: Iterable[Mapping[str, Array]],
    dtype: ActivationDtype = "uint8",
    ranges: RangeRule = "mse",
) -> dict[str, str]:
    """Put eight-bit activations into a graph whose weights were set.

    weights: by the name of the value that a layer reads. batches: inputs of the graph by name.
    Returns what was not done as asked, by the name of the node.

    Every input and output of a layer with one scale per output channel is quantized, and what lies
    between them if onnxruntime has an integer kernel for it; nothing after the last layer is.
    Biases of these layers become int32 of scale x_scale * w_scale[c]. A channel with so small
    weights that its bias does not fit gets a larger scale, its weights are rounded to it (in
    `weights` as well): each moves by at most 2**-31 of bias / x_scale.

    dtype: "uint8", or "int8", which onnxruntime on x86 merges fully only where the session has the
    configuration entry "session.qdqisint8allowed" = "1". ranges: of each activation over the
    batches: "minmax", "percentile" (leaves out 0.01 % of the values) or "mse" (least squared
    rounding error). On x86 processors without VNNI onnxruntime may saturate where weights beyond
    +-64 meet uint8 activations: symmetric grids of up to 7 bits and asymmetric ones of up to 6 stay
    below that.
    """
    check_options(dtype, ranges)
    layers, left_out = _layers(graph, weights)
    sources = _activations(graph, layers)
    measured = dict.fromkeys(sources.values())
    found = _ranges(graph.model(), list(measured), list(batches), ranges)
    grids = {name: grid(*found[source], dtype) for name, source in sources.items()}
    ready = []
    for node in layers:
        if reason := _obstacle(graph, node, weights[node.input[1]], grids):
            left_out[node.name or node.output[0]] = f"computes on floats: {reason}"
        else:
            ready.append(node)
    for node in ready:  # all of them before the first bias: layers may share a weight
        if raised := _fit_scale(graph, node, weights, grids):
            left_out[node.name or node.output[0]] = f"{raised} channels of larger scale, for int32"
    for node in ready:
        _quantize_bias(graph, node, weights[node.input[1]], grids)
    for name, on in grids.items():
        _insert(graph, name, on)
    return left_out


def check_options(dtype: object, ranges: object) -> None:
    """ValueError for what `quantize_activations` does not know."""
    for name, value, legal in (
        ("activations", dtype, get_args(ActivationDtype)),
        ("ranges", ranges, get_args(RangeRule)),
    ):
        if value not in legal:
            raise ValueError(f"{name} must be one of {legal}, got {value!r}")


def _layers(
    graph: Graph, weights: Mapping[str, IntegerWeight]
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Nodes that can compute on integers, and the names of those that cannot, with the reason."""
    found, left_out = [], {}
    for node in graph.nodes:
        if len(node.input) < 2 or node.input[1] not in weights:
            continue
        if node.op_type not in LAYERS:
            reason = f"onnxruntime has no integer {node.op_type}"
        elif weights[node.input[1]].block:
            reason = "its weight has several scales per output channel"
        elif node.op_type == "Gemm" and attributes(node).get("beta", 1.0) != 1:
            reason = "beta is not 1"
        else:
            found.append(node)
            continue
        left_out[node.name or node.output[0]] = f"computes on floats: {reason}"
    return found, left_out


def _activations(graph: Graph, layers: list[onnx.NodeProto]) -> dict[str, str]:
    """Values to quantize, and for each the value whose range it has."""
    followed = _upstream(graph, [node.input[0] for node in layers])
    waiting = [node.input[0] for node in layers]
    waiting += [_clamped(graph, node.output[0]) for node in layers if id(node) in followed]
    compute = {id(node) for node in layers}
    shares: dict[str, str | None] = {}
    while waiting:
        name = waiting.pop()
        if name in shares or name in graph.outputs or graph.constant(name) is not None:
            continue
        node = _origin(graph, name)
        shares[name] = None
        if node is None or id(node) in compute or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in MOVES:
            shares[name] = node.input[0]
            waiting.append(node.input[0])
        elif node.op_type in ARITHMETIC and all(graph.constant(x) is None for x in node.input):
            waiting += node.input

    def source(name: str) -> str:
        below = shares[name]
        return name if below is None or below not in shares else source(below)

    order = [*graph.inputs, *(name for node in graph.nodes for name in node.output)]
    return {name: source(name) for name in order if name in shares}


def _upstream(graph: Graph, names: list[str]) -> set[int]:
    """Nodes that these values depend on, by id."""
    found: set[int] = set()
    names = list(names)
    while names:
        node = graph.producers.get(names.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            names += reads(node)
    return found


def _clamped(graph: Graph, name: str) -> str:
    """The value behind a Relu or Clip that alone reads this one, or this one."""
    reader = graph.only_reader(name)
    if reader is not None and reader.op_type in CLAMPS and reader.input[0] == name:
        return _clamped(graph, reader.output[0])
    return name


def _origin(graph: Graph, name: str) -> onnx.NodeProto | None:
    """What makes a value, seen through clamps that alone read their input."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in CLAMPS:
        if graph.only_reader(node.input[0]) is None or node.input[0] not in graph.producers:
            return node
        node = graph.producers[node.input[0]]
    return node


def _ranges(
    model: onnx.ModelProto, names: list[str], batches: list[Mapping[str, Array]], rule: str
) -> dict[str, tuple[float, float]]:
    """Low and high end of each value over all batches."""
    if not batches:
        raise ValueError("quantizing activations needs at least one calibration batch")
    present = {value.name for value in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    running = session(model)
    inner = [name for name in names if name in {x.name for x in running.get_outputs()}]

    def values(batch: Mapping[str, Array]) -> dict[str, Array]:
        made = running.run(inner, dict(batch)) if inner else []  # it takes [] for all outputs
        return {**batch, **dict(zip(inner, made, strict=True))}

    extremes = {name: (0.0, 0.0) for name in names}
    for batch in batches:
        found = values(batch)
        for name in names:
            if found[name].dtype != np.float32:
                raise ValueError(f"activations must be float32, {name!r} is {found[name].dtype}")
            low, high = float(found[name].min()), float(found[name].max())
            if not np.isfinite((low, high)).all():
                raise ValueError(f"the activation {name!r} holds NaN or Inf during calibration")
            extremes[name] = min(extremes[name][0], low), max(extremes[name][1], high)
    if rule == "minmax":
        return extremes
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for batch in batches:
        found = values(batch)
        for name in names:
            counts[name] += np.histogram(found[name], BINS, _widened(extremes[name]))[0]
    choose = _least_error if rule == "mse" else _percentile
    return {name: choose(counts[name], extremes[name]) for name in names}


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    return ends if ends[0] < ends[1] else (ends[0], ends[0] + 1)


def _centers(ends: tuple[float, float]) -> Array:
    edges = np.linspace(*_widened(ends), BINS + 1)
    return (edges[1:] + edges[:-1]) / 2


def _percentile(counts: Array, ends: tuple[float, float]) -> tuple[float, float]:
    below = np.cumsum(counts) / counts.sum()
    edges = np.linspace(*_widened(ends), BINS + 1)
    low = edges[np.searchsorted(below, (1 - KEPT) / 2, "right")] if ends[0] < 0 else ends[0]
    high = edges[np.searchsorted(below, (1 + KEPT) / 2) + 1] if ends[1] > 0 else ends[1]
    return min(float(low), 0.0), min(float(high), ends[1])


def _least_error(counts: Array, ends: tuple[float, float]) -> tuple[float, float]:
    """Shrink both ends by the same fraction, the one of least squared rounding error."""
    centers, used = _centers(ends), counts > 0
    values, weights = centers[used], counts[used]
    best, least = ends, np.inf
    for fraction in MSE_SHRINK:
        low, high = ends[0] * fraction, ends[1] * fraction
        on = grid(low, high, "uint8")
        codes = np.clip(np.rint(values / on.scale) + int(on.zero_point), 0, 255)
        error = float((weights * ((codes - int(on.zero_point)) * on.scale - values) ** 2).sum())
        if error < least:
            best, least = (low, high), error
    return best


def _obstacle(
    graph: Graph, node: onnx.NodeProto, weight: IntegerWeight, grids: Mapping[str, Grid]
) -> str | None:
    """Why a layer computes on floats although it has an integer kernel."""
    if node.input[0] not in grids:
        return "its input is no activation that can be quantized"
    if node.op_type == "Conv" and _clamped(graph, node.output[0]) not in grids:
        return "no quantized layer follows"
    if not _has_bias(node):
        return None
    bias = graph.constant(node.input[2])
    if bias is None or bias.size != weight.scale.size:
        return "its bias is not one constant per output"
    return None


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _fit_scale(
    graph: Graph,
    node: onnx.NodeProto,
    weights: dict[str, IntegerWeight],
    grids: Mapping[str, Grid],
) -> int:
    """Raise the scale of channels whose bias is beyond int32; returns how many have weights."""
    if not _has_bias(node):
        return 0
    name, bias = node.input[1], graph.constant(node.input[2])
    assert bias is not None
    weight = weights[name]
    least = np.abs(bias.reshape(-1)).astype(np.float64) / grids[node.input[0]].scale / LARGEST_BIAS
    scale = np.where(weight.scale < least, least, weight.scale).astype(np.float32)
    if (scale == weight.scale).all():
        return 0
    ratio = weight.along_axis(weight.scale.astype(np.float64) / scale)
    values = np.rint(weight.values * ratio).astype(np.int8)
    others = tuple(axis for axis in range(weight.values.ndim) if axis != weight.axis)
    raised = weight.values.any(others) & (scale != weight.scale)
    weights[name] = replace(weight, values=values, scale=scale)
    graph.update_weight(name, weights[name])
    return int(raised.sum())


def _quantize_bias(
    graph: Graph, node: onnx.NodeProto, weight: IntegerWeight, grids: Mapping[str, Grid]
) -> None:
    """Give a layer an int32 bias."""
    if not _has_bias(node):
        return
    old = node.input[2]
    bias = graph.constant(old)
    assert bias is not None
    scale = grids[node.input[0]].scale * weight.scale
    codes = np.rint(bias.reshape(-1).astype(np.float64) / scale)
    name = graph.fresh(f"{node.output[0]}_bias_dequantized")
    parts = (codes.astype(np.int32), scale, np.zeros(scale.shape, np.int32))
    names = [graph.fresh(f"{name}_{x}") for x in ("quantized", "scale", "zero_point")]
    for part, value in zip(names, parts, strict=True):
        graph.initializers[part] = numpy_helper.from_array(value, part)
    made = helper.make_node("DequantizeLinear", names, [name], f"{name}_node", axis=0)
    node.input[2] = name
    graph.insert(node, made)
    graph.drop_unread(old)


def _insert(graph: Graph, name: str, on: Grid) -> None:
    """Let everything that reads a value read its dequantized codes."""
    scale, zero_point, codes, floats = (
        graph.fresh(f"{name}_{x}") for x in ("scale", "zero_point", "quantized", "dequantized")
    )
    graph.initializers[scale] = numpy_helper.from_array(np.array(on.scale), scale)
    graph.initializers[zero_point] = numpy_helper.from_array(on.zero_point, zero_point)
    readers = graph.readers(name)
    nodes: list[Any] = [
        helper.make_node("QuantizeLinear", [name, scale, zero_point], [codes], f"{codes}_node"),
        helper.make_node(
            "DequantizeLinear", [codes, scale, zero_point], [floats], f"{floats}_node"
        ),
    ]
    for reader in readers:
        for place, value in enumerate(reader.input):
            if value == name:
                reader.input[place] = floats
    first = {id(reader) for reader in readers}
    graph.insert(next(node for node in graph.nodes if id(node) in first), *nodes)
