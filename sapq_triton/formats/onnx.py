"""Quantized CNNs as ONNX files: int8 values and float32 scales in place of the float weights.

`quantize_onnx` quantizes a file, `export_onnx` writes a model that `quantize` has quantized.
Weights of 2 to 8 bits lie in int8 containers behind DequantizeLinear nodes, one scale per output
channel and zero point 0. With `activations` the activations are quantized as well, and onnxruntime
computes on integers. Needs the extra `onnx`: pip install 'sapq-triton[onnx]'.
"""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # what onnx.load raises
from torch import Tensor, nn

from ..layers import as_weight, find_layers, weight_matrix, window_size
from ..packed import PACKED, PackedWeight
from ..quantize import quantize
from ..report import Report
from ..spec import QuantSpec
from ..targets import find_targets
from .onnx_activations import ActivationDtype, RangeRule, check_options, quantize_activations
from .onnx_calibration import calibration_batches
from .onnx_graph import (
    BLOCK_OPSET,
    PARAMETERS,
    PER_AXIS_OPSET,
    Array,
    Graph,
    IntegerWeight,
    attributes,
    fold_batchnorm,
    fold_pads,
    make_gammas_positive,
    names,
    set_parameter,
    with_opset,
)
from .onnx_module import OnnxModule, session

METADATA = "sapq_triton"  # key in metadata_props: what this package wrote, as JSON
EXPORT_OPSET = 20


def quantize_onnx(
    path: str | Path,
    images: Any,
    spec: QuantSpec,
    out: str | Path,
    *,
    activations: ActivationDtype | None = None,
    ranges: RangeRule = "mse",
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 255.0,
    size: int | None = None,
    batch: int = 16,
    **options: Any,
) -> Report:
    """Quantize an ONNX file: only weights change, and with `activations` what layers compute on.

    path: the model, float32 or float16. images: what calibrates, see `calibration_batches`, which
    also explains mean, std, size and batch. spec, options: as in `quantize`; layers have the names
    of their nodes, with "_" for ".". out: the file to write; an old one stays intact on failure.
    activations: "uint8" or "int8", None leaves them in floating point; ranges: how their ranges
    are found, see `quantize_activations`.

    A BatchNormalization that alone reads a quantized layer is folded into it, and with
    `activations` so is a Pad. With 8 bits, channels before a negative gamma are negated first, so
    that this needs no negative of -128; the codes of the report are those. All other nodes and
    names stay; initializers that the file lists as inputs too are no inputs any more. What
    was not quantized is in `Report.skipped`, and what was not done as asked in the notes of the
    layer.

    onnxruntime runs a MatMul, or a Gemm without transB, on such a weight as MatMulNBits, which
    rounds its input to 8 bits unless the session has the configuration entry
    "session.qdq_matmulnbits_accuracy_level" = "1".

    ValueError for a file that is no ONNX model, a layer whose grid int8 cannot hold, and whatever
    `quantize` refuses.
    """
    _check_target(out)
    if activations is not None:
        check_options(activations, ranges)
    specs = [spec, *dict(options.get("overrides") or {}).values()]
    for each in specs:
        _check_spec(each)
    model = with_opset(read_model(path), PER_AXIS_OPSET)
    batches = calibration_batches(model, images, mean=mean, std=std, size=size, batch=batch)
    _check_runs(path, model, batches[0])
    if any(getattr(each, "bits", 0) == 8 for each in specs):
        turned = Graph(model)
        make_gammas_positive(turned)
        model = turned.model()
    module = OnnxModule(model)
    if activations is not None:
        _check_float32(Graph(model), module)
    _check_groups(module, spec, options)
    tensors = [{name: torch.from_numpy(part) for name, part in one.items()} for one in batches]
    report = quantize(module, tensors, spec, **options)

    weights, found = {}, {}
    for layer in report.layers:
        node = module.nodes[layer.name]
        found[_called(node)] = layer.name
        values = layer.codes, layer.scale, layer.zero_point
        weight = integer_weight(layer.name, module.get_submodule(layer.name), *values, layer.spec)
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and "transB" not in _true(node)):
            weight = _transposed(weight)
        weights[node.input[1]] = weight
    graph = Graph(model, _needed_opset(weights))
    for name in report.corrected:
        _store_correction(graph, module, name)
    kept, left_out = _rewrite(graph, weights, batches, activations, ranges)
    _write(graph, weights, Path(out))
    layers = tuple(
        replace(x, notes=(*x.notes, *(r for n, r in left_out.items() if found.get(n) == x.name)))
        for x in report.layers
    )
    skipped = {**report.skipped, **module.left_out}
    skipped |= {name: f"not folded: {reason}" for name, reason in kept.items()}
    skipped |= {n: r for n, r in left_out.items() if n not in found}  # share another one's weight
    return replace(report, layers=layers, skipped=skipped)


