"""Integers in place of float weights: exact on the codes, whatever is folded into them."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from sapq_triton import QuantSpec, dequantize
from sapq_triton.formats.onnx import integer_weight
from sapq_triton.formats.onnx_graph import (
    Graph,
    IntegerWeight,
    fold_batchnorm,
    fold_pads,
    make_gammas_positive,
)
from sapq_triton.formats.onnx_module import session
from sapq_triton.layers import as_weight, weight_matrix
from sapq_triton.ops import quantize_groups

CASES: dict[str, tuple[nn.Module, int]] = {  # a group size of whole input channels beside -1
    "conv": (nn.Conv2d(4, 6, 3), 18),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), 9),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), 3),
    "linear": (nn.Linear(12, 5), 4),
    "transposed": (nn.ConvTranspose2d(4, 6, (2, 3)), 12),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2), 4),
}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(layer: Any, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    matrix = weight_matrix(layer)
    size = spec.columns_per_group(matrix.shape[2])
    codes, scale, zero_point = quantize_groups(
        matrix, size, spec.qmax, spec.symmetric, spec.shrink, backend="reference"
    )
    return codes, scale, zero_point.to(torch.uint8)


@pytest.mark.parametrize("grouped", [False, True], ids=["channel", "groups"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(b, symmetric=s) for b in range(2, 9) for s in (True, False) if b < 8 or s],
    ids=lambda spec: f"{spec.bits}{'s' if spec.symmetric else 'a'}",
)
def test_integers_are_codes_minus_zero_points(name: str, spec: QuantSpec, grouped: bool) -> None:
    layer, size = CASES[name]
    if grouped:
        spec = QuantSpec(spec.bits, size, spec.symmetric)
    codes, scale, zero_point = rounded(layer, spec)
    stored = integer_weight("layer", layer, codes, scale, zero_point, spec)
    expected = as_weight(layer, dequantize(codes, scale, zero_point.float()))
    assert stored.values.dtype == np.int8 and stored.bits == spec.bits
    np.testing.assert_array_equal(stored.dequantize(), expected.numpy())


def test_one_scale_per_channel_lies_on_the_axis_that_runtimes_merge() -> None:
    axes = {}
    for name, (layer, _) in CASES.items():
        stored = integer_weight(name, layer, *rounded(layer, QuantSpec()), QuantSpec())
        axes[name] = stored.axis, stored.block
    assert axes == {
        "conv": (0, 0),
        "grouped": (0, 0),
        "depthwise": (0, 0),
        "linear": (0, 0),
        "transposed": (1, 0),
        "transposed, grouped": (0, 2),  # axis 1 has the channels of one group only
    }


def test_eight_bits_that_do_not_fit_are_refused() -> None:
    layer = nn.Linear(4, 2)
    codes = torch.tensor([[[0, 255, 7, 9], [1, 2, 3, 4]]], dtype=torch.uint8)
    zero_point = torch.tensor([[[3], [200]]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"-199 to 252.*symmetric=True.*7 bits"):
        integer_weight("a", layer, codes, torch.ones(1, 2, 1), zero_point, QuantSpec(8))


def test_groups_across_channels_are_refused() -> None:
    layer, spec = nn.Conv2d(4, 6, 3), QuantSpec(4, 12)
    with pytest.raises(ValueError, match=r"12 columns.*-1 and multiples of 9"):
        integer_weight("a", layer, *rounded(layer, spec), spec)


# --- factors --------------------------------------------------------------------------------------


def test_a_factor_goes_into_the_scale_and_its_sign_into_the_integers() -> None:
    values = np.array([[1, -127, 5], [2, -128, 0], [3, 4, 5], [0, 0, 0]], np.int8)
    weight = IntegerWeight(values, np.float32([0.5, 0.25, 2, 1]), 0)
    times = weight.times(np.array([[-3.0], [2.0], [0.0], [1e-30]]))
    assert times is not None
    assert times.values.tolist() == [[-1, 127, -5], [2, -128, 0], [0, 0, 0], [0, 0, 0]]
    assert times.scale.tolist() == [1.5, 0.5, 2, 1]  # nothing but zeros: any scale will do


def test_minus_128_has_no_negative() -> None:
    weight = IntegerWeight(np.array([[-128, 1]], np.int8), np.float32([1]), 0)
    assert weight.times(np.array([[-1.0]])) is None
    assert weight.times(np.array([[0.0]])) is not None


# --- folding --------------------------------------------------------------------------------------


def with_batchnorm(
    op: str, weight: np.ndarray, channels: int, bias: bool, **attributes: Any
) -> onnx.ModelProto:
    """A layer, a BatchNormalization with gammas of both signs, and a Relu."""
    constants = {"w": weight, "gamma": random(channels, seed=1), "beta": random(channels, seed=2)}
    constants |= {"mean": random(channels, seed=3), "var": np.abs(random(channels, seed=4)) + 0.1}
    if bias:
        constants["b"] = random(channels, seed=5)
    nodes = [
        helper.make_node(op, ["x", "w", *(["b"] if bias else [])], ["a"], "layer", **attributes),
        helper.make_node(
            "BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["n"], "norm", epsilon=1e-3
        ),
        helper.make_node("Relu", ["n"], ["y"], "relu"),
    ]
    shape = (None, 8) if op == "Gemm" else (None, 4, None, None)
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (None, 6, *shape[2:]))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


FOLDS = {
    "conv": ("Conv", (6, 4, 3, 3), 6, {}, (0, 0, 6)),
    "grouped": ("Conv", (6, 2, 3, 3), 6, {"group": 2}, (0, 0, 6)),
    "blocks": ("Conv", (6, 4, 3, 3), 6, {}, (1, 2, (6, 2, 3, 3))),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), 6, {}, (1, 0, 6)),
    "transposed, grouped": ("ConvTranspose", (4, 3, 3, 3), 6, {"group": 2}, (0, 2, (2, 3, 3, 3))),
    "gemm": ("Gemm", (6, 8), 6, {"transB": 1}, (0, 0, 6)),
    "gemm, not transposed": ("Gemm", (8, 6), 6, {}, (1, 0, 6)),
    "gemm, scaled": ("Gemm", (6, 8), 6, {"transB": 1, "alpha": 2.0, "beta": 0.5}, (0, 0, 6)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", FOLDS)
def test_batchnorm_is_folded_into_integers(name: str, bias: bool) -> None:
    op, shape, channels, attributes, (axis, block, scales) = FOLDS[name]
    values = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    scale = np.abs(random(*(scales if block else (scales,)))) / 64 + 1e-3
    weight = IntegerWeight(values, scale, axis, block)
    model = with_batchnorm(op, weight.dequantize(), channels, bias, **attributes)
    x = random(2, 8) if op == "Gemm" else random(2, 4, 6, 7)
    expected = session(model).run(None, {"x": x})[0]

    graph, weights = Graph(model), {"w": weight}
    assert not fold_batchnorm(graph, weights)
    graph.set_weight("w", weights["w"])
    folded = graph.model()
    onnx.checker.check_model(folded)
    assert [node.op_type for node in folded.graph.node] == ["DequantizeLinear", op, "Relu"]
    assert np.array_equal(np.abs(weights["w"].values), np.abs(values))  # exact on the codes
    assert (weights["w"].values != values).any()
    found = session(folded).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    kept = {tensor.name for tensor in folded.graph.initializer}
    assert not kept & {"gamma", "beta", "mean", "var", "w"}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", [name for name in FOLDS if name != "blocks"])
def test_negative_gammas_go_into_the_weights(name: str, bias: bool) -> None:
    op, shape, channels, attributes, _ = FOLDS[name]
    model = with_batchnorm(op, random(*shape), channels, bias, **attributes)
    graph = Graph(model)
    make_gammas_positive(graph)
    gammas = [numpy_helper.to_array(m.graph.initializer[1]) for m in (model, graph.model())]
    assert (gammas[0] < 0).any() and np.array_equal(np.abs(gammas[0]), gammas[1])
    x = random(2, 8) if op == "Gemm" else random(2, 4, 6, 7)
    found, expected = (session(m).run(None, {"x": x})[0] for m in (graph.model(), model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["-128", "output", "reader", "shared", "computed"])
def test_batchnorm_that_cannot_be_folded_stays(what: str) -> None:
    values = np.random.default_rng(0).integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)
    weight = IntegerWeight(values, np.full(6, 0.01, np.float32), 0)
    model = with_batchnorm("Conv", weight.dequantize(), 6, True)
    reason = "read elsewhere"
    if what == "-128":
        values[:, 0, 0, 0] = -128
        reason = "-128"
    if what == "output":
        model.graph.output.append(onnx.ValueInfoProto(name="a"))
    if what == "reader":
        model.graph.node.append(helper.make_node("Neg", ["a"], ["z"]))
        model.graph.output.append(onnx.ValueInfoProto(name="z"))
    if what == "shared":  # with a layer that no BatchNormalization follows
        model.graph.node.append(helper.make_node("Conv", ["x", "w"], ["z"]))
        model.graph.output.append(onnx.ValueInfoProto(name="z"))
    if what == "computed":
        model.graph.node.insert(0, helper.make_node("Abs", ["var"], ["positive"]))
        model.graph.node[2].input[4] = "positive"
        reason = "not constant"
    weight = IntegerWeight(values, weight.scale, 0)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.dequantize(), "w"))
    x = random(2, 4, 6, 7)
    expected = session(model).run(None, {"x": x})
    graph, weights = Graph(model), {"w": weight}
    kept = fold_batchnorm(graph, weights)
    assert list(kept) == ["norm"] and reason in kept["norm"]
    graph.set_weight("w", weights["w"])
    for found, wanted in zip(session(graph.model()).run(None, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def padded(pads: list[int], value: float, **attributes: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Pad", ["x", "pads", "value"], ["p"], "pad", **attributes),
        helper.make_node("Conv", ["p", "w"], ["y"], "conv", pads=[1, 0, 0, 2]),
    ]
    constants = {"pads": np.array(pads), "value": np.float32(value), "w": random(6, 4, 3, 3)}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (None, 4, None, None))],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    "model, folds",
    [
        (padded([0, 0, 0, 1, 0, 0, 2, 1], 0), True),
        (padded([0, 0, 0, 1, 0, 0, 2, 1], 0.5), False),
        (padded([0, 0, -1, 1, 0, 0, 2, 1], 0), False),
        (padded([1, 0, 0, 1, 0, 0, 2, 1], 0), False),
        (padded([0, 0, 0, 1, 0, 0, 2, 1], 0, mode="edge"), False),
    ],
    ids=["zeros", "value", "negative", "batch", "edge"],
)
def test_pads_of_zeros_are_folded(model: onnx.ModelProto, folds: bool) -> None:
    x, graph = random(2, 4, 6, 7), Graph(model)
    expected = session(model).run(None, {"x": x})[0]
    fold_pads(graph)
    assert ("Pad" in {node.op_type for node in graph.nodes}) is not folds
    np.testing.assert_allclose(session(graph.model()).run(None, {"x": x})[0], expected, atol=1e-5)


# --- versions -------------------------------------------------------------------------------------


def test_older_operators_are_converted() -> None:
    model = with_batchnorm("Conv", random(6, 4, 3, 3), 6, True)
    model.opset_import[0].version, model.ir_version = 9, 4
    assert Graph(model).opset == 13
    assert Graph(model).source.ir_version >= 7


def test_operators_that_cannot_be_converted_are_refused() -> None:
    model = with_batchnorm("Conv", random(6, 4, 3, 3), 6, True)
    model.opset_import[0].version = 9
    model.graph.node[2].op_type = "NoSuchOperator"
    with pytest.raises(ValueError, match="opset 9, 13 is needed"):
        Graph(model)
