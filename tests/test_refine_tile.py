"""refine_tile: bit for bit the reference where sums are exact, and never a worse tile."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference

SHAPES = [  # B, R, T, G
    pytest.param(1, 1, 16, 1, id="one-row"),
    pytest.param(1, 5, 1, 1, id="one-column"),
    pytest.param(1, 32, 48, 2, id="full-blocks"),
    pytest.param(2, 37, 21, 3, id="ragged"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def dyadic(B: int, R: int, T: int, G: int, device: torch.device) -> tuple[Arguments, Tensor]:
    """Arguments whose sums are exact in float32 in any order, and errors to start from.

    Weights and errors are multiples of 2**-8 up to 2, feedback of 2**-4 up to 1/4.
    """
    weight = torch.randint(-512, 513, (B, R, T), device=device) / 256
    running = weight + torch.randint(-64, 65, (B, R, T), device=device) / 256
    feedback = torch.randint(-4, 5, (B, T, T), device=device) / 16
    feedback += torch.diag_embed(torch.full((B, T), 1e6, device=device))  # must not count
    scale = 0.5 ** torch.randint(2, 4, (B, R, G), device=device)
    zero_point = torch.randint(4, 12, (B, R, G), device=device).float()
    group = torch.randint(0, G, (B, T), device=device)
    error = torch.randint(-64, 65, (B, R, T), device=device) / 256
    return (weight, running, feedback, scale, zero_point, group), error


def refine(arguments: Arguments, error: Tensor, sweeps: int, backend: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty(error.shape, dtype=torch.uint8, device=error.device)
    error = error.mT.clone(memory_format=torch.contiguous_format).mT  # the layout of the solver
    ops.refine_tile(*arguments, 15, codes, error, sweeps, backend=backend)
    return codes, error


def literal(arguments: Arguments, error: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """The docstring, one number at a time in the order of columns, in float64."""
    weight, running, feedback, scale, zero_point, group = (
        t.double() if t.is_floating_point() else t for t in arguments
    )
    B, _, T = weight.shape
    error = error.double().clone()
    codes = torch.zeros_like(error)
    for _ in range(sweeps):
        for b in range(B):
            for k in range(T):
                others = [j for j in range(T) if j != k]
                w = running[b, :, k] + error[b][:, others] @ feedback[b, others, k]
                s, z = scale[b, :, group[b, k]], zero_point[b, :, group[b, k]]
                codes[b, :, k] = ((w / s).round() + z).clamp(0, 15)
                error[b, :, k] = weight[b, :, k] - (codes[b, :, k] - z) * s
    return codes.to(torch.uint8), error.float()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("B, R, T, G", SHAPES)
def test_dyadic_tiles_are_exact(
    B: int, R: int, T: int, G: int, sweeps: int, backend: str, device: torch.device
) -> None:
    arguments, error = dyadic(B, R, T, G, device)
    actual = refine(arguments, error, sweeps, backend)
    for a, e in zip(actual, literal(arguments, error, sweeps), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_each_sweep_lowers_the_error_of_every_row(device: torch.device) -> None:
    """With feedback K_jk / K_kk a step minimizes e K e^T over one code, so no row can lose."""
    B, R, T = 2, 33, 24
    x = torch.randn(B, 3 * T, T, device=device) @ torch.randn(B, T, T, device=device)
    curvature = x.mT @ x / T
    feedback = curvature / curvature.diagonal(dim1=1, dim2=2)[:, None, :]
    weight = torch.randn(B, R, T, device=device)
    scale = torch.full((B, R, 1), 0.25, device=device)
    zero_point = torch.full((B, R, 1), 8.0, device=device)
    group = torch.zeros(B, T, dtype=torch.int64, device=device)
    grid = (scale, zero_point, group, 15)
    codes = reference.to_code(weight, scale, zero_point, 15).to(torch.uint8)
    error = weight - reference.to_value(codes.float(), scale, zero_point)

    def loss() -> Tensor:
        e = error.double()
        return ((e @ curvature.double()) * e).sum(2)

    before = [loss()]
    for _ in range(3):
        ops.refine_tile(weight, weight, feedback, *grid, codes, error, 1, backend="triton")
        before.append(loss())
    for earlier, later in pairwise(before):
        assert (later <= earlier * (1 + 1e-5)).all()
    assert before[-1].sum() < 0.8 * before[0].sum()
    value = reference.to_value(codes.float(), scale, zero_point)
    torch.testing.assert_close(error, weight - value, rtol=0, atol=0)


def test_rows_beyond_the_tile_are_not_written(device: torch.device) -> None:
    """Codes and errors cut out of larger buffers, as the solver passes them."""
    arguments, error = dyadic(1, 5, 21, 1, device)
    codes_buffer = torch.full((1, 40, 9), 77, dtype=torch.uint8, device=device)
    error_buffer = torch.full((1, 40, 9), 7.0, device=device)
    codes, out = codes_buffer[:, 3:24, 2:7].mT, error_buffer[:, 3:24, 2:7].mT
    out.copy_(error)
    ops.refine_tile(*arguments, 15, codes, out, 2, backend="triton")
    expected_codes, expected = literal(arguments, error, 2)
    torch.testing.assert_close(codes, expected_codes, rtol=0, atol=0)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for buffer, mark in ((codes_buffer, 77), (error_buffer, 7.0)):
        inner = torch.zeros_like(buffer, dtype=torch.bool)
        inner[:, 3:24, 2:7] = True
        assert (buffer[~inner] == mark).all()


def test_wrong_shapes_are_named(device: torch.device) -> None:
    arguments, error = dyadic(1, 5, 21, 1, device)
    codes = torch.empty(1, 5, 20, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"codes must be \[1, 5, 21\], got \[1, 5, 20\]"):
        ops.refine_tile(*arguments, 15, codes, error, 1, backend="triton")