def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    report: Report | None = None,
    batches: Iterable[Any] = (),
    activations: ActivationDtype | None = None,
    ranges: RangeRule = "mse",
    dynamic_batch: bool = True,
) -> dict[str, str]:
    """Write a quantized model as an ONNX file; returns what was not done as asked, name to reason.

    model: with packed layers (`quantize(..., pack=True)`), or with dequantized weights and the
    `report` of their quantization. example: the inputs of one call, by position; with
    `dynamic_batch` their first axis may have any size in the file. batches: inputs like `example`
    for the ranges of the `activations`, which see `quantize_onnx`. Needs onnxscript.

    BatchNormalization is folded as in `quantize_onnx`, but one with a negative gamma over a weight
    of -128, which only 8 bits have, stays and costs time: there, quantize the file of the model
    (`exported_graph`) instead.

    ValueError where weights no longer are what the report says, a grid does not fit into int8, or
    the exported graph does not read a weight as it is.
    """
    _check_target(path)
    if activations is not None:
        check_options(activations, ranges)
    grids = _grids(model, report)
    for *_, spec in grids.values():
        _check_spec(spec)
    integers = {name: integer_weight(name, *grid) for name, grid in grids.items()}
    plain = _plain_copy(model)
    opset = max(EXPORT_OPSET, _needed_opset(integers))
    graph = Graph(exported_graph(plain, example, dynamic_batch, opset))
    weights: dict[str, IntegerWeight] = {}
    for name, weight in integers.items():
        same = plain.get_submodule(name).weight
        known = [n for n, p in plain.named_parameters(remove_duplicate=False) if p is same]
        found = [n for n in known if n in graph.initializers]
        if not found:
            raise ValueError(f"the exported graph does not read the weight of {name!r} as it is")
        if activations is None:
            weights[found[0]] = weight
        else:
            read, weight = _past_transpose(graph, found[0], weight)
            weights[read] = weight
    feeds = [
        dict(zip(graph.inputs, (x.numpy() for x in _as_tuple(one)), strict=True)) for one in batches
    ]
    kept, left_out = _rewrite(graph, weights, feeds, activations, ranges)
    _write(graph, weights, Path(path))
    return {name: f"not folded: {reason}" for name, reason in kept.items()} | left_out


def read_model(path: str | Path) -> onnx.ModelProto:
    """An ONNX model whose graph is well formed; ValueError for any other file."""
    try:
        model = onnx.load(str(path))
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ONNX model, or is truncated: {error}") from error
    except onnx.checker.ValidationError as error:  # of data that lies in other files
        raise ValueError(f"{path} is no valid ONNX model: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise ValueError(f"{path} is no ONNX model, or is truncated: it has no nodes")
    if any(isinstance(name, bytes) for name in names(model.graph)):  # as protobuf leaves them
        raise ValueError(f"{path} is no valid ONNX model: it has names that are not UTF-8")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid ONNX model: {error}") from error
    return model


def _check_runs(path: str | Path, model: onnx.ModelProto, batch: Mapping[str, Array]) -> None:
    """ValueError for a model that onnxruntime refuses, as shapes that do not fit: it says why."""
    try:
        session(model).run(None, dict(batch))
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"onnxruntime cannot run {path}: {error}") from error


# --- weights --------------------------------------------------------------------------------------


