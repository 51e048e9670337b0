"""The device functions that every kernel rounds with, against torch, on all half-integers."""

import pytest
import torch
import triton
import triton.language as tl

from sapq_triton import reference
from sapq_triton.kernels.rounding import constants, nearest, round_half_even


@triton.jit
def _round_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, round_half_even(x), mask=i < n)


@triton.jit
def _grid_kernel(
    w_ptr, scale_ptr, zero_point_ptr, code_ptr, value_ptr, n, qmax,
    CODEBOOK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < n, other=0.0)
    scale = tl.load(scale_ptr + i, mask=i < n, other=1.0)
    zero_point = tl.load(zero_point_ptr + i, mask=i < n, other=0.0)
    code, value = nearest(w, scale, zero_point, qmax, CODEBOOK)
    tl.store(code_ptr + i, code, mask=i < n)
    tl.store(value_ptr + i, value, mask=i < n)


@pytest.mark.parametrize("low", [-(2**21), -1000, 2**21 - 1000], ids=["negative", "zero", "large"])
def test_half_integers_round_to_even(low: int, device: torch.device) -> None:
    x = torch.arange(2 * low, 2 * low + 4000, device=device) / 2
    near = torch.cat((x, x.nextafter(x + 1), x.nextafter(x - 1)))
    out = torch.empty_like(near)
    _round_kernel[(triton.cdiv(len(near), 1024),)](near, out, len(near), BLOCK=1024)
    torch.testing.assert_close(out, near.round(), rtol=0, atol=0)


@pytest.mark.parametrize("qmax", [3, 15, 255])
def test_codes_and_values_are_those_of_the_reference(qmax: int, device: torch.device) -> None:
    n = 5000
    scale = torch.rand(n, device=device) + 0.01
    zero_point = torch.randint(0, qmax + 1, (n,), device=device).float()
    # half the weights on or next to a tie, many beyond the grid
    w = torch.randint(-2 * qmax, 2 * qmax + 1, (n,), device=device) * scale / 2
    w[::2] = torch.randn(n // 2, device=device) * qmax * scale[::2]
    code, value = torch.empty_like(w), torch.empty_like(w)
    _grid_kernel[(triton.cdiv(n, 1024),)](
        w, scale, zero_point, code, value, n, *constants(qmax), BLOCK=1024
    )
    expected = reference.to_code(w, scale, zero_point, qmax)
    assert (expected == 0).any()
    assert (expected == qmax).any()
    torch.testing.assert_close(code, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        value, reference.to_value(expected, scale, zero_point, qmax), rtol=0, atol=0
    )
