"""What goes back into other packages' pipelines, of which only the fields are made up here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.dropin import Quantizer
from sapq_triton.integrations import auto_round, gptqmodel, llmcompressor, modelopt
from sapq_triton.integrations.patching import Options


def problem(columns: int = 48, rows: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.randn(300, columns) @ (torch.eye(columns) + 0.4 * torch.randn(columns, columns))
    return torch.randn(rows, columns), x.T @ x / 150


# --- llm-compressor -------------------------------------------------------------------------------


def arguments(strategy: str, symmetric: bool, group_size: int | None = None) -> Any:
    return SimpleNamespace(
        type="int", num_bits=4, strategy=strategy, group_size=group_size, symmetric=symmetric
    )


def observed(weights: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and signed zero points [B, R, G], as an observer finds them."""
    spec = QuantSpec(4, group_size, symmetric=symmetric, scale_search="absmax")
    grid = solve(weights, torch.eye(weights.shape[2]), spec, order="nearest")
    return grid.scale, torch.zeros_like(grid.scale) if symmetric else grid.zero_point - 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_llmcompressor_solves_on_given_grids(group_size: int, symmetric: bool) -> None:
    (w1, h1), (w2, h2) = problem(), problem()
    weights, hessians = torch.stack([w1, w2]), torch.stack([h1, h2])
    scale, zero_point = observed(weights, group_size, symmetric)
    args = arguments("channel" if group_size == -1 else "group", symmetric, group_size)
    quantized, losses, fallback = llmcompressor._quantize(
        weights.bfloat16(), hessians, scale, zero_point, args, 0.02, llmcompressor.Options()
    )
    expected = solve(
        weights.bfloat16(), hessians, QuantSpec(4, group_size), damp=0.02,
        scale=scale, zero_point=zero_point + 8,
    )  # fmt: skip
    assert torch.equal(quantized, expected.dequantize().bfloat16())
    torch.testing.assert_close(losses, expected.report.error.float() / 2)
    assert losses.shape == (2,) and fallback.tolist() == [False, False]


def test_llmcompressor_one_grid_for_a_tensor() -> None:
    weight, hessian = problem()
    scale = weight.abs().max().view(1, 1) / 7.5
    quantized, _, _ = llmcompressor._quantize(
        weight[None], hessian[None], scale, torch.zeros(1, 1, dtype=torch.int8),
        arguments("tensor", True), 0.01, llmcompressor.Options(),
    )  # fmt: skip
    codes = quantized / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert codes.min() >= -8.001 and codes.max() <= 7.001


def test_llmcompressor_says_what_was_rounded() -> None:
    weight, _ = problem()
    hessian = -torch.ones(48, 48) + 1.5 * torch.eye(48)  # no X^T X, whatever the damping
    scale, zero_point = observed(weight[None], -1, True)
    args = arguments("channel", True)
    *_, fallback = llmcompressor._quantize(
        weight[None], hessian[None], scale, zero_point, args, 0.0, llmcompressor.Options()
    )
    assert fallback.tolist() == [True]


