"""Layers as matrices: rows times the transposed weight matrix is what the module computes."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sapq_triton import layers

Factory = Callable[[], nn.Module]


def case(name: str, shape: tuple[int, ...], factory: Factory) -> Any:
    """A layer and the shape of its input."""
    return pytest.param(factory, shape, id=name)


def gpt2_layer() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module: nn.Module = conv1d(6, 5)
    nn.init.normal_(module.get_parameter("bias"))
    return module


CASES = [
    case("linear", (7, 6), lambda: nn.Linear(6, 5)),
    case("linear-one-row", (6,), lambda: nn.Linear(6, 5)),
    case("linear-three-axes", (2, 3, 6), lambda: nn.Linear(6, 5, bias=False)),
    case("gpt2", (2, 3, 5), gpt2_layer),
    case("conv1d", (2, 4, 11), lambda: nn.Conv1d(4, 6, 3)),
    case(
        "conv1d-all",
        (2, 4, 17),
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=3, dilation=2, groups=2),
    ),
    case("conv1d-same-even", (2, 4, 11), lambda: nn.Conv1d(4, 6, 4, padding="same")),
    case("conv1d-unbatched", (4, 11), lambda: nn.Conv1d(4, 6, 3, padding=1)),
    case("pointwise", (2, 4, 5, 6), lambda: nn.Conv2d(4, 6, 1)),
    case("pointwise-stride", (2, 4, 5, 6), lambda: nn.Conv2d(4, 6, 1, stride=2)),
    case("conv2d-stride", (2, 3, 9, 8), lambda: nn.Conv2d(3, 5, 3, stride=(2, 3))),
    case("conv2d-size", (2, 3, 9, 8), lambda: nn.Conv2d(3, 5, (1, 4), padding=(0, 2))),
    case("conv2d-dilation", (2, 3, 9, 11), lambda: nn.Conv2d(3, 5, 3, dilation=(2, 3))),
    case("conv2d-padding", (2, 3, 5, 6), lambda: nn.Conv2d(3, 5, 3, padding=(2, 1))),
    case("conv2d-valid", (2, 3, 5, 6), lambda: nn.Conv2d(3, 5, 3, padding="valid")),
    case(
        "conv2d-same-even",
        (2, 3, 7, 9),
        lambda: nn.Conv2d(3, 5, (2, 4), padding="same", dilation=(3, 1)),
    ),
    case("groups", (2, 6, 5, 6), lambda: nn.Conv2d(6, 9, 3, groups=3)),
    case("depthwise", (2, 4, 5, 6), lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    case("depthwise-times-two", (2, 4, 5, 6), lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4)),
    case("conv2d-unbatched", (4, 5, 6), lambda: nn.Conv2d(4, 6, 3, groups=2)),
    *[
        case(
            f"conv2d-{mode}",
            (2, 3, 6, 7),
            partial(nn.Conv2d, 3, 5, 3, stride=2, padding=(2, 1), padding_mode=mode),
        )
        for mode in ("reflect", "replicate", "circular")
    ],
    *[
        case(
            f"conv2d-same-{mode}",
            (2, 3, 6, 7),
            partial(nn.Conv2d, 3, 5, (4, 2), padding="same", padding_mode=mode),
        )
        for mode in ("reflect", "replicate", "circular")
    ],
    case(
        "conv1d-circular", (2, 4, 7), lambda: nn.Conv1d(4, 6, 4, padding=2, padding_mode="circular")
    ),
    case("conv3d", (2, 4, 5, 6, 7), lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 3), groups=2)),
    case(
        "conv3d-reflect",
        (2, 2, 5, 6, 7),
        lambda: nn.Conv3d(2, 3, 3, padding=(2, 1, 0), dilation=(1, 2, 2), padding_mode="reflect"),
    ),
    case("conv3d-same", (2, 2, 3, 4, 5), lambda: nn.Conv3d(2, 3, (2, 3, 4), padding="same")),
    case("conv3d-unbatched", (2, 5, 6, 7), lambda: nn.Conv3d(2, 3, 2)),
    case("transposed1d", (2, 4, 7), lambda: nn.ConvTranspose1d(4, 6, 4)),
    case(
        "transposed1d-all",
        (2, 4, 7),
        lambda: nn.ConvTranspose1d(
            4, 6, 4, stride=3, padding=2, output_padding=2, dilation=2, groups=2
        ),
    ),
    case("transposed2d-stride", (2, 3, 4, 5), lambda: nn.ConvTranspose2d(3, 5, 3, stride=(2, 3))),
    case(
        "transposed2d-output-padding",
        (2, 3, 4, 5),
        lambda: nn.ConvTranspose2d(3, 5, (3, 2), stride=3, padding=1, output_padding=(2, 1)),
    ),
    case(
        "transposed2d-dilation",
        (2, 3, 4, 5),
        lambda: nn.ConvTranspose2d(3, 5, 3, dilation=(2, 3), output_padding=(1, 2)),
    ),
    case("transposed2d-cropped", (2, 3, 6, 7), lambda: nn.ConvTranspose2d(3, 5, 2, padding=2)),
    case(
        "transposed2d-cropped-stride",
        (2, 3, 6, 7),
        lambda: nn.ConvTranspose2d(3, 5, 1, stride=2, padding=1, output_padding=1),
    ),
    case("transposed2d-groups", (2, 6, 4, 5), lambda: nn.ConvTranspose2d(6, 9, 3, groups=3)),
    case("transposed2d-depthwise", (2, 4, 4, 5), lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=4)),
    case("transposed2d-unbatched", (4, 4, 5), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)),
    case(
        "transposed3d",
        (2, 4, 3, 4, 5),
        lambda: nn.ConvTranspose3d(
            4, 6, (2, 3, 1), stride=(1, 2, 2), padding=(0, 1, 0), output_padding=(0, 1, 1), groups=2
        ),
    ),
]


def product(module: nn.Module, inputs: Tensor) -> Tensor:
    """rows(x) @ weight_matrix^T, in the shape of the module's output."""
    rows, window = layers.input_rows(module, inputs)
    matrix = layers.weight_matrix(module)
    if window is None:
        return (rows @ matrix[0].mT).reshape(*inputs.shape[:-1], -1)
    assert rows.ndim == 5
    space = window.positions(rows.shape[2:])
    groups, out, _ = matrix.shape
    result = (
        (matrix @ window.patches(rows)).reshape(groups * out, len(rows), *space).transpose(0, 1)
    )
    axes = len(module.kernel_size)  # type: ignore[arg-type]
    result = result.reshape(*result.shape[:2], *space[3 - axes :])
    return result if inputs.ndim == axes + 2 else result[0]


