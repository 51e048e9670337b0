"""Bit streams of codes against a loop over single bits in Python."""

import pytest
import torch
from torch import Tensor

from sapq_triton.packing import pack, period, unpack, words

BITS = range(2, 9)
COUNTS = [1, 7, 31, 32, 33, 96, 100]


def literal(row: list[int], bits: int) -> list[int]:
    """The words of one row: all codes as one large integer, cut into pieces of 32 bits."""
    stream = sum(code << (bits * i) for i, code in enumerate(row))
    unsigned = [stream >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def random_codes(*shape: int, bits: int) -> Tensor:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    codes[..., -1] = 2**bits - 1
    return codes


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_one_large_integer(bits: int, count: int) -> None:
    codes = random_codes(3, count, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, words(count, bits))
    assert packed.tolist() == [literal(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits: int, count: int) -> None:
    codes = random_codes(2, 3, count, bits=bits)
    torch.testing.assert_close(unpack(pack(codes, bits), bits, count), codes, rtol=0, atol=0)
    strided = random_codes(count, 5, bits=bits).T
    torch.testing.assert_close(unpack(pack(strided, bits), bits, count), strided, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_place(bits: int) -> None:
    lanes, _ = period(bits)
    codes = torch.arange(2**bits, dtype=torch.uint8)[:, None].repeat(1, 2 * lanes)
    codes[:, ::2] = 2**bits - 1 - codes[:, ::2]
    torch.testing.assert_close(unpack(pack(codes, bits), bits, 2 * lanes), codes, rtol=0, atol=0)


def test_no_rows() -> None:
    assert unpack(pack(torch.empty(0, 8, dtype=torch.uint8), 4), 4, 8).shape == (0, 8)


def test_refuses_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="codes of 3 bits must be below 8, got 8"):
        pack(torch.tensor([[1, 8]], dtype=torch.uint8), 3)


@pytest.mark.parametrize(
    "packed", [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)]
)
def test_refuses_another_number_of_words(packed: Tensor) -> None:
    with pytest.raises(ValueError, match="32 codes of 4 bits lie in 4 int32 words, got"):
        unpack(packed, 4, 32)