@pytest.mark.parametrize("type_, bits, strategy", [("float", 4, "group"), ("int", 4, "block")])
def test_llmcompressor_keeps_other_formats(type_: str, bits: int, strategy: str) -> None:
    args = SimpleNamespace(type=type_, num_bits=bits, strategy=strategy)
    assert not llmcompressor._is_integer_grid(args)
    assert llmcompressor._is_integer_grid(arguments("group", True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_llmcompressor_block_is_the_loop_over_its_columns(group_size: int, symmetric: bool) -> None:
    weight, hessian = problem()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT.contiguous()
    start, end = 16, 48
    scale, zero_point = observed(weight[None], group_size, symmetric)
    g_idx = torch.arange(48)[None] // group_size if group_size > 0 else None
    args = arguments("channel" if group_size == -1 else "group", symmetric, group_size)
    block, factor = weight[None, :, start:end].clone(), upper[None, start:end, start:end]
    out = [torch.zeros_like(block) for _ in range(3)]
    llmcompressor._block_update(llmcompressor.Options(level="block"))(
        block.clone(), factor, *out,
        scale=scale, zero_point=zero_point, global_scale=None, g_idx=g_idx, quant_args=args,
        i1=start,
    )  # fmt: skip
    quantized, errors, losses = (t[0] for t in out)
    now = block[0].clone()
    for c in range(end - start):
        group = (start + c) // group_size if group_size > 0 else 0
        s, z = scale[0, :, group], zero_point[0, :, group]
        q = ((now[:, c] / s + z).round().clamp(-8, 7) - z) * s
        error = (now[:, c] - q) / factor[0, c, c]
        torch.testing.assert_close(quantized[:, c], q, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(errors[:, c], error, rtol=1e-3, atol=1e-3)
        now[:, c:] -= error[:, None] * factor[0, c, c:]
    assert torch.equal(losses, errors.square())


# --- GPTQModel ------------------------------------------------------------------------------------


def gptqmodel_task(layer: nn.Module, group_size: int, sym: bool = True, mse: float = 0) -> Any:
    weight = layer.get_parameter("weight")
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=True, sym=sym)
    return SimpleNamespace(
        module=layer,
        clone_module=lambda device: weight.data.flatten(1).float().clone(),
        qcfg=SimpleNamespace(group_size=group_size, damp_percent=0.05, sym=sym, mse=mse),
        quantizer=quantizer,
        nsamples=300,
        H=None,
    )


@pytest.mark.parametrize("group_size", [-1, 16, 32])
def test_gptqmodel_gets_what_it_expects(group_size: int) -> None:
    weight, hessian = problem()
    layer = nn.Linear(48, 10, dtype=torch.bfloat16)
    layer.weight.data = weight.bfloat16()
    task = gptqmodel_task(layer, group_size)
    out = gptqmodel._quantize(task, hessian, gptqmodel.Options(), started=0.0)
    quantized, scale, zero, g_idx, seconds, loss, damp, samples = out
    size = 48 if group_size == -1 else group_size
    assert quantized.shape == (10, 48) and quantized.dtype == torch.bfloat16
    assert scale.shape == zero.shape == (10, -(-48 // size))
    assert torch.equal(scale, scale.half().float())  # as it is stored
    assert (zero == 8).all()
    assert g_idx.dtype == torch.int32 and torch.equal(g_idx, torch.arange(48) // size)
    assert seconds > 0 and damp == 0.05 and samples == 300 and task.H is None
    index = g_idx.long()
    codes = (quantized.float() / scale[:, index]).round() + 8
    stored = ((codes - 8) * scale[:, index]).bfloat16()
    assert torch.equal(stored, quantized)
    error = layer_error(weight.bfloat16().float(), (codes - 8) * scale[:, index], hessian)
    assert loss == pytest.approx(error.item() / 2 / 300, rel=1e-3)


@pytest.mark.parametrize("sym", [True, False])
def test_gptqmodel_scales_are_searched_unless_its_quantizer_is_asked(sym: bool) -> None:
    weight, hessian = problem()
    layer = nn.Linear(48, 10)
    layer.weight.data = weight.clone()

    def scale_of(mse: float, search: Any) -> Tensor:
        task, options = gptqmodel_task(layer, 16, sym, mse), gptqmodel.Options(scale_search=search)
        return gptqmodel._quantize(task, hessian, options, started=0.0)[1]

    full, searched = (
        solve(weight, hessian, QuantSpec(4, 16, sym, search, "float16")).scale
        for search in ("absmax", "mse")
    )
    assert not torch.equal(full, searched)
    assert torch.equal(scale_of(0, "mse"), searched)
    for mse, search in ((2.4, "mse"), (0, "absmax")):
        torch.testing.assert_close(scale_of(mse, search), full, rtol=1e-3, atol=0)


def test_gptqmodel_a_convolution_keeps_its_shape() -> None:
    layer = nn.Conv2d(4, 6, 3)
    _, hessian = problem(36)
    out = gptqmodel._quantize(gptqmodel_task(layer, -1), hessian, gptqmodel.Options(), started=0.0)
    assert out[0].shape == layer.weight.shape
    assert (out[0] - layer.weight).abs().max() < 4 * out[1].max()


# --- ModelOpt -------------------------------------------------------------------------------------


class FakeQuantizer:
    """Rounds weights [R, C] to integers low to high times amax / 7, a group at a time."""

    def __init__(self, weight: Tensor, group_size: int, low: int, high: int = 7) -> None:
        self.size, self.low, self.high = group_size, low, high
        self.amax = weight.unflatten(1, (-1, group_size)).abs().amax(2)
        self.block_sizes = None if group_size == weight.shape[1] else {-1: group_size}

    def __call__(self, w: Tensor) -> Tensor:
        step = (self.amax / 7).repeat_interleave(self.size, 1)
        return (w / step).round().clamp(self.low, self.high) * step


@pytest.mark.parametrize("group_size", [48, 16])
def test_modelopt_grids_are_told_by_their_ends(group_size: int) -> None:
    weight, _ = problem()
    found = modelopt._grid(FakeQuantizer(weight, group_size, -8), weight, 4)
    assert found is not None
    scale, zero, size = found
    assert size == group_size and (zero == 8).all()
    expected = weight.unflatten(1, (-1, group_size)).abs().amax(2) / 7
    torch.testing.assert_close(scale, expected)


def test_modelopt_other_grids_are_left_alone() -> None:
    weight, _ = problem()
    narrow = FakeQuantizer(weight, 16, -7)
    assert modelopt._grid(narrow, weight, 4) is None
    floating = FakeQuantizer(weight, 16, -8)
    floating.__class__ = type("Floating", (FakeQuantizer,), {"__call__": lambda self, w: w.half()})
    assert modelopt._grid(floating, weight, 4) is None
    dynamic = FakeQuantizer(weight, 16, -8)
    dynamic.amax = None  # type: ignore[assignment]
    assert modelopt._grid(dynamic, weight, 4) is None


# --- AutoRound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 16])
def test_auto_round_keeps_the_grid_of_plain_rounding(group_size: int) -> None:
    """Its symmetric scales may be negative, where -8 steps reach the largest weight."""
    weight, hessian = problem()
    size = 48 if group_size == -1 else group_size
    groups = weight.unflatten(1, (-1, size))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[:, :, 0]
    scale = -largest / 8
    rounded = (groups / scale[:, :, None]).round().clamp(-8, 7) * scale[:, :, None]
    layer: Any = nn.Linear(48, 10)
    layer.weight.data = rounded.flatten(1).clone()
    layer.scale, layer.zp, layer.bits, layer.group_size = scale, 8, 4, group_size
    auto_round._refine(layer, weight[None], hessian[None], Options())
    codes = layer.weight.detach().unflatten(1, (-1, size)) / scale[:, :, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.min() > -8.01 and codes.max() < 7.01
    assert (codes.round() == -8).any() and (scale < 0).any() and (scale > 0).any()
    errors = [layer_error(weight, q, hessian) for q in (layer.weight, rounded.flatten(1))]
    assert errors[0] < 0.8 * errors[1]


def test_auto_round_asymmetric() -> None:
    weight, hessian = problem()
    spec = QuantSpec(4, 16, scale_search="absmax")
    rounded = solve(weight, hessian, spec, order="nearest")
    layer: Any = nn.Linear(48, 10)
    layer.scale, layer.zp, layer.bits, layer.group_size = rounded.scale, rounded.zero_point, 4, 16
    auto_round._refine(layer, weight[None], hessian[None], Options(order="natural"))
    expected = solve(weight, hessian, spec, order="natural")
    assert torch.equal(layer.weight, expected.dequantize())


def test_auto_round_needs_the_patch() -> None:
    with pytest.raises(ValueError, match=r"needs sapq_triton\.patch"):
        auto_round._current()