def without_bias(module: nn.Module) -> nn.Module:
    plain = copy.deepcopy(module)
    if plain.bias is not None:
        nn.init.zeros_(plain.get_parameter("bias"))
    return plain


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("factory", "shape"), CASES)
@torch.no_grad()
def test_rows_times_matrix_is_the_module(factory: Factory, shape: tuple[int, ...]) -> None:
    module, inputs = factory().double(), torch.randn(shape, dtype=torch.float64)
    expected = without_bias(module)(inputs)
    actual = product(module, inputs)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("factory", "shape"), CASES)
def test_stored_matrix_comes_back(factory: Factory, shape: tuple[int, ...]) -> None:
    module = factory()
    weight = module.get_parameter("weight")
    original, matrix = weight.detach().clone(), layers.weight_matrix(module).clone()
    nn.init.constant_(weight, torch.nan)
    layers.store_weight(module, matrix)
    assert module.weight is weight and weight.requires_grad
    assert torch.equal(weight, original)
    other = torch.randn_like(matrix)
    layers.store_weight(module, other)
    assert torch.equal(layers.weight_matrix(module), other)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("factory", "shape"), CASES)
def test_equal_geometry_means_equal_rows(factory: Factory, shape: tuple[int, ...]) -> None:
    module, inputs = factory(), torch.randn(shape)
    rows, window = layers.input_rows(module, inputs)
    for other_factory, other_shape in (case.values for case in CASES):
        other = other_factory()
        if other_shape != shape or type(other) is not type(module):
            continue
        other_rows, other_window = layers.input_rows(other, inputs)
        same = window == other_window and torch.equal(rows, other_rows)
        assert same or layers.row_geometry(module) != layers.row_geometry(other)


