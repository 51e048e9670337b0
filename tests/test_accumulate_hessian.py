"""accumulate_hessian, and the patches of a convolution that it sums over: exact on integers."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sapq_triton import ops, reference
from sapq_triton.kernels import accumulate_hessian as kernel
from sapq_triton.window import Window

TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}  # absolute 3.5e-5 measured, sums up to 340

# the interpreter multiplies the bit patterns of bfloat16 operands (triton 3.9)
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="torch.bfloat16")

ROWS = [  # N, C
    pytest.param(1, 5, id="one-row"),
    pytest.param(7, 1, id="one-column"),
    pytest.param(64, 128, id="full-blocks"),
    pytest.param(70, 131, id="ragged"),
    pytest.param(2100, 3, id="two-splits"),
]

CONVOLUTIONS = [  # [N, channels, D, H, W], window; no two axes alike
    pytest.param((2, 3, 1, 1, 20), Window((1, 1, 4), (1, 1, 3), (1, 1, 2)), id="1d"),
    pytest.param((1, 4, 1, 1, 9), Window((1, 1, 3), groups=2), id="1d-groups"),
    pytest.param((2, 3, 1, 8, 9), Window((1, 3, 3)), id="2d"),
    pytest.param((3, 2, 1, 13, 16), Window((1, 3, 2), (1, 2, 3), (1, 1, 4)), id="2d-all-options"),
    pytest.param(
        (2, 6, 1, 7, 8), Window((1, 2, 3), (1, 1, 2), (1, 2, 1), groups=3), id="2d-groups"
    ),
    pytest.param((2, 5, 1, 6, 7), Window((1, 3, 3), groups=5), id="2d-depthwise"),
    pytest.param((2, 70, 1, 3, 2), Window(), id="2d-one-by-one"),
    pytest.param((1, 1, 1, 50, 43), Window((1, 2, 1)), id="2d-two-splits"),
    pytest.param((2, 2, 7, 9, 8), Window((2, 3, 2), (2, 3, 1), (3, 1, 2)), id="3d-all-options"),
    pytest.param((1, 4, 3, 5, 6), Window((2, 1, 3), (1, 2, 1), (1, 1, 2), 2), id="3d-groups"),
]


def integers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(-4, 5, shape, device=device).float()


def columns(inputs: Tensor, window: Window) -> int:
    a, b, c = window.size
    return inputs.shape[1] // window.groups * a * b * c


def sums(
    inputs: Tensor, window: Window, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Lower triangles of kernel and reference, both added to the same start."""
    C = columns(inputs, window)
    start = torch.randint(-9, 10, (window.groups, C, C), device=inputs.device).to(dtype)
    actual, expected = start.clone(), start.clone()
    rows = ops.accumulate_hessian(actual, inputs, window, backend="triton")
    assert rows == ops.accumulate_hessian(expected, inputs, window, backend="reference")
    return actual.tril(), expected.tril()


