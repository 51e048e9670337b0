"""Packed layers: the outputs of the plain layer with the dequantized weight, in less memory."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, layers, ops, packed
from sapq_triton import quantize as quantize_with_bar
from sapq_triton.packed import PackedWeight, QuantConv2d, QuantLinear, pack_weight, to_packed
from sapq_triton.packing import words

Factory = Callable[[], nn.Module]
quantize: Callable[..., Report] = partial(quantize_with_bar, progress=False)
EXACT: dict[str, Any] = dict(rtol=0, atol=0)


def case(name: str, shape: tuple[int, ...], factory: Factory) -> Any:
    """A layer and the shape of its input."""
    return pytest.param(factory, shape, id=name)


CASES = [
    case("linear", (7, 6), lambda: nn.Linear(6, 5)),
    case("linear-three-axes", (2, 3, 6), lambda: nn.Linear(6, 5, bias=False)),
    case("conv1d", (2, 4, 17), lambda: nn.Conv1d(4, 6, 3, 2, 3, dilation=2, groups=2)),
    case("conv2d-same", (2, 3, 7, 9), lambda: nn.Conv2d(3, 5, (3, 5), padding="same")),
    case("pointwise", (2, 4, 5, 6), lambda: nn.Conv2d(4, 6, 1)),
    case("depthwise", (2, 4, 5, 6), lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)),
    case("unbatched", (4, 5, 6), lambda: nn.Conv2d(4, 6, 3, groups=2)),
    *[
        case(
            f"conv2d-{mode}",
            (2, 3, 6, 7),
            partial(nn.Conv2d, 3, 5, 3, stride=2, padding=(2, 1), padding_mode=mode),
        )
        for mode in ("reflect", "replicate", "circular")
    ],
    case("conv3d", (2, 4, 5, 6, 7), lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 3), groups=2)),
    case(
        "transposed1d",
        (2, 4, 7),
        lambda: nn.ConvTranspose1d(
            4, 6, 4, stride=3, padding=2, output_padding=2, dilation=2, groups=2
        ),
    ),
    case("transposed2d", (2, 6, 4, 5), lambda: nn.ConvTranspose2d(6, 9, (3, 2), 2, groups=3)),
    case(
        "transposed3d",
        (2, 4, 3, 4, 5),
        lambda: nn.ConvTranspose3d(
            4, 6, (2, 3, 1), stride=(1, 2, 2), padding=(0, 1, 0), output_padding=(0, 1, 1), groups=2
        ),
    ),
]
SPECS = [
    pytest.param(QuantSpec(4), id="4"),
    pytest.param(QuantSpec(3, 1, scale_dtype="float16"), id="3-groups-float16"),
    pytest.param(QuantSpec(8, symmetric=True, scale_dtype="bfloat16"), id="8-symmetric-bfloat16"),
]


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


Grid = tuple[Tensor, Tensor, Tensor]


def random_grid(module: nn.Module, spec: QuantSpec) -> Grid:
    """codes, scale, zero_point as a report has them"""
    B, R, C = layers.matrix_shape(module)
    G = C // spec.columns_per_group(C)
    codes = torch.randint(0, spec.qmax + 1, (B, R, C), dtype=torch.uint8)
    scale = torch.rand(B, R, G).add(0.1).to(getattr(torch, spec.scale_dtype)).float()
    zero_point = torch.randint(0, spec.qmax + 1, (B, R, G)).float()
    if spec.symmetric:
        zero_point.fill_(2 ** (spec.bits - 1))
    return codes, scale, zero_point


def both(factory: Factory, spec: QuantSpec) -> tuple[Any, Any, Grid]:
    """A plain layer that holds dequantized weights, its packed form, and what that was made of."""
    plain = factory()
    codes, scale, zero_point = random_grid(plain, spec)
    values = codes.float().unflatten(-1, (scale.shape[-1], -1)) - zero_point[..., None]
    layers.store_weight(plain, (values * scale[..., None]).flatten(-2))
    module = copy.deepcopy(plain)
    to_packed(module, spec, pack_weight(codes, scale, zero_point, spec))
    return plain, module, (codes, scale, zero_point)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("factory, shape", CASES)
def test_outputs_are_those_of_the_dequantized_layer(
    factory: Factory, shape: tuple[int, ...], spec: QuantSpec
) -> None:
    plain, module, (codes, scale, zero_point) = both(factory, spec)
    inputs = torch.randn(shape)
    assert type(module).__name__ == f"Quant{type(plain).__name__}"
    torch.testing.assert_close(module.weight, plain.weight.detach(), **EXACT)
    torch.testing.assert_close(module(inputs), plain(inputs), **EXACT)
    torch.testing.assert_close(module.codes(), codes.flatten(0, 1), **EXACT)
    torch.testing.assert_close(module.zero_points(), zero_point.flatten(0, 1).byte(), **EXACT)
    torch.testing.assert_close(module.scale.float(), scale.flatten(0, 1), **EXACT)
    assert module.scale.dtype == getattr(torch, spec.scale_dtype)
    assert (module.qzeros is None) == spec.symmetric
    rows, columns = module.codes().shape
    assert module.qweight.shape == (rows, words(columns, spec.bits))
    assert dict(module.named_parameters()).keys() == ({"bias"} if plain.bias is not None else set())


def test_output_size_of_a_transposed_convolution() -> None:
    plain, module, _ = both(lambda: nn.ConvTranspose2d(3, 5, 3, stride=2), QuantSpec(4))
    inputs = torch.randn(2, 3, 4, 5)
    outputs = module(inputs, output_size=(10, 12))
    torch.testing.assert_close(outputs, plain(inputs, output_size=(10, 12)), **EXACT)
    assert outputs.shape == (2, 5, 10, 12)


def test_a_conv1d_of_transformers_becomes_linear() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain, module, _ = both(lambda: conv1d(6, 5), QuantSpec(4))
    assert type(module) is QuantLinear
    assert (module.in_features, module.out_features) == (5, 6)
    torch.testing.assert_close(module.weight, plain.weight.detach().T, **EXACT)
    inputs = torch.randn(2, 3, 5)
    torch.testing.assert_close(module(inputs), plain(inputs))  # BLAS sums in another order


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("factory, shape", CASES)
def test_a_new_layer_loads_the_state(
    factory: Factory, shape: tuple[int, ...], spec: QuantSpec
) -> None:
    _, module, _ = both(factory, spec)
    empty = to_packed(factory(), spec)
    assert not empty.weight.any()
    empty.load_state_dict(module.state_dict())
    inputs = torch.randn(shape)
    torch.testing.assert_close(empty(inputs), module(inputs), **EXACT)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(empty.state_dict()[name], tensor, **EXACT)


def test_constructors_take_what_the_plain_ones_take() -> None:
    spec = QuantSpec(3, 2, symmetric=True)
    made = [
        QuantLinear(6, 5, False, spec=spec, dtype=torch.float16),
        QuantConv2d(4, 6, 3, padding=1, groups=2, spec=spec),
        packed.QuantConvTranspose1d(4, 6, 3, stride=2, output_padding=1, spec=spec),
    ]
    plain = nn.Linear(6, 5, False), nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert made[0].weight.dtype == torch.float16 and made[0].bias is None
    for module, like in zip(made, plain, strict=False):
        assert module.weight.shape == like.weight.shape
        assert repr(module) == f"Quant{like!r}"[:-1] + ", bits=3, group_size=2, symmetric=True)"
    assert torch.equal(made[2](torch.randn(1, 4, 5)), torch.zeros(1, 6, 12))
    module = QuantLinear(6, 5, spec=spec, device="meta")
    assert module.qweight.is_meta
    filled = both(lambda: nn.Linear(6, 5), spec)[1]
    module.load_state_dict(filled.state_dict(), assign=True)
    torch.testing.assert_close(module.weight, filled.weight, **EXACT)
    with pytest.raises(ValueError, match="group_size 4 does not divide 6 columns; legal are -1"):
        QuantLinear(6, 5, spec=QuantSpec(4, 4))


@pytest.mark.parametrize("name", ["qweight", "scale", "qzeros"])
def test_refuses_a_state_of_another_dtype(name: str) -> None:
    _, module, _ = both(lambda: nn.Linear(6, 5), QuantSpec(4))
    state = module.state_dict()
    state[name] = state[name].to(torch.float16)
    with pytest.raises(ValueError, match=rf"0\.{name} must be torch.*, got torch.float16"):
        nn.Sequential(module).load_state_dict({f"0.{key}": value for key, value in state.items()})


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "parent": lambda m: nn.Sequential(m).half(),
    "device": lambda m: m.to("cpu"),
    "shared": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_codes_and_scales(cast: str) -> None:
    plain, module, _ = both(lambda: nn.Linear(6, 5), QuantSpec(3, 2))
    before = {name: module.get_buffer(name).clone() for name in packed.BUFFERS}
    for layer in (plain, module):
        CASTS[cast](layer)
    for name, tensor in before.items():
        torch.testing.assert_close(module.get_buffer(name), tensor, **EXACT)
    torch.testing.assert_close(module.weight, plain.weight.detach(), **EXACT)
    inputs = torch.randn(4, 6).to(plain.weight.dtype)
    torch.testing.assert_close(module(inputs), plain(inputs), **EXACT)
    module.float()
    assert module.weight.dtype == torch.float32


CASTS_OF_TWINS: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{name: cast for name, cast in CASTS.items() if name != "parent"},
    "clone": lambda m: m._apply(torch.clone),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS_OF_TWINS)
def test_twins_share_their_codes_after_casts(cast: str) -> None:
    _, module, _ = both(lambda: nn.Linear(6, 6), QuantSpec(3, 2))
    twin = to_packed(nn.Linear(6, 6), module.spec, module._buffers)
    expected = module.weight
    model: Any = CASTS_OF_TWINS[cast](nn.Sequential(module, twin))
    for name in packed.BUFFERS:
        assert model[0].get_buffer(name) is model[1].get_buffer(name)
    for layer in model:
        torch.testing.assert_close(layer.weight, expected.to(layer.weight.dtype), **EXACT)


def test_an_empty_copy_on_another_device() -> None:
    _, module, _ = both(lambda: nn.Linear(6, 5), QuantSpec(3, 2, scale_dtype="float16"))
    shapes = {name: module.get_buffer(name).shape for name in packed.BUFFERS}
    module.half().to_empty(device="meta")
    assert {name: module.get_buffer(name).shape for name in packed.BUFFERS} == shapes
    assert module.weight.is_meta and module.weight.dtype == torch.float16


def test_a_copy_is_its_own() -> None:
    _, module, _ = both(lambda: nn.Linear(6, 5), QuantSpec(4))
    weight = module.weight
    twin = copy.deepcopy(module)
    twin.qweight.zero_()
    torch.testing.assert_close(module.weight, weight, **EXACT)
    assert type(twin) is QuantLinear and not twin.codes().any()


def test_gradients_reach_input_and_bias() -> None:
    plain, module, _ = both(lambda: nn.Conv2d(3, 4, 3), QuantSpec(4))
    grads = []
    for layer in (plain, module):
        inputs = torch.linspace(-1, 1, 75).view(1, 3, 5, 5).requires_grad_()
        layer(inputs).square().sum().backward()
        grads.append((inputs.grad, layer.bias.grad))
    torch.testing.assert_close(grads[0], grads[1], **EXACT)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param(
            {"codes": torch.full((2, 6), 8)}, "codes of 3 bits must be below 8", id="code"
        ),
        pytest.param(
            {"scale": torch.ones(2, 2)}, r"scale must be \[2, 3\], got \[2, 2\]", id="grid"
        ),
        pytest.param(
            {"zero_point": torch.ones(2, 1)}, r"zero_point must be \[2, 3\], got", id="zero-grid"
        ),
        pytest.param({"scale": torch.full((2, 3), 0.1)}, "not numbers of float16", id="scale"),
        pytest.param({"scale": torch.full((2, 3), torch.nan)}, "not numbers of float16", id="nan"),
        pytest.param({"zero_point": torch.full((2, 3), 0.5)}, "integers from 0 to 7", id="half"),
        pytest.param({"zero_point": torch.full((2, 3), -1.0)}, "integers from 0 to 7", id="minus"),
        pytest.param({"zero_point": torch.full((2, 3), 8.0)}, "below 8, got 8", id="large"),
    ],
)
def test_refuses_what_does_not_fit_the_spec(changes: dict[str, Tensor], message: str) -> None:
    fitting = {
        "codes": torch.zeros(2, 6, dtype=torch.uint8),
        "scale": torch.ones(2, 3),
        "zero_point": torch.ones(2, 3),
    }
    spec = QuantSpec(3, 2, scale_dtype="float16")
    assert pack_weight(**fitting, spec=spec)["qzeros"] is not None
    with pytest.raises(ValueError, match=message):
        pack_weight(**(fitting | changes), spec=spec)


def test_refuses_zero_points_that_a_symmetric_layer_does_not_store() -> None:
    codes, ones = torch.zeros(2, 6, dtype=torch.uint8), torch.ones(2, 1)
    spec = QuantSpec(3, symmetric=True)
    assert pack_weight(codes, ones, 4 * ones, spec)["qzeros"] is None
    with pytest.raises(ValueError, match="zero points of a symmetric spec must be 4"):
        pack_weight(codes, ones, 3 * ones, spec)


@pytest.mark.parametrize(
    "factory, spec, message",
    [
        pytest.param(lambda: OwnLinear(6, 5), QuantSpec(4), "OwnLinear may have a", id="class"),
        pytest.param(lambda: nn.Linear(6, 5), QuantSpec(4, 4), "does not divide 6", id="group"),
        pytest.param(lambda: nn.Linear(6, 4), QuantSpec(4), r"qweight must be \(4, 1,", id="rows"),
        pytest.param(
            lambda: nn.Linear(9, 5), QuantSpec(4), r"qweight must be \(5, 2,", id="columns"
        ),
        pytest.param(lambda: nn.Linear(6, 5), QuantSpec(4, 3), r"scale must be \(5, 2,", id="grid"),
        pytest.param(
            lambda: nn.Linear(6, 5), QuantSpec(4, symmetric=True), "qzeros must be None", id="zeros"
        ),
        pytest.param(
            lambda: nn.Linear(6, 5),
            QuantSpec(4, scale_dtype="float16"),
            "torch.float16",
            id="dtype",
        ),
        pytest.param(lambda: pruned(nn.Linear(6, 9), 5), QuantSpec(4), "do not tell", id="pruned"),
    ],
)
def test_what_cannot_be_packed_stays(factory: Factory, spec: QuantSpec, message: str) -> None:
    tensors = pack_weight(
        torch.zeros(5, 6).byte(), torch.ones(5, 1), torch.ones(5, 1), QuantSpec(4)
    )
    module = factory()
    before = dict(vars(module)), dict(module._parameters), dict(module._buffers), type(module)
    with pytest.raises(ValueError, match=message):
        to_packed(module, spec, tensors)
    assert before == (vars(module), module._parameters, module._buffers, type(module))


def with_own(name: str, how: str) -> nn.Linear:
    """A linear layer that has something of its own under a name of packed layers."""
    module = nn.Linear(6, 6)
    if how == "attribute":
        setattr(module, name, 0.5)
    elif how == "parameter":
        setattr(module, name, nn.Parameter(torch.ones(3)))
    elif how == "buffer":
        module.register_buffer(name, torch.ones(3))
    else:
        module.add_module(name, nn.Identity())
    return module


@pytest.mark.parametrize(
    "name, how",
    [
        *[(name, "attribute") for name in ("scale", "spec", "qzeros", "weight_dtype")],
        *[(name, "attribute") for name in ("codes", "dequantize", "zero_points")],
        *[("scale", how) for how in ("parameter", "buffer", "module")],
    ],
)
def test_layers_with_attributes_of_those_names_stay_plain(name: str, how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), with_own(name, how))
    own = getattr(model[1], name)
    report = quantize(model, [torch.randn(9, 6)], QuantSpec(4), pack=True)
    assert [type(module) for module in model] == [QuantLinear, nn.Linear]
    reason = f"its attribute {name!r} has a name that packed layers use"
    assert report["0"].notes == () and report["1"].notes == (f"not packed: {reason}",)
    assert getattr(model[1], name) is own
    with pytest.raises(ValueError, match=reason):
        to_packed(model[1], QuantSpec(4))


def test_twins_stay_plain_together() -> None:
    model = nn.Sequential(nn.Linear(6, 6), with_own("scale", "attribute"))
    model[1].weight = model[0].weight
    report = quantize(model, [torch.randn(9, 6)], QuantSpec(4), pack=True)
    assert type(model[0]) is type(model[1]) is nn.Linear and model[0].weight is model[1].weight
    assert any(note.startswith("not packed: its attribute 'scale'") for note in report["0"].notes)


def pruned(module: nn.Linear, rows: int) -> nn.Module:
    """As some tools leave it: the attributes tell another shape."""
    module.weight.data = module.weight.data[:rows]
    return module


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers take the way that they take on a GPU; the names of the kernels that ran."""
    ran: list[str] = []

    def watched(name: str, launch: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ran.append(name)
        return launch(*arguments)

    monkeypatch.setattr(ops, "uses_triton", lambda tensor, backend: True)
    for name in ("dequantize_packed", "matmul_packed"):
        module = getattr(ops, f"_{name}")
        monkeypatch.setattr(module, name, partial(watched, name, getattr(module, name)))
    return ran


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6), (ops.FEW_ROWS + 1, 6)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_multiply_by_codes(
    bias: bool, shape: tuple[int, ...], kernels: list[str], device: torch.device
) -> None:
    plain, module, _ = both(lambda: nn.Linear(6, 5, bias), QuantSpec(3, 2))
    plain, module, inputs = plain.to(device), module.to(device), torch.randn(shape, device=device)
    torch.testing.assert_close(module(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    rows = inputs.numel() // 6
    few = ["matmul_packed"] if rows else []
    assert kernels == (few if rows <= ops.FEW_ROWS else ["dequantize_packed"])
    with pytest.raises(ValueError, match=r"input must be \[..., 6\], got \[2, 5\]"):
        module(torch.randn(2, 5, device=device))


def test_autocast_decides_the_dtype(kernels: list[str], device: torch.device) -> None:
    plain, module, _ = both(lambda: nn.Linear(6, 5), QuantSpec(3, 2))
    plain, module, inputs = plain.to(device), module.to(device), torch.randn(4, 6, device=device)
    with torch.autocast(device.type, dtype=torch.float16):
        outputs, expected = module(inputs), plain(inputs)
    assert outputs.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(outputs, expected, rtol=1e-2, atol=1e-2)
    assert kernels == ["matmul_packed"]
    module.double()(inputs.double())
    assert kernels == ["matmul_packed", "dequantize_packed"]


def test_convolutions_make_their_weight(kernels: list[str], device: torch.device) -> None:
    plain, module, _ = both(lambda: nn.Conv2d(4, 6, 3, groups=2), QuantSpec(3, 2))
    plain, module = plain.to(device), module.to(device)
    torch.testing.assert_close(module.weight, plain.weight.detach(), **EXACT)
    inputs = torch.randn(2, 4, 5, 5, device=device)
    torch.testing.assert_close(module(inputs), plain(inputs), **EXACT)
    assert kernels == ["dequantize_packed"] * 2


# --- quantize(pack=True) --------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, two heads that share a weight but no bias, and a layer with its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.own = OwnLinear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.stem(x).relu()).relu().mean((2, 3))
        result: Tensor = self.own(self.second(self.first(x).relu()))
        return result


LAYERS = ["stem", "up", "first", "second"]


def packed_net(spec: QuantSpec = QuantSpec(3), **options: Any) -> tuple[Net, Net, Report, Tensor]:  # noqa: B008
    """A model quantized without packing, the same packed, its report, and a batch."""
    plain = Net().eval()
    model = copy.deepcopy(plain)
    batch = torch.randn(6, 3, 7, 7)
    quantize(plain, [batch], spec, **options)
    return plain, model, quantize(model, [batch], spec, pack=True, **options), batch


@pytest.mark.parametrize("order", ["sensitivity", "obq", "nearest"])
def test_packing_changes_no_output(order: str) -> None:
    spec = QuantSpec(3, scale_dtype="float16")
    plain, model, report, batch = packed_net(spec, order=order)
    torch.testing.assert_close(model(batch), plain(batch), **EXACT)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, PackedWeight):
            torch.testing.assert_close(module.codes(), layer.codes.flatten(0, 1), **EXACT)
            assert module.spec == layer.spec


def test_every_layer_is_packed_or_noted() -> None:
    _, model, report, _ = packed_net()
    kinds = {name: type(module) for name, module in model.named_modules() if name}
    assert [name for name, kind in kinds.items() if issubclass(kind, PackedWeight)] == LAYERS
    assert kinds["own"] is OwnLinear
    assert report["own"].notes == ("not packed: OwnLinear may have a forward of its own",)
    assert not report["stem"].notes
    assert "weight shared with second" in report["first"].notes
    for name in packed.BUFFERS:
        assert model.first.get_buffer(name) is model.second.get_buffer(name)
    assert model.first.bias is not model.second.bias


def test_packing_again_leaves_packed_layers_out() -> None:
    plain, model, _, batch = packed_net()
    report = quantize(model, [batch], QuantSpec(3), pack=True)
    assert [layer.name for layer in report.layers] == ["own"]
    assert report.skipped == dict.fromkeys(LAYERS, "it is packed already")
    with torch.no_grad():
        plain.own.weight.copy_(model.own.weight)
        plain.own.bias.copy_(model.own.bias)
    torch.testing.assert_close(model(batch), plain(batch), **EXACT)


def test_hooks_and_references_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    layer, calls = model[0], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    quantize(model, [torch.randn(9, 6)], QuantSpec(4), pack=True)
    calls.clear()
    model(torch.randn(1, 6))
    assert calls == [1] and model[0] is layer and type(layer) is QuantLinear


def held(model: nn.Module) -> int:
    """Bytes of its parameters and buffers, in memory: a view counts all that it keeps."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_memory_falls() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Conv1d(9, 64, 1, bias=False))
    old = [weakref.ref(model[0].weight), weakref.ref(model[2].weight)]
    storages = [weakref.ref(model[0].weight.untyped_storage())]
    before = held(model)
    report = quantize(model, [torch.randn(2, 9, 256)], QuantSpec(4, symmetric=True), pack=True)
    gc.collect()
    assert [ref() for ref in (*old, *storages)] == [None] * 3
    assert before == 4 * (256 * 256 + 256 + 64 * 9)
    assert held(model) == 256 * 256 // 2 + 4 * 256 + 4 * 256 + 64 * (2 * 4 + 4)
    assert len(report.layers) == 2


def test_restored_where_packing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("on purpose")
        return pack_weight(*args)

    monkeypatch.setattr(packed, "pack_weight", failing)
    with pytest.raises(MemoryError, match="on purpose"):
        quantize(model, [torch.randn(6, 3, 7, 7)], QuantSpec(3), pack=True)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], **EXACT)
    assert model.first.weight is model.second.weight


def test_compiles_and_exports_as_one_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).eval()
    batch = torch.randn(2, 3, 5, 5)
    quantize(model, [batch], QuantSpec(3, 9), pack=True)
    assert isinstance(model[0], QuantConv2d) and isinstance(model[3], QuantLinear)
    expected = model(batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), expected, **EXACT)
    program = torch.export.export(model, (batch,))
    torch.testing.assert_close(program.module()(batch), expected, **EXACT)
    assert set(program.state_dict) == set(model.state_dict())