CONV = partial(nn.Conv2d, 4, 6, 3)
TRANSPOSED = partial(nn.ConvTranspose2d, 4, 6, 3, stride=2)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        pytest.param(lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 9), True, id="linear"),
        pytest.param(lambda: nn.Linear(5, 5), gpt2_layer, True, id="gpt2"),
        pytest.param(lambda: nn.Linear(6, 5), lambda: nn.Linear(7, 5), False, id="columns"),
        pytest.param(CONV, lambda: nn.Conv2d(4, 9, 3, bias=False), True, id="convolution"),
        pytest.param(CONV, lambda: CONV(stride=2), False, id="stride"),
        pytest.param(CONV, lambda: CONV(padding=1), False, id="padding"),
        pytest.param(CONV, lambda: CONV(dilation=2), False, id="dilation"),
        pytest.param(CONV, lambda: CONV(groups=2), False, id="groups"),
        pytest.param(lambda: CONV(groups=2), lambda: CONV(groups=2), True, id="equal-groups"),
        pytest.param(
            lambda: CONV(padding=1),
            lambda: CONV(padding=1, padding_mode="reflect"),
            False,
            id="padding-mode",
        ),
        pytest.param(
            lambda: nn.Conv2d(4, 6, (1, 9)), lambda: nn.Conv2d(4, 6, (9, 1)), False, id="kernel"
        ),
        pytest.param(
            lambda: nn.Linear(4, 6), lambda: nn.Conv2d(4, 6, 1), False, id="linear-or-pointwise"
        ),
        pytest.param(
            lambda: nn.Conv2d(4, 6, 1), lambda: nn.ConvTranspose2d(4, 6, 1), False, id="transposed"
        ),
        pytest.param(TRANSPOSED, TRANSPOSED, True, id="both-transposed"),
        pytest.param(TRANSPOSED, lambda: TRANSPOSED(output_padding=1), False, id="output-padding"),
    ],
)
def test_row_geometry(one: Factory, other: Factory, equal: bool) -> None:
    assert (layers.row_geometry(one()) == layers.row_geometry(other())) == equal


@torch.no_grad()
def test_layers_in_channels_last() -> None:
    module = nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False).double()
    module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    inputs = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(product(module, inputs), module(inputs), rtol=1e-12, atol=1e-12)
    matrix = layers.weight_matrix(module).clone()
    layers.store_weight(module, matrix * 2)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layers.weight_matrix(module), matrix * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factory", [lambda: nn.Linear(6, 5), lambda: nn.ConvTranspose1d(4, 6, 3)])
def test_a_stored_weight_keeps_its_dtype(factory: Factory, dtype: torch.dtype) -> None:
    module = factory().to(dtype)
    matrix = torch.randn(layers.weight_matrix(module).shape)
    layers.store_weight(module, matrix)
    assert module.weight.dtype == dtype
    assert torch.equal(layers.weight_matrix(module), matrix.to(dtype))


def test_mask_leaves_tokens_out() -> None:
    module, inputs = nn.Linear(6, 5), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    rows, window = layers.input_rows(module, inputs, mask)
    assert window is None
    assert torch.equal(rows, torch.cat([inputs[0, :2], inputs[1, :3]]))
    nothing, _ = layers.input_rows(module, inputs, torch.zeros_like(mask))
    assert nothing.shape == (0, 6)


