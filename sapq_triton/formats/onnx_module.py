"""An ONNX graph as a module whose convolutions and products with constants are PyTorch layers.

Conv, ConvTranspose, Gemm, MatMul and BatchNormalization nodes with constant parameters become
layers; the nodes between two of them form a segment that onnxruntime runs. Each node runs once per
pass, in the order of the file, and a value is freed after the last step that reads it.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .onnx_graph import Array, Graph, attributes, opset_of, reads

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FLOATS = (np.float16, np.float32, np.float64)
KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")


class OnnxModule(nn.Module):
    """model: what `onnx.load` returns.

    Takes the inputs of the graph, by position or by name, and returns its output, or a tuple of
    them. Layers have the names of their nodes, with "_" for "."; parameters are float32, also where
    the file has float16, and each layer returns the dtype of its input. Segments run on the CPU.

    nodes: layer name -> node of the file. left_out: name -> why a node of a layer's kind runs in a
    segment, and so cannot be quantized.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = Graph(model, opset_of(model))
        graph.constants_to_initializers()
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.left_out: dict[str, str] = {}
        self._steps: list[_LayerStep | _Segment] = []
        self._freed: list[list[str]] = []  # after each step; set here, lest a layer has the name
        self._fixed: dict[str, Tensor] = {}  # outputs that are constants
        parameters: dict[str, nn.Parameter] = {}  # nodes that share a weight share the parameter
        waiting: list[onnx.NodeProto] = []
        layers = {id(node): _build(graph, node) for node in graph.nodes}
        used = _needed(graph, layers)
        places = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        for node in graph.nodes:
            if id(node) not in used:
                continue
            built = layers[id(node)]
            name = node.name or f"{node.op_type}_{places[node.output[0]]}"
            name = name.replace(".", "_")
            if isinstance(built, _Unfit):
                if built:
                    self.left_out[name] = str(built)
                waiting.append(node)
                continue
            if waiting:
                self._steps.append(_Segment(graph, waiting))
                waiting = []
            while hasattr(self, name):
                name += "_"
            layer, before, after = built
            if not isinstance(layer, _BatchNorm):
                layer.weight = parameters.setdefault(node.input[1], layer.weight)
            self.nodes[name] = node
            self.add_module(name, layer)
            self._steps.append(_LayerStep(name, node, before, after))
        if waiting:
            self._steps.append(_Segment(graph, waiting))
        self._freed = _last_reads(self._steps, set(self.outputs))
        made = {value for step in self._steps for value in step.outputs}
        for value in set(self.outputs) - made - set(self.inputs):
            self._fixed[value] = torch.tensor(graph.constant(value))
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, args, strict=False)) | kwargs
        if set(values) != set(self.inputs) or len(args) + len(kwargs) != len(self.inputs):
            raise ValueError(
                f"the graph takes {self.inputs}, got {len(args)} by position and {list(kwargs)}"
            )
        for step, freed in zip(self._steps, self._freed, strict=True):
            if isinstance(step, _LayerStep):
                inputs = values[step.inputs[0]]
                values[step.outputs[0]] = step.run(getattr(self, step.name), inputs)
            else:
                values |= step.run(values)
            for name in freed:
                values.pop(name, None)
        results = [values[n] if n in values else self._fixed[n] for n in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)


def _last_reads(steps: "Sequence[_LayerStep | _Segment]", outputs: set[str]) -> list[list[str]]:
    """For each step, the values that none after it reads."""
    last: dict[str, int] = {}
    for place, step in enumerate(steps):
        last |= dict.fromkeys((*step.inputs, *step.outputs), place)
    freed: list[list[str]] = [[] for _ in steps]
    for value, place in last.items():
        if value not in outputs:
            freed[place].append(value)
    return freed


class _Unfit(str):
    """Why a node cannot be a layer; empty where it is not of a layer's kind."""


