"""Codes as a stream of bits in int32 words: the layout that GPTQ and compressed-tensors share.

Code i of a row lies at bit i * bits, counted from the lowest bit of the first word; codes of 3,
5, 6 and 7 bits straddle words. Plain PyTorch, which torch.compile and torch.export can follow.
"""

import math

import torch
from torch import Tensor

WORD = 32  # bits


def words(count: int, bits: int) -> int:
    """How many words hold `count` codes of one row."""
    return -(-count * bits // WORD)


def period(bits: int) -> tuple[int, int]:
    """Codes and words after which the pattern of a stream repeats: 3 bits, 32 codes in 3 words."""
    codes = WORD // math.gcd(bits, WORD)
    return codes, codes * bits // WORD


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n]  ->  int32 [..., words(n, bits)]; bits left over at its end are 0

    ValueError for codes that do not fit.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {bits} bits must be below {2**bits}, got {int(codes.max())}")
    count = codes.shape[-1]
    lanes, span = period(bits)
    padded = torch.nn.functional.pad(codes, (0, -count % lanes))
    stream = padded.to(torch.int64).unflatten(-1, (padded.shape[-1] // lanes, lanes))
    packed = stream.new_zeros(*stream.shape[:-1], span)
    for lane in range(lanes):
        word, shift = divmod(lane * bits, WORD)
        value = stream[..., lane] << shift
        packed[..., word] |= value & 0xFFFFFFFF
        if shift + bits > WORD:
            packed[..., word + 1] |= value >> WORD
    packed -= (packed >> 31) << WORD  # the same bits, as a signed number
    return packed.flatten(-2)[..., : words(count, bits)].to(torch.int32).contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [..., words(count, bits)]  ->  uint8 [..., count]; ValueError for another width."""
    if packed.dtype != torch.int32 or packed.shape[-1] != words(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits lie in {words(count, bits)} int32 words, "
            f"got {packed.shape[-1]} of {packed.dtype}"
        )
    lanes, span = period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % span))
    stream = padded.unflatten(-1, (padded.shape[-1] // span, span))
    codes = []
    for lane in range(lanes):
        word, shift = divmod(lane * bits, WORD)
        code = stream[..., word] >> shift
        if shift + bits > WORD:  # the sign that was shifted in gives way to the next word's bits
            low = WORD - shift
            code = code & (2**low - 1) | (stream[..., word + 1] << low)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, -1).flatten(-2)[..., :count]
