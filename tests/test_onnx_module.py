"""An ONNX graph as a module computes what onnxruntime computes, whatever its nodes look like."""

import copy
import weakref
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from sapq_triton.formats.onnx_module import OnnxModule, session


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    constants: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    dtype: int = onnx.TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, dtype, (None, *s[1:])) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8)
    )


def one(op: str, x: np.ndarray, *constants: np.ndarray, **attributes: Any) -> onnx.ModelProto:
    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], "node", **attributes)
    return model([node], {"x": x.shape}, dict(zip(names, constants, strict=True)))


def assert_same(graph: onnx.ModelProto, *inputs: np.ndarray, atol: float = 1e-5) -> OnnxModule:
    """The module computes what onnxruntime does; returned for more questions."""
    built = OnnxModule(graph)
    feeds = dict(zip(built.inputs, inputs, strict=True))
    expected = session(graph).run(None, feeds)
    with torch.no_grad():
        found = built(*map(torch.from_numpy, inputs))
    for a, e in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert a.numpy().dtype == e.dtype
        np.testing.assert_allclose(a.numpy(), e, rtol=1e-5, atol=atol)
    return built


X1, X2, X3 = random(2, 4, 11), random(2, 4, 7, 9), random(2, 4, 5, 6, 7)
BIAS = random(6, seed=2)
LAYERS = {
    "conv1d": one("Conv", X1, random(6, 4, 3), BIAS, strides=[2]),
    "conv2d": one("Conv", X2, random(6, 4, 3, 2), pads=[1, 0, 1, 0], dilations=[2, 1]),
    "conv3d": one("Conv", X3, random(6, 4, 2, 2, 2), BIAS),
    "grouped": one("Conv", X2, random(6, 2, 3, 3), BIAS, group=2, pads=[1, 1, 1, 1]),
    "depthwise": one("Conv", X2, random(4, 1, 3, 3), group=4),
    "asymmetric pads": one("Conv", X2, random(6, 4, 3, 3), pads=[0, 1, 2, 0], strides=[2, 2]),
    "upper": one("Conv", X2, random(6, 4, 4, 3), auto_pad="SAME_UPPER", strides=[2, 1]),
    "lower": one("Conv", X2, random(6, 4, 4, 3), auto_pad="SAME_LOWER", strides=[2, 3]),
    "valid": one("Conv", X2, random(6, 4, 3, 3), auto_pad="VALID"),
    "transposed": one("ConvTranspose", X2, random(4, 6, 3, 3), BIAS, strides=[2, 2]),
    "transposed, cropped": one(
        "ConvTranspose", X2, random(4, 6, 3, 4), pads=[1, 0, 0, 2], strides=[2, 3]
    ),
    "transposed, grouped": one(
        "ConvTranspose", X2, random(4, 3, 3, 3), BIAS, group=2, strides=[2, 2],
        output_padding=[1, 1], pads=[1, 1, 1, 1], dilations=[1, 2],
    ),
    "transposed 1d": one("ConvTranspose", X1, random(4, 6, 3), strides=[2], pads=[0, 1]),
    "gemm": one("Gemm", X1[:, 0], random(11, 6), BIAS),
    "gemm transposed": one("Gemm", X1[:, 0], random(6, 11), BIAS[None], transB=1),
    "gemm without bias": one("Gemm", X1[:, 0], random(6, 11), transB=1),
    "matmul": one("MatMul", X2, random(9, 6)),
    "batchnorm": one(
        "BatchNormalization", X2, *(random(4, seed=i) for i in range(3)),
        np.abs(random(4, seed=3)), epsilon=1e-3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    axes = len(LAYERS[name].graph.input[0].type.tensor_type.shape.dim)
    inputs = {2: X1[:, 0], 3: X1, 4: X2, 5: X3}[axes]
    built = assert_same(LAYERS[name], inputs)
    assert list(built.nodes) == ["node"] and not built.left_out


@pytest.mark.parametrize(
    "graph, reason",
    [
        (one("Gemm", X1[:, 0], random(11, 6), alpha=2.0), "alpha"),
        (one("Gemm", X1[:, 0], random(11, 6), BIAS, beta=0.5), "beta"),
        (one("Gemm", X1[:, 0], random(11, 6), random(2, 6)), "one value per output"),
        (one("ConvTranspose", X2, random(4, 6, 3, 3), output_shape=[9, 11]), "size of its output"),
        (one("MatMul", X2, random(2, 4, 9, 6)), "4 dimensions"),
    ],
    ids=["alpha", "beta", "bias", "output_shape", "batched"],
)  # fmt: skip
def test_forms_that_stay_in_a_segment(graph: onnx.ModelProto, reason: str) -> None:
    two = len(graph.graph.input[0].type.tensor_type.shape.dim) == 2
    built = assert_same(graph, X1[:, 0] if two else X2)
    assert not built.nodes and reason in built.left_out["node"]


def test_products_of_activations_and_computed_weights_are_no_layers() -> None:
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["p"], "product"),
        helper.make_node("Relu", ["b"], ["w"], "computed"),
        helper.make_node("Gemm", ["p", "w"], ["y"], "gemm"),
    ]
    built = assert_same(model(nodes, {"a": (3, 4), "b": (4, 4)}, {}), random(3, 4), random(4, 4))
    assert not built.nodes and list(built.left_out) == ["gemm"]