class _BatchNormAnyRank(_BatchNorm):
    """The file does not say how many axes the input has."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


Pads = tuple[int, ...]
_Built = tuple[Any, "Pads | _Same", Pads]  # a layer, padding before it, cropping after it


class _Same:
    """Padding of auto_pad SAME_UPPER or SAME_LOWER, which depends on the size of the input."""

    def __init__(self, layer: Any, upper: bool) -> None:
        self.kernel, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.upper = upper

    def __call__(self, sides: Sequence[int]) -> Pads:
        amounts: list[int] = []
        for axis in reversed(range(len(sides))):
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            steps = -(-sides[axis] // self.stride[axis])
            total = max((steps - 1) * self.stride[axis] + extent - sides[axis], 0)
            small, large = total // 2, total - total // 2
            amounts += [small, large] if self.upper else [large, small]
        return tuple(amounts)


class _LayerStep:
    """Call a layer; `before` pads its input as F.pad does, `after` crops its output."""

    def __init__(
        self, name: str, node: onnx.NodeProto, before: "Pads | _Same", after: Pads
    ) -> None:
        self.name, self.before, self.after = name, before, after
        self.inputs, self.outputs = [node.input[0]], [node.output[0]]

    def run(self, layer: Any, inputs: Tensor) -> Tensor:
        wanted = layer.running_mean if isinstance(layer, _BatchNorm) else layer.weight
        cast = inputs.to(wanted)
        axes = inputs.ndim - 2
        pads = self.before(inputs.shape[2:]) if isinstance(self.before, _Same) else self.before
        if any(pads):
            cast = F.pad(cast, pads)
        output: Tensor = layer(cast)
        if any(self.after):
            output = F.pad(output, [-amount for amount in self.after[: 2 * axes]])
        return output.to(inputs.dtype)


class _Segment:
    """Consecutive nodes as a model of their own, which onnxruntime runs on the CPU.

    Its session is made at the first run, when the types of its inputs are known, and is not copied
    or pickled.
    """

    def __init__(self, graph: Graph, nodes: list[onnx.NodeProto]) -> None:
        made = {name for node in nodes for name in node.output if name}
        inside = {id(node) for node in nodes}
        self.outputs = [
            name
            for name in dict.fromkeys(name for node in nodes for name in node.output if name)
            if name in graph.outputs
            or any(id(reader) not in inside for reader in graph.readers(name))
        ]
        taken = dict.fromkeys(name for node in nodes for name in sorted(reads(node)))
        constants = [name for name in taken if name in graph.initializers]
        self.inputs = [name for name in taken if name not in made and name not in constants]
        body = helper.make_graph(
            nodes,
            "segment",
            [],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [graph.initializers[name] for name in constants],
        )
        self._model = helper.make_model(
            body, opset_imports=graph.source.opset_import, functions=graph.source.functions,
            ir_version=max(graph.source.ir_version, 4),  # initializers need not be inputs since
        )  # fmt: skip
        self._session: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_session", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._session, self._lock = None, threading.Lock()

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        device = next((v.device for v in values.values() if isinstance(v, Tensor)), "cpu")
        feeds = {name: _to_array(name, values[name]) for name in self.inputs}
        with self._lock:
            if self._session is None:
                self._session = self._start(feeds)
        arrays = self._session.run(self.outputs, feeds)
        return {
            name: torch.from_numpy(np.asarray(array)).to(device)
            for name, array in zip(self.outputs, arrays, strict=True)
        }

    def _start(self, feeds: dict[str, Array]) -> Any:
        del self._model.graph.input[:]
        for name, value in feeds.items():
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            self._model.graph.input.append(helper.make_tensor_value_info(name, kind, None))
        return session(self._model)


def session(model: onnx.ModelProto) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch has, and no warnings.

    Where it multiplies by a dequantized matrix it does so in float32, and does not round the input
    to 8 bits, as it would by default (MatMulNBits, accuracy level 4).
    """
    import onnxruntime  # an extra, as onnx is; the graph can be changed without it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _to_array(name: str, value: object) -> Array:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} must be a tensor, got {type(value).__name__}")
    return np.ascontiguousarray(value.detach().cpu().numpy()).reshape(tuple(value.shape))


def _needed(graph: Graph, layers: "dict[int, _Built | _Unfit]") -> set[int]:
    """Nodes that the outputs depend on, by id, without those that make parameters of layers."""
    wanted, found = list(graph.outputs), set()
    while wanted:
        node = graph.producers.get(wanted.pop())
        if node is None or id(node) in found:
            continue
        found.add(id(node))
        wanted += reads(node) if isinstance(layers[id(node)], _Unfit) else [node.input[0]]
    return found


def _build(graph: Graph, node: onnx.NodeProto) -> "_Built | _Unfit":
    """The layer of a node, with padding before and cropping after it; or why there is none."""
    if node.op_type not in KINDS or node.domain not in ("", "ai.onnx"):
        return _Unfit("")
    weight_name = node.input[1]
    found = [graph.constant(name) if name else None for name in node.input[1:]]
    if node.op_type == "MatMul" and found[0] is None:
        return _Unfit("")  # a product of two activations
    if any(v is None for v, name in zip(found, node.input[1:], strict=True) if name):
        return _Unfit("its parameters are not constant")
    if any(value is not None and value.dtype not in FLOATS for value in found):
        return _Unfit("its parameters are not float16, float32 or float64")
    if node.op_type == "BatchNormalization":
        return _batchnorm(node, found)
    if weight_name in graph.outputs:
        return _Unfit("its weight is an output of the graph")
    if not all(_reads_alike(node, reader) for reader in graph.readers(weight_name)):
        return _Unfit("its weight is read in another way as well")
    make = _linear if node.op_type in ("Gemm", "MatMul") else _convolution
    weight = found[0]
    assert weight is not None
    return make(node, weight, found[1] if len(found) > 1 else None)


