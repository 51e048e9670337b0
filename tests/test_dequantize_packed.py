"""dequantize_packed: bit for bit what a loop over codes gives."""

import pytest
import torch

from sapq_triton import ops, reference
from sapq_triton.packing import pack

BITS = range(2, 9)
SHAPES = [  # R, C, G
    pytest.param(1, 1, 1, id="one-code"),
    pytest.param(5, 37, 1, id="one-group"),
    pytest.param(6, 300, 12, id="groups"),
    pytest.param(3, 66, 22, id="groups-of-three"),
]
DTYPES = [torch.float16, torch.float32, torch.float64]
# the interpreter rounds to bfloat16 in its own way (triton 3.9)
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype", [*DTYPES, BFLOAT16], ids=str)
@pytest.mark.parametrize("R, C, G", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_matches_codes_and_reference(
    bits: int, R: int, C: int, G: int, dtype: torch.dtype, device: torch.device
) -> None:
    codes = torch.randint(0, 2**bits, (R, C), dtype=torch.uint8, device=device)
    zero_point = torch.randint(0, 2**bits, (R, G), dtype=torch.uint8, device=device)
    scale = torch.rand(R, G, device=device).half()
    middle = torch.full_like(zero_point, 2 ** (bits - 1))
    for zeros, qzeros in ((zero_point, pack(zero_point, bits)), (middle, None)):
        each = (t.repeat_interleave(C // G, 1).float() for t in (zeros, scale))
        expected = ((codes.float() - next(each)) * next(each)).to(dtype)
        for backend in ("reference", "triton"):
            weight = ops.dequantize_packed(
                pack(codes, bits), scale, qzeros, bits, C, dtype, backend
            )
            assert weight.dtype == dtype
            torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_any_strides(device: torch.device) -> None:
    codes = torch.randint(0, 8, (7, 100), dtype=torch.uint8, device=device)
    zero_point = torch.randint(0, 8, (7, 5), dtype=torch.uint8, device=device)
    tensors = pack(codes, 3), torch.rand(7, 5, device=device), pack(zero_point, 3)
    expected = reference.dequantize_packed(*tensors, 3, 100, torch.float32)
    reordered = [t.T.contiguous().T for t in tensors]
    weight = ops.dequantize_packed(*reordered, 3, 100, torch.float32, "triton")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_operator_is_registered_as_torch_asks(device: torch.device) -> None:
    codes = torch.randint(0, 8, (7, 100), dtype=torch.uint8, device=device)
    arguments = pack(codes, 3), torch.rand(7, 5, device=device), None, 3, 100, torch.float16
    operator = torch.ops.sapq_triton.dequantize_packed.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_rows(device: torch.device) -> None:
    qweight, scale = torch.empty(0, 4, device=device).int(), torch.empty(0, 1, device=device)
    for backend in ("reference", "triton"):
        weight = ops.dequantize_packed(qweight, scale, None, 4, 32, torch.float16, backend)
        assert weight.shape == (0, 32) and weight.dtype == torch.float16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"columns": 40}, r"where G divides 40 columns, got \[5, 3\]"),
        ({"columns": 33}, r"qweight must be \[5, 5\], got \[5, 4\]"),
        ({"columns": 0}, "where G divides 0 columns"),
        ({"dtype": torch.int8}, "dtype must be one of .* got torch.int8"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    usual = {
        "qweight": torch.zeros(5, 4, dtype=torch.int32),
        "scale": torch.ones(5, 3),
        "qzeros": None,
        "bits": 4,
        "columns": 30,
        "dtype": torch.float16,
    }
    assert ops.dequantize_packed(**usual).shape == (5, 30)
    with pytest.raises(ValueError, match=message):
        ops.dequantize_packed(**(usual | changes))