@pytest.mark.parametrize("shape", [(8, 6), (2, 5, 6), (2, 1, 4, 6)])
def test_mask_of_another_shape_is_not_for_this_layer(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    rows, _ = layers.input_rows(nn.Linear(6, 5), torch.randn(shape), mask)
    assert rows.shape == (torch.Size(shape[:-1]).numel(), 6)


def test_mask_does_not_apply_to_convolutions() -> None:
    inputs = torch.randn(2, 4, 6)
    rows, _ = layers.input_rows(nn.Conv1d(4, 5, 3), inputs, torch.zeros(2, 4).bool())
    assert torch.equal(rows.flatten(), inputs.flatten())


class Subclass(nn.Linear):
    """Stands for the linear layers of other libraries."""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), "Linear"),
        (Subclass(2, 2), "Subclass"),
        (nn.Conv3d(2, 2, 1), "Conv3d"),
        (nn.ConvTranspose1d(2, 2, 1), "ConvTranspose1d"),
        (nn.BatchNorm2d(2), None),
        (nn.Embedding(2, 2), None),
        (nn.Bilinear(2, 2, 2), None),
        (nn.MultiheadAttention(2, 1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kind(module: nn.Module, expected: str | None) -> None:
    assert layers.kind(module) == expected


def test_kind_of_a_transformers_layer() -> None:
    assert layers.kind(gpt2_layer()) == "Conv1D"


def test_another_class_of_the_same_name_is_no_layer() -> None:
    assert layers.kind(type("Conv1D", (nn.Module,), {})()) is None


def linear_of(weight: Tensor) -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        pytest.param(
            lambda: nn.MultiheadAttention(4, 2).out_proj,
            "nn.MultiheadAttention reads its weight without calling it",
            id="attention",
        ),
        pytest.param(
            lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
            "its weight is computed from other parameters",
            id="weight-norm",
        ),
        pytest.param(
            lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
            "its weight is computed from other parameters",
            id="orthogonal",
        ),
        pytest.param(
            lambda: nn.Linear(2, 2, device="meta"),
            "its weight has no data (meta device)",
            id="meta",
        ),
        pytest.param(lambda: nn.LazyLinear(2), "its weight is not initialized", id="lazy"),
        pytest.param(
            lambda: nn.LazyConv2d(2, 3), "its weight is not initialized", id="lazy-convolution"
        ),
        pytest.param(
            lambda: linear_of(torch.ones(2, 2, dtype=torch.int8)),
            "its weight is torch.int8, not float16, bfloat16, float32 or float64",
            id="integer",
        ),
        pytest.param(
            lambda: linear_of(torch.ones(2, 2).to(torch.float8_e4m3fn)),
            "its weight is torch.float8_e4m3fn, not float16, bfloat16, float32 or float64",
            id="float8",
        ),
        pytest.param(
            lambda: linear_of(torch.ones(2, 2, dtype=torch.complex64)),
            "its weight is torch.complex64, not float16, bfloat16, float32 or float64",
            id="complex",
        ),
        pytest.param(lambda: linear_of(torch.ones(0, 2)), "its weight is empty", id="empty"),
    ],
)
def test_obstacle(factory: Factory, reason: str) -> None:
    module = factory()
    assert layers.kind(module) is not None
    assert layers.obstacle(module) == reason


@pytest.mark.parametrize(("factory", "shape"), CASES)
def test_no_obstacle(factory: Factory, shape: tuple[int, ...]) -> None:
    assert layers.obstacle(factory()) is None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(1),), {}), ((), {"input": torch.ones(1)}), ((), {"x": torch.ones(1)})],
    ids=["positional", "input", "x"],
)
def test_called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert layers.called_with("head", args, kwargs) == 1


@pytest.mark.parametrize(
    ("args", "kwargs", "got"), [(([1.0],), {}, "list"), ((), {}, "NoneType")], ids=["list", "none"]
)
def test_called_with_something_else(
    args: tuple[Any, ...], kwargs: dict[str, Any], got: str
) -> None:
    with pytest.raises(ValueError, match=f"'head' takes a tensor, but was called with {got}"):
        layers.called_with("head", args, kwargs)


def test_find_layers() -> None:
    shared, first = nn.Linear(2, 2), nn.Conv1d(2, 2, 1)
    model = nn.Sequential(nn.Sequential(first, nn.ReLU()), shared, shared)
    assert layers.find_layers(model) == {"0.0": first, "1": shared}
    assert layers.find_layers(shared) == {"": shared}