def walk(window: Window, space: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """First element of each window position, row-major, found by trying all of them."""
    reach = [d * (k - 1) for d, k in zip(window.dilation, window.size, strict=True)]
    axes = [
        [at for at in range(side) if at % step == 0 and at + r < side]
        for side, step, r in zip(space, window.stride, reach, strict=True)
    ]
    return product(*axes)


def literal_patches(inputs: Tensor, window: Window) -> Tensor:
    """X of one group after another, an element at a time: [groups, rows, columns]"""
    each = inputs.shape[1] // window.groups
    groups = []
    for g in range(window.groups):
        rows = []
        for image in inputs[:, g * each : (g + 1) * each]:
            for d, h, w in walk(window, inputs.shape[2:]):
                rows.append(
                    [
                        image[
                            c,
                            d + a * window.dilation[0],
                            h + i * window.dilation[1],
                            w + j * window.dilation[2],
                        ].item()
                        for c in range(each)
                        for a, i, j in product(*map(range, window.size))
                    ]
                )
        groups.append(rows)
    return torch.tensor(groups, dtype=inputs.dtype, device=inputs.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N, C", ROWS)
def test_rows_of_integers_are_exact(
    N: int, C: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = integers((N, C), device)
    actual, expected = sums(x[..., None, None, None], Window(), dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_rows_need_no_window(device: torch.device) -> None:
    x = integers((70, 9), device)
    total = torch.zeros(1, 9, 9, device=device)
    assert ops.accumulate_hessian(total, x, backend="triton") == 70
    assert ops.accumulate_hessian(total, x[:3], backend="triton") == 3
    expected = x.mT @ x + x[:3].mT @ x[:3]
    torch.testing.assert_close(total[0].tril(), expected.tril(), rtol=0, atol=0)


@pytest.mark.parametrize("shape, window", CONVOLUTIONS)
def test_patches_of_integers_are_exact(
    shape: tuple[int, ...], window: Window, device: torch.device
) -> None:
    actual, expected = sums(integers(shape, device), window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape, window, chunk, launches",
    [
        ((70, 5, 1, 1, 1), Window(), 16, 5),
        ((2100, 3, 1, 1, 1), Window(), 512, 3),  # two programs share them
        ((5, 4, 1, 3, 4), Window((1, 2, 1), groups=2), 16, 3),
        ((3, 2, 1, 9, 8), Window((1, 3, 3)), 16, 3),  # an image has more rows, and is not cut
    ],
)
def test_many_rows_in_several_launches(
    shape: tuple[int, ...], window: Window, chunk: int, launches: int, dtype: torch.dtype,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each adds to those before it."""
    seen = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(grid)
            return launch[grid]

    launch = kernel._accumulate_hessian_kernel
    monkeypatch.setattr(kernel, "_accumulate_hessian_kernel", Counted())
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    actual, expected = sums(integers(shape, device), window, dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(seen) == launches


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16, torch.float64], ids=str)
def test_dtypes_of_inputs(dtype: torch.dtype, device: torch.device) -> None:
    window = Window((1, 3, 2), (1, 2, 1), (1, 1, 2), groups=2)
    actual, expected = sums(integers((2, 4, 1, 9, 8), device).to(dtype), window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
def test_products_are_not_rounded(dtype: torch.dtype, device: torch.device) -> None:
    """16-bit inputs are multiplied exactly and summed in float32."""
    x = torch.randn(300, 20, device=device).to(dtype)
    total = torch.zeros(1, 20, 20, device=device)
    ops.accumulate_hessian(total, x, backend="triton")
    expected = x.double().mT @ x.double()
    torch.testing.assert_close(total[0].tril().double(), expected.tril(), **TOLERANCE)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "transposed-space": lambda x: x.mT.contiguous().mT,
    "every-other-column": lambda x: torch.stack((x, x * torch.nan), 5).flatten(4)[..., ::2],
    "inner-part": lambda x: functional.pad(x, (1,) * 6, value=torch.nan)[:, :, 1:-1, 1:-1, 1:-1],
    "expanded-images": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(layout: str, device: torch.device) -> None:
    x = STRIDED[layout](integers((3, 4, 4, 7, 6), device))
    assert not x.is_contiguous()
    window = Window((2, 3, 1), (1, 2, 3), (2, 1, 1), groups=2)
    C = columns(x, window)
    actual, expected = (torch.zeros(2, C, C, device=device) for _ in range(2))
    ops.accumulate_hessian(actual, x, window, backend="triton")
    reference.accumulate_hessian(expected, x.contiguous(), window)
    torch.testing.assert_close(actual.tril(), expected.tril(), rtol=0, atol=0)


def test_transposed_total(device: torch.device) -> None:
    x = integers((70, 9), device)
    total = torch.zeros(1, 9, 18, device=device)[..., ::2].mT
    ops.accumulate_hessian(total, x, backend="triton")
    torch.testing.assert_close(total[0].tril(), (x.mT @ x).tril(), rtol=0, atol=0)


@pytest.mark.parametrize("shape, window", CONVOLUTIONS)
def test_patches_are_those_of_a_plain_loop(
    shape: tuple[int, ...], window: Window, device: torch.device
) -> None:
    x = integers(shape, device)
    expected = literal_patches(x, window)
    rows = expected.shape[1] // len(x)
    assert len(list(walk(window, shape[2:]))) == rows
    d, h, w = window.positions(shape[2:])
    assert d * h * w == rows
    torch.testing.assert_close(window.patches(x).mT, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape, window", [c for c in CONVOLUTIONS if c.id.startswith("2d")])
def test_patches_are_those_of_unfold(
    shape: tuple[int, ...], window: Window, device: torch.device
) -> None:
    x = integers(shape, device)
    each = shape[1] // window.groups
    options = [pair[1:] for pair in (window.size, window.dilation, (0, 0, 0), window.stride)]
    patches = window.patches(x)
    for g in range(window.groups):
        channels = x[:, g * each : (g + 1) * each, 0]
        unfolded = functional.unfold(channels, *options)  # [N, columns, positions]
        expected = unfolded.transpose(0, 1).flatten(1)
        torch.testing.assert_close(patches[g], expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape, window", CONVOLUTIONS)
def test_convolution_is_a_product_with_the_patches(
    shape: tuple[int, ...], window: Window, device: torch.device
) -> None:
    x = integers(shape, device)
    each = shape[1] // window.groups
    weight = integers((2 * window.groups, each, *window.size), device)
    expected = functional.conv3d(
        x, weight, stride=window.stride, dilation=window.dilation, groups=window.groups
    )
    flat = weight.unflatten(0, (window.groups, 2)).flatten(2)  # [groups, 2, columns]
    actual = (flat @ window.patches(x)).unflatten(2, (len(x), -1))  # [groups, 2, N, positions]
    torch.testing.assert_close(
        actual.permute(2, 0, 1, 3).flatten(1, 2), expected.flatten(2), rtol=0, atol=0
    )


def test_reference_takes_images_in_parts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = integers((5, 2, 1, 6, 7), device)
    window = Window((1, 3, 3))
    whole, parts = (torch.zeros(1, 18, 18, device=device) for _ in range(2))
    reference.accumulate_hessian(whole, x, window)
    monkeypatch.setattr(reference, "PATCH_ELEMENTS", 2 * 4 * 5 * 18)
    reference.accumulate_hessian(parts, x, window)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