def _reads_alike(node: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether two nodes see the same matrix in the weight that they share."""
    mine, others = attributes(node), attributes(other)
    return (
        (node.op_type, node.domain) == (other.op_type, other.domain)
        and [*other.input].count(node.input[1]) == 1
        and other.input[1] == node.input[1]
        and all(mine.get(name) == others.get(name) for name in ("transB", "group"))
    )


def _parameter(value: Array) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(value.astype(np.float32)))


def _batchnorm(node: onnx.NodeProto, found: Sequence[Any]) -> "_Built | _Unfit":
    options: dict[str, Any] = attributes(node)
    if options.get("training_mode", 0) or sum(map(bool, node.output)) > 1:
        return _Unfit("it is in training mode")
    if options.get("spatial", 1) != 1:
        return _Unfit("it has statistics per position")
    layer: Any = _BatchNormAnyRank(len(found[0]), options.get("epsilon", 1e-5))
    layer.weight, layer.bias = _parameter(found[0]), _parameter(found[1])
    layer.running_mean.copy_(torch.from_numpy(found[2].astype(np.float32)))
    layer.running_var.copy_(torch.from_numpy(found[3].astype(np.float32)))
    return layer, (), ()


def _linear(node: onnx.NodeProto, weight: Array, bias: Array | None) -> "_Built | _Unfit":
    options: dict[str, Any] = attributes(node)
    if weight.ndim != 2:
        return _Unfit(f"its weight has {weight.ndim} dimensions, not 2")
    if options.get("alpha", 1.0) != 1 or options.get("transA", 0):
        return _Unfit("alpha is not 1, or the input is transposed")
    if bias is not None and options.get("beta", 1.0) != 1:
        return _Unfit("beta is not 1")
    if not options.get("transB", 0):
        weight = weight.T
    if bias is not None and (bias.size != len(weight) or bias.shape[-1] != len(weight)):
        return _Unfit(f"its bias is {list(bias.shape)}, not one value per output")
    layer = nn.Linear(1, 1, bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = _parameter(np.ascontiguousarray(weight))
    if bias is not None:
        layer.bias = _parameter(bias.reshape(-1))
    return layer, (), ()


def _convolution(node: onnx.NodeProto, weight: Array, bias: Array | None) -> "_Built | _Unfit":
    options: dict[str, Any] = attributes(node)
    axes = weight.ndim - 2
    transposed = node.op_type == "ConvTranspose"
    if not 1 <= axes <= 3:
        return _Unfit(f"it has {axes} axes of space, not 1 to 3")
    auto_pad = options.get("auto_pad", "NOTSET")
    if transposed and (options.get("output_shape") or auto_pad not in ("NOTSET", "VALID")):
        return _Unfit("its padding depends on the size of its output")
    groups = options.get("group", 1)
    channels = [weight.shape[1] * groups, weight.shape[0]]  # in, out
    pads = options.get("pads") or [0] * 2 * axes
    if auto_pad != "NOTSET":
        pads = [0] * 2 * axes
    begin, end = pads[:axes], pads[axes:]
    if min(pads) < 0:
        return _Unfit("its padding is negative")
    common = tuple(map(min, zip(begin, end, strict=True)))
    if begin != end and not transposed:
        common = (0,) * axes
    kinds: Any = TRANSPOSED if transposed else CONVOLUTIONS
    extra = {"output_padding": options.get("output_padding") or 0} if transposed else {}
    layer = kinds[axes - 1](
        *(reversed(channels) if transposed else channels),
        weight.shape[2:],
        stride=tuple(options.get("strides") or (1,) * axes),
        padding=common,
        dilation=tuple(options.get("dilations") or (1,) * axes),
        groups=groups,
        bias=bias is not None,
        device="meta",  # no random weights that would be thrown away
        **extra,
    )
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return layer, _Same(layer, auto_pad == "SAME_UPPER"), ()
    rest: list[int] = []  # F.pad takes the last axis first
    for axis in reversed(range(axes)):
        rest += [begin[axis] - common[axis], end[axis] - common[axis]]
    return (layer, (), tuple(rest)) if transposed else (layer, tuple(rest), ())