def residual(dtype: type = np.float32) -> onnx.ModelProto:
    """Layers with computed shapes between them, weights behind constant nodes, two outputs."""
    weight = random(4, 4, 3, 3).astype(dtype) / 4
    nodes = [
        helper.make_node("Constant", [], ["w1"], value=numpy_helper.from_array(weight)),
        helper.make_node("Conv", ["x", "w1"], ["a"], "first.conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["stored"], ["w2"]),
        helper.make_node("Conv", ["b", "w2", "bias"], ["c"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "x"], ["d"]),
        helper.make_node("Shape", ["d"], ["shape"], end=1),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Concat", ["shape", "rest"], ["two"], axis=0),
        helper.make_node("Reshape", ["d", "two"], ["flat"]),
        helper.make_node("Transpose", ["kept"], ["w3"], perm=[1, 0]),
        helper.make_node("MatMul", ["flat", "w3"], ["y"]),
    ]
    constants = {
        "stored": random(4, 4, 3, 3, seed=1).astype(dtype) / 4,
        "bias": random(4).astype(dtype),
        "kept": random(5, 4 * 7 * 9).astype(dtype) / 16,
    }
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(nodes, {"x": (2, 4, 7, 9)}, constants, ("y", "d"), dtype=kind)


def test_graph_of_segments_and_layers() -> None:
    built = assert_same(residual(), X2)
    assert list(built.nodes) == ["first_conv", "second", "MatMul_11"]
    assert built.nodes["second"].input[1] == "w2"


def test_float16_graph_has_float32_layers() -> None:
    built = assert_same(residual(np.float16), X2.astype(np.float16), atol=1e-2)
    assert built.get_submodule("second").weight.dtype == torch.float32


def test_subgraphs_see_values_from_outside() -> None:
    branch = lambda op, name: helper.make_graph(
        [helper.make_node(op, ["a"], [name])], name, [], [onnx.ValueInfoProto(name=name)]
    )
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("Conv", ["a", "w2"], ["b"], "next"),
        helper.make_node("ReduceSum", ["b"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["positive"], to=onnx.TensorProto.BOOL),
        helper.make_node(
            "If",
            ["positive"],
            ["y"],
            then_branch=branch("Relu", "t"),
            else_branch=branch("Neg", "e"),
        ),
    ]
    constants = {"w": random(4, 4, 3, 3), "w2": random(4, 4, 1, 1)}
    built = assert_same(model(nodes, {"x": X2.shape}, constants), X2)
    assert list(built.nodes) == ["conv", "next"]


def test_shared_weight_is_one_parameter() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w"], ["y"], "two"),
    ]
    built = assert_same(model(nodes, {"x": X2.shape}, {"w": random(4, 4, 3, 3)}), X2)
    assert built.get_submodule("one").weight is built.get_submodule("two").weight


def test_weight_that_is_also_read_otherwise_is_left() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "one"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "two", transB=1),
    ]
    built = assert_same(model(nodes, {"x": (2, 4)}, {"w": random(4, 4)}), random(2, 4))
    assert not built.nodes and set(built.left_out) == {"one", "two"}


def test_values_are_freed_after_their_last_reader() -> None:
    nodes: list[onnx.NodeProto] = []
    for i in range(3):
        nodes += [
            helper.make_node("Conv", [f"v{i}", "w"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"v{i + 1}"]),
        ]
    built = OnnxModule(model(nodes, {"v0": X2.shape}, {"w": random(4, 4, 3, 3)}, ("v3",)))
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    built.get_submodule("conv0").register_forward_hook(
        lambda layer, args, output: seen.append(weakref.ref(output))
    )
    built.get_submodule("conv2").register_forward_pre_hook(
        lambda layer, args: alive.append(seen[0]() is not None)
    )
    with torch.no_grad():
        built(torch.from_numpy(X2))
    assert alive == [False]


def test_copies_compute_the_same() -> None:
    built = OnnxModule(residual())
    x = torch.from_numpy(X2)
    with torch.no_grad():
        expected = built(x)
        found = copy.deepcopy(built)(x)
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


def test_constant_output_and_unknown_ranks() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    built = assert_same(model(nodes, {"x": X2.shape}, {"k": BIAS}, ("y", "k")), X2)
    assert not list(built.children())


@pytest.mark.parametrize("name", ["_steps", "_freed", "_fixed", "forward", "training"])
def test_nodes_may_have_names_of_attributes(name: str) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name)
    built = assert_same(model([node], {"x": X2.shape}, {"w": random(4, 4, 3, 3)}), X2)
    assert list(built.nodes) == [f"{name}_"]


def test_inputs_must_be_those_of_the_graph() -> None:
    built = OnnxModule(residual())
    x = torch.from_numpy(X2)
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"x": x}), ((), {"z": x})):
        with pytest.raises(ValueError, match="the graph takes"):
            built(*args, **kwargs)


def test_building_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    assert isinstance(OnnxModule(residual()).get_submodule("second"), nn.Conv2d)
    assert torch.equal(state, torch.get_rng_state())