def integer_weight(
    name: str, layer: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> IntegerWeight:
    """Codes of a layer as int8 in the layout of its weight, with zero point 0.

    codes [B, R, C], scale and zero_point [B, R, G], as in `LayerReport`. ValueError where a code
    minus its zero point does not fit into int8, or a group of columns is no block along an axis,
    and for a codebook.
    """
    _check_codebook(spec)
    values = codes.to(torch.int16).unflatten(-1, (scale.shape[-1], -1))
    values = (values - zero_point.to(torch.int16)[..., None]).flatten(-2)
    if int(values.min()) < -128 or int(values.max()) > 127:
        raise ValueError(
            f"{name!r}: codes minus zero points reach from {int(values.min())} to "
            f"{int(values.max())}, but an int8 container holds -128 to 127; legal are "
            "symmetric=True at up to 8 bits, and asymmetric grids of up to 7 bits"
        )
    stored = as_weight(layer, values.to(torch.int8)).numpy()
    columns = values.shape[-1] // scale.shape[-1]  # of one group
    scales = as_weight(layer, scale.float().repeat_interleave(columns, -1)).numpy()
    axis, inner = (1, 0) if getattr(layer, "transposed", False) else (0, 1)
    first = scales[tuple(slice(None) if a == axis else slice(1) for a in range(scales.ndim))]
    if (scales == first).all():
        return IntegerWeight(stored, first.reshape(-1).copy(), axis, 0, spec.bits)
    block = _block(name, layer, columns)
    kept = np.ascontiguousarray(scales.take(range(0, stored.shape[inner], block), inner))
    return IntegerWeight(stored, kept, inner, block, spec.bits)


def _block(name: str, layer: Any, columns: int) -> int:
    """Input channels of a group of columns, which are whole ones."""
    window = window_size(layer)
    block, rest = divmod(columns, window)
    if rest:
        raise ValueError(
            f"{name!r}: groups of {columns} columns do not hold whole input channels of "
            f"{window} weights each; legal are -1 and multiples of {window}"
        )
    return block


def _needed_opset(weights: Mapping[str, IntegerWeight]) -> int:
    return BLOCK_OPSET if any(weight.block for weight in weights.values()) else PER_AXIS_OPSET


def _check_codebook(spec: QuantSpec) -> None:
    if spec.codebook != "int":
        raise ValueError(
            f"ONNX files hold the integers of a grid, not the levels of codebook {spec.codebook!r}"
        )


def _check_spec(spec: object) -> None:
    """Refuse before the work what cannot be stored after it; `quantize` refuses other types."""
    if not isinstance(spec, QuantSpec):
        return
    _check_codebook(spec)
    if spec.bits == 8 and not spec.symmetric:
        raise ValueError(
            f"{spec} does not fit into int8 with zero point 0; legal are symmetric=True at up to "
            "8 bits, and asymmetric grids of up to 7 bits"
        )


def _check_groups(module: OnnxModule, spec: QuantSpec, options: dict[str, Any]) -> None:
    """The same for groups, of the layers that `quantize` will find with these options."""
    skip, overrides = options.get("skip", ()), dict(options.get("overrides") or {})
    specs = (spec, *overrides.values())
    if isinstance(skip, str) or not all(isinstance(each, QuantSpec) for each in specs):
        return
    options["skip"] = list(skip)  # maybe of an iterator
    targets, _ = find_targets(module, spec, options["skip"], overrides)
    for name, target in targets.items():
        columns = target.spec.columns_per_group(weight_matrix(target.module).shape[2])
        _block(name, target.module, columns)


def _transposed(weight: IntegerWeight) -> IntegerWeight:
    scale = np.ascontiguousarray(weight.scale.T) if weight.block else weight.scale
    values = np.ascontiguousarray(weight.values.T)
    return IntegerWeight(values, scale, 1 - weight.axis, weight.block, weight.bits)


def _check_float32(graph: Graph, module: OnnxModule) -> None:
    for name, node in module.nodes.items():
        weight = graph.constant(node.input[1])
        if weight is not None and weight.dtype != np.float32:
            raise ValueError(f"activations need a graph in float32, {name!r} is {weight.dtype}")


def _called(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _true(node: onnx.NodeProto) -> set[str]:
    return {name for name, value in attributes(node).items() if value}


def _past_transpose(graph: Graph, name: str, weight: IntegerWeight) -> tuple[str, IntegerWeight]:
    """The weight of a linear layer as its product reads it, where that is behind a Transpose."""
    reader = graph.only_reader(name)
    if reader is None or reader.op_type != "Transpose" or weight.values.ndim != 2:
        return name, weight
    return reader.output[0], _transposed(weight)


Grid = tuple[nn.Module, Tensor, Tensor, Tensor, QuantSpec]


def _grids(model: nn.Module, report: Report | None) -> dict[str, Grid]:
    """Layer, codes, scale, zero point and spec of each quantized layer, by name."""
    found: dict[str, Grid] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedWeight):
            groups = getattr(layer, "groups", 1)
            codes, scale, zero_point = (
                part.cpu().unflatten(0, (groups, -1))
                for part in (layer.codes(), layer.scale.float(), layer.zero_points())
            )
            found[name] = layer, codes, scale, zero_point, layer.spec
    if found:
        return found
    if report is None:
        raise ValueError("the model has no packed layers: pass the report of its quantization")
    layers = find_layers(model)
    for each in report.layers:
        if each.name not in layers:
            raise ValueError(f"the report has a layer {each.name!r} that the model has not")
        weight = layers[each.name].weight.detach().cpu()
        if not torch.equal(weight, as_weight(layers[each.name], each.dequantize()).to(weight)):
            raise ValueError(f"the weight of {each.name!r} is not what the report says")
        found[each.name] = layers[each.name], each.codes, each.scale, each.zero_point, each.spec
    return found


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, with weights in place of codes."""
    plain_class = {packed: plain for plain, packed in PACKED.items()}
    made = copy.deepcopy(model).cpu().eval()
    for layer in made.modules():
        if isinstance(layer, PackedWeight):
            weight = nn.Parameter(layer.dequantize())
            for name in ("qweight", "scale", "qzeros"):
                del layer._buffers[name]
            layer.__class__ = plain_class[type(layer)]  # type: ignore[assignment]
            layer.register_parameter("weight", weight)
    return made


def _as_tuple(batch: Any) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in (batch if isinstance(batch, tuple | list) else (batch,)))


def exported_graph(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    dynamic_batch: bool = True,
    opset: int = EXPORT_OPSET,
) -> onnx.ModelProto:
    """The graph of a module, its parameters under their own names and none of them folded.

    Arguments as in `export_onnx`; a plain model in evaluation mode.
    """
    from onnxscript import optimizer  # part of the extra, only needed here

    example = _as_tuple(example)
    if dynamic_batch:  # a batch of one would be taken for a constant
        example = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in example)
    axes = tuple({0: torch.export.Dim.AUTO} for _ in example) if dynamic_batch else None
    with warnings.catch_warnings(), torch.no_grad():
        for category in (FutureWarning, DeprecationWarning):  # of the exporter about itself
            warnings.simplefilter("ignore", category)
        program = torch.onnx.export(
            model, example, dynamo=True, optimize=False, verbose=False, opset_version=opset,
            dynamic_shapes=axes,
        )  # fmt: skip
        assert program is not None
        optimizer.fold_constants(
            program.model, should_fold=lambda node: False if node.op_type == "Transpose" else None
        )
        optimizer.remove_unused_nodes(program.model)
        exported = program.model_proto
    graph = exported.graph
    described = [exported, graph, *graph.node, *graph.value_info, *graph.input, *graph.output]
    for item in (*described, *graph.initializer):
        item.ClearField("metadata_props")  # stack traces, with the paths of the user's files
        item.ClearField("doc_string")
    return exported


# --- the graph ------------------------------------------------------------------------------------


def _store_correction(graph: Graph, module: OnnxModule, name: str) -> None:
    """Statistics of a BatchNormalization, or the bias of a layer, that `quantize` has changed."""
    node = graph.producers[module.nodes[name].output[0]]  # of the graph, not of the module's own
    layer: Any = module.get_submodule(name)
    changed = {2: layer.bias}
    if node.op_type == "BatchNormalization":
        changed = {3: layer.running_mean, 4: layer.running_var}
    for place, tensor in changed.items():
        old = graph.constant(node.input[place])
        assert old is not None and node.op_type in PARAMETERS
        value = tensor.detach().numpy().reshape(old.shape).astype(old.dtype)
        set_parameter(graph, node, place, value)


def _rewrite(
    graph: Graph,
    weights: dict[str, IntegerWeight],
    batches: Sequence[Mapping[str, Array]],
    activations: ActivationDtype | None,
    ranges: RangeRule,
) -> tuple[dict[str, str], dict[str, str]]:
    """Put integers into the graph: BatchNorms that stay, and layers that compute on floats."""
    kept = fold_batchnorm(graph, weights)
    if activations is not None:
        fold_pads(graph)
    for name, weight in weights.items():
        graph.set_weight(name, weight)
    if activations is None:
        return kept, {}
    return kept, quantize_activations(graph, weights, batches, activations, ranges)


# --- files ----------------------------------------------------------------------------------------


def _check_target(path: str | Path) -> None:
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder to write {Path(path).name} into")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, not a file to write")


def _digest(weights: Mapping[str, IntegerWeight]) -> str:
    """SHA-256 of the names, integers and scales."""
    total = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        total.update(f"{name} {weight.values.shape} {weight.axis} {weight.block}\n".encode())
        total.update(weight.values.tobytes() + weight.scale.tobytes())
    return total.hexdigest()


def _write(graph: Graph, weights: Mapping[str, IntegerWeight], path: Path) -> None:
    """Write, read back and compare, and only then let the file take its place."""
    about = {
        "bits": {name: weight.bits for name, weight in weights.items()},
        "sha256": _digest(weights),
    }
    data = graph.model({METADATA: json.dumps(about)}).SerializeToString()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _compare(partial, weights)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _compare(path: Path, weights: Mapping[str, IntegerWeight]) -> None:
    """ValueError where a file does not hold these integers and scales."""
    stored = {item.name: item.weight for item in inspect_onnx(path)}
    for name, weight in weights.items():
        back = stored.get(name)
        if (
            back is None
            or (back.axis, back.block) != (weight.axis, weight.block)
            or not np.array_equal(back.values, weight.values)
            or not np.array_equal(back.scale, weight.scale)
        ):
            raise ValueError(f"{path}: the weight {name!r} was not read back as it was written")


@dataclass(frozen=True)
class OnnxWeight:
    """A quantized weight of a file. name: of the value that the layer reads."""

    name: str
    layer: str
    weight: IntegerWeight

    def __str__(self) -> str:
        shape = "x".join(map(str, self.weight.values.shape))
        return f"{self.layer:16} {shape:>18} {self.weight.bits} bits in int8  {self.name}"


def inspect_onnx(path: str | Path) -> list[OnnxWeight]:
    """The quantized weights of a file that this module wrote.

    ValueError for a file that is no ONNX model or was not written here, and where integers or
    scales are not those that were saved.
    """
    graph = Graph(read_model(path))
    found = {item.key: item.value for item in graph.source.metadata_props}
    try:
        about = json.loads(found[METADATA])
        bits = {name: int(count) for name, count in sorted(about["bits"].items())}
        digest = about["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was not written by sapq_triton: {error!r} in its metadata"
        ) from error
    items = [OnnxWeight(name, *_stored_weight(path, graph, name, bits[name])) for name in bits]
    if _digest({item.name: item.weight for item in items}) != digest:
        raise ValueError(f"{path}: integers or scales are not those that were saved")
    return items


def _stored_weight(path: object, graph: Graph, name: str, bits: int) -> tuple[str, IntegerWeight]:
    node = graph.producers.get(name)
    if node is not None and node.op_type == "Cast":  # of a float16 graph
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        raise ValueError(f"{path}: no DequantizeLinear makes the weight {name!r}")
    parts = [graph.constant(value) for value in node.input]
    values, scale, zero_point = (parts + [None] * 3)[:3]
    options: dict[str, Any] = attributes(node)
    if values is None or scale is None or values.dtype != np.int8 or scale.dtype != np.float32:
        raise ValueError(f"{path}: {name!r} is not int8 with float32 scales")
    if len(parts) > 2 and (zero_point is None or zero_point.dtype != np.int8 or zero_point.any()):
        raise ValueError(f"{path}: the zero points of {name!r} are not 0")
    largest = int(np.abs(values.astype(np.int16)).max(initial=0))
    if not 2 <= bits <= 8 or largest >= 2**bits:
        raise ValueError(f"{path}: {name!r} holds {largest}, which {bits} bits do not reach")
    readers = graph.readers(name)
    kind = readers[0].op_type if readers else "-"
    block = int(options.get("block_size", 0))
    return kind, IntegerWeight(values, scale, int(options.get("axis", 1)), block, bits)
