"""quantize_groups: bit for bit the reference, the scale search apart."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference
from sapq_triton.spec import MSE_SHRINK

ABSMAX = (1.0,)

SHAPES = [  # B, R, C, group_size
    pytest.param(1, 1, 128, 128, id="one-row"),
    pytest.param(1, 16, 256, 64, id="full-block"),
    pytest.param(1, 37, 96, 32, id="ragged-rows"),
    pytest.param(1, 70, 120, 24, id="odd-group"),
    pytest.param(1, 3, 1200, 600, id="group-of-three-blocks"),
    pytest.param(3, 7, 48, 16, id="batch"),
    pytest.param(2, 9, 5, 1, id="one-column-groups"),
]
BITS = pytest.mark.parametrize("qmax", [3, 7, 15, 255])
SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])

Quantized = tuple[Tensor, Tensor, Tensor]


def assert_same(actual: Quantized, expected: Quantized) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def per_column(grid: Tensor, columns: int) -> Tensor:
    return grid.repeat_interleave(columns // grid.shape[2], dim=2)


def squared_error(weight: Tensor, quantized: Quantized) -> Tensor:
    """Of each group, float64 [B, R, G]"""
    codes, scale, zero_point = quantized
    s, z = per_column(scale, weight.shape[2]), per_column(zero_point, weight.shape[2])
    delta = (codes.double() - z.double()) * s.double() - weight.double()
    return delta.square().unflatten(2, (scale.shape[2], -1)).sum(-1)


@SYMMETRY
@BITS
@pytest.mark.parametrize("B, R, C, group_size", SHAPES)
def test_absmax_is_the_reference_bit_for_bit(
    B: int, R: int, C: int, group_size: int, qmax: int, symmetric: bool, device: torch.device
) -> None:
    weight = torch.randn(B, R, C, device=device)
    arguments = (group_size, qmax, symmetric, ABSMAX)
    actual = ops.quantize_groups(weight, *arguments, backend="triton")
    assert_same(actual, reference.quantize_groups(weight, *arguments))


@SYMMETRY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_computed_in_float32(
    dtype: torch.dtype, symmetric: bool, device: torch.device
) -> None:
    weight = torch.randn(1, 37, 96, device=device).to(dtype)
    actual = ops.quantize_groups(weight, 32, 15, symmetric, ABSMAX, backend="triton")
    assert_same(actual, reference.quantize_groups(weight.float(), 32, 15, symmetric, ABSMAX))


@SYMMETRY
@pytest.mark.parametrize("B, R, C, group_size", SHAPES)
def test_search_finds_the_least_error(
    B: int, R: int, C: int, group_size: int, symmetric: bool, device: torch.device
) -> None:
    weight = torch.randn(B, R, C, device=device)
    arguments = (group_size, 7, symmetric)
    shrink = MSE_SHRINK[::8]
    actual = ops.quantize_groups(weight, *arguments, shrink, backend="triton")
    expected = reference.quantize_groups(weight, *arguments, shrink)
    codes, scale, zero_point = actual
    torch.testing.assert_close(zero_point, expected[2], rtol=0, atol=0)
    given = reference.to_code(weight, per_column(scale, C), per_column(zero_point, C), 7)
    torch.testing.assert_close(codes, given.to(torch.uint8), rtol=0, atol=0)
    full = reference.quantize_groups(weight, *arguments, ABSMAX)[1]
    tried = full[..., None] * torch.tensor(shrink, device=device)
    assert (tried == scale[..., None]).any(-1).all()
    # either of two fractions may win where their errors agree in float32
    torch.testing.assert_close(
        squared_error(weight, actual), squared_error(weight, expected), rtol=1e-5, atol=1e-12
    )
    assert (scale == expected[1]).float().mean() > 0.9


def test_search_keeps_the_first_of_equal_fractions(device: torch.device) -> None:
    weight = torch.tensor([[[-4.0, 3.0, -2.0, 1.0]]], device=device)  # on both grids: no error
    _, scale, _ = ops.quantize_groups(weight, 4, 15, True, (0.75, 1.875, 0.9375), backend="triton")
    assert scale.item() == 1.0  # 4 / 7.5 times 1.875; a half with the last of them
    _, scale, _ = ops.quantize_groups(weight, 4, 15, True, (0.75, 0.9375, 1.875), backend="triton")
    assert scale.item() == 0.5
    _, scale, _ = ops.quantize_groups(weight, 4, 15, True, (0.75, 1.875), backend="triton")
    assert scale.item() == 1.0


@SYMMETRY
def test_a_single_fraction_shrinks_the_scale(symmetric: bool, device: torch.device) -> None:
    weight = torch.randn(2, 5, 24, device=device)
    actual = ops.quantize_groups(weight, 8, 15, symmetric, (0.75,), backend="triton")
    assert_same(actual, reference.quantize_groups(weight, 8, 15, symmetric, (0.75,)))
    full = ops.quantize_groups(weight, 8, 15, symmetric, ABSMAX, backend="triton")
    torch.testing.assert_close(actual[1], full[1] * 0.75, rtol=0, atol=0)


STRIDED = {
    "transposed": lambda device: torch.randn(2, 48, 21, device=device).mT,
    "every-other-column": lambda device: torch.randn(2, 21, 96, device=device)[..., ::2],
    "inner-rows": lambda device: torch.randn(2, 30, 60, device=device)[:, 4:25, 7:55],
    "expanded": lambda device: torch.randn(21, 48, device=device).expand(2, 21, 48),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("shrink", [ABSMAX, (1.0, 0.8)], ids=["absmax", "search"])
def test_any_strides(layout: str, shrink: tuple[float, ...], device: torch.device) -> None:
    weight = STRIDED[layout](device)
    assert not weight.is_contiguous()
    actual = ops.quantize_groups(weight, 16, 15, False, shrink, backend="triton")
    expected = ops.quantize_groups(weight.contiguous(), 16, 15, False, shrink, backend="triton")
    assert_same(actual, expected)
    assert_same(actual, reference.quantize_groups(weight.contiguous(), 16, 15, False, shrink))


def test_ties_round_to_even(device: torch.device) -> None:
    weight = torch.tensor([[[0.0, 0.5, 1.5, 2.5, 3.5, 15.0]]], device=device)  # scale 1
    codes, scale, zero_point = ops.quantize_groups(weight, 6, 15, False, ABSMAX, backend="triton")
    assert (scale.item(), zero_point.item()) == (1.0, 0.0)
    assert codes.tolist() == [[[0, 0, 2, 2, 4, 15]]]


def test_zero_point_rounds_to_even(device: torch.device) -> None:
    weight = torch.tensor([[[-1.0, 5.0], [-5.0, 1.0]]], device=device)
    codes, scale, zero_point = ops.quantize_groups(weight, 2, 3, False, ABSMAX, backend="triton")
    assert scale.flatten().tolist() == [2.0, 2.0]
    assert zero_point.flatten().tolist() == [0.0, 2.0]  # of 0.5 and 2.5
    assert codes.tolist() == [[[0, 2], [0, 2]]]


def test_symmetric_grid_clamps_its_positive_end(device: torch.device) -> None:
    weight = torch.tensor([[[-7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5]]], device=device)
    codes, scale, zero_point = ops.quantize_groups(weight, 8, 15, True, ABSMAX, backend="triton")
    assert (scale.item(), zero_point.item()) == (1.0, 8.0)
    assert codes.tolist() == [[[0, 6, 6, 8, 8, 10, 10, 15]]]


@pytest.mark.parametrize("shrink", [ABSMAX, MSE_SHRINK], ids=["absmax", "mse"])
@pytest.mark.parametrize("symmetric, code", [(False, 0), (True, 8)])
def test_zero_group_has_scale_one(
    symmetric: bool, code: int, shrink: tuple[float, ...], device: torch.device
) -> None:
    weight = torch.zeros(1, 3, 32, device=device)
    codes, scale, zero_point = ops.quantize_groups(
        weight, 16, 15, symmetric, shrink, backend="triton"
    )
    assert (scale == 1).all()
    assert (zero_point == code).all()
    assert (codes == code).all()


@pytest.mark.parametrize("sign, zero_point", [(1, 0), (-1, 15)], ids=["positive", "negative"])
def test_one_sided_group_keeps_zero_on_the_grid(
    sign: int, zero_point: int, device: torch.device
) -> None:
    weight = sign * torch.tensor([[[5.0, 7.5, 6.0, 7.0]]], device=device)
    codes, scale, found = ops.quantize_groups(weight, 4, 15, False, ABSMAX, backend="triton")
    assert (scale.item(), found.item()) == (0.5, zero_point)
    assert codes.tolist() == [[[zero_point + sign * n for n in (10, 15, 12, 14)]]]


@SYMMETRY
@pytest.mark.parametrize("B, R, C, group_size", SHAPES)
def test_importance_decides_the_search(
    B: int, R: int, C: int, group_size: int, symmetric: bool, device: torch.device
) -> None:
    """Every other column alone counts: the search is that of a weight of those columns."""
    weight = torch.randn(B, R, C, device=device)
    shrink = MSE_SHRINK[::8]
    ones = torch.ones(B, C, device=device)
    arguments = (group_size, 7, symmetric, shrink)
    plain = ops.quantize_groups(weight, *arguments, backend="triton")
    assert_same(ops.quantize_groups(weight, *arguments, ones, backend="triton"), plain)
    importance = torch.rand(2 * B, 3 * C, device=device)[::2, ::3].square()  # of any strides
    actual = ops.quantize_groups(weight, *arguments, importance, backend="triton")
    expected = reference.quantize_groups(weight, *arguments, importance)
    cost = importance[:, None].expand(B, R, C)

    def weighted(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        codes, scale, zero_point = found
        value = (codes - per_column(zero_point, C)) * per_column(scale, C)
        return ((value - weight).square() * cost).unflatten(2, (-1, group_size)).sum(3)

    torch.testing.assert_close(weighted(actual), weighted(expected), rtol=1e-5, atol=1e-12)
    assert (actual[1] == expected[1]).float().mean() > 0.9
    assert (weighted(actual) <= weighted(plain) * (1 + 1e-5) + 1e-12).all()
    if C > 1 and R * C > 200:
        assert (actual[1] != plain[1]).any()
