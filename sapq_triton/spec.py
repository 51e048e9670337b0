"""What a quantized weight may look like: bits, groups, symmetry, and how its scale is found."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from .codebook import FP4, NF4, Codebook

ScaleSearch = Literal["absmax", "mse", "hessian"]
ScaleDtype = Literal["float32", "float16", "bfloat16", "power-of-two", "uint8"]
CodebookName = Literal["int", "nf4", "fp4"]
Starts = int | Literal["obq"]
Order = Literal[
    "sensitivity", "sensitivity-static", "activation", "min-pivot", "natural", "obq", "nearest"
]

# the range of a group is shrunk to these fractions of its extremes; the first one that wins stays
MSE_SHRINK = tuple(1 - step / 100 for step in range(80))


@dataclass(frozen=True)
class QuantSpec:
    """A grid per group of columns: of integers, or with a codebook of 16 levels.

        codes = clamp(round(w / scale) + zero_point, 0, 2**bits - 1)
        w     ~ (codes - zero_point) * scale

        codes = those of the levels nearest to w / scale
        w     ~ levels[codes] * scale

    bits: 2 to 8. group_size: columns that share a scale and a zero point, counted in the original
    column order; -1 is one group per row (per output channel). symmetric: the zero point is the
    middle code, 2**(bits - 1). scale_search: "absmax" spans the whole range of the group, "mse"
    shrinks it to the fraction (1.00, 0.99, ..., 0.21) of least squared rounding error, "hessian" to
    that of least rounding error weighted by what it costs after compensation, sum e_c^2 / A_cc with
    A the inverse Hessian; it needs one.
    scale_dtype: scales are rounded to it before the first column is quantized, so that a file that
    stores them so changes nothing: "float16" for GPTQ files, "power-of-two" for the E8M0 of OCP MX,
    "uint8" for double quantization as in QLoRA, (m + 1) / 256 of the largest scale of the row, m
    uint8 and that scale float16; it pays where a row has many groups. See `scales.snapped`.
    codebook: "int" is the integers. "nf4" is NormalFloat (QLoRA, arXiv 2305.14314), "fp4" E2M1 (OCP
    MX), its codes as they are stored there: 4 bits and symmetric only, and no zero point, which is
    0 wherever one is asked for.
    sparsity: weights that are exactly zero, whose code is the zero point: at least this share of
    all (0.5), or in each row all but N of each M consecutive columns ("2:4", N:M; of a convolution
    M consecutive input channels at one position of its window). None: as rounding has it.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    scale_search: ScaleSearch = "mse"
    scale_dtype: ScaleDtype = "float32"
    codebook: CodebookName = "int"
    sparsity: str | float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise ValueError(f"group_size must be an integer, got {self.group_size!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size must be positive, or -1 for one group per row, got {self.group_size}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.scale_search not in get_args(ScaleSearch):
            raise ValueError(
                f"scale_search must be one of {get_args(ScaleSearch)}, got {self.scale_search!r}"
            )
        if self.scale_dtype not in get_args(ScaleDtype):
            raise ValueError(
                f"scale_dtype must be one of {get_args(ScaleDtype)}, got {self.scale_dtype!r}"
            )
        if self.codebook not in get_args(CodebookName):
            raise ValueError(
                f"codebook must be one of {get_args(CodebookName)}, got {self.codebook!r}"
            )
        if self.codebook != "int" and self.bits != 4:
            raise ValueError(
                f"codebook {self.codebook!r} has 16 levels: bits must be 4, got {self.bits}"
            )
        if self.codebook != "int" and not self.symmetric:
            raise ValueError(
                f"codebook {self.codebook!r} has no zero point: symmetric must be True, got False"
            )
        if self.codebook != "int" and self.sparsity is not None:
            raise ValueError(
                f"sparsity {self.sparsity!r} needs the integers: codebook must be 'int', "
                f"got {self.codebook!r}"
            )
        if self.sparsity is not None and not _is_sparsity(self.sparsity):
            raise ValueError(
                'sparsity must be "N:M" with 0 < N < M, a share from 0 to below 1, or None, '
                f"got {self.sparsity!r}"
            )

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def levels(self) -> int | Codebook:
        """What the operations round to: the integers up to the largest code, or a codebook."""
        return {"nf4": NF4, "fp4": FP4}.get(self.codebook, self.qmax)

    @property
    def shrink(self) -> tuple[float, ...]:
        """Fractions of the full range that the scale search tries, in the order it tries them."""
        return (1.0,) if self.scale_search == "absmax" else MSE_SHRINK

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) where the sparsity is "N:M"."""
        if not isinstance(self.sparsity, str):
            return None
        n, m = self.sparsity.split(":")
        return int(n), int(m)

    @property
    def share(self) -> float:
        """The share of zeros where the sparsity is a number, else 0."""
        return 0.0 if self.sparsity is None or isinstance(self.sparsity, str) else self.sparsity

    def columns_per_group(self, columns: int) -> int:
        """The group size for a weight of `columns` columns, or ValueError if it does not divide."""
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            divisors = [size for size in range(1, columns + 1) if columns % size == 0]
            raise ValueError(
                f"group_size {self.group_size} does not divide {columns} columns; "
                f"legal are -1 and {divisors}"
            )
        return self.group_size


def check_bits(bits: Iterable[int]) -> tuple[int, ...]:
    """Several widths, ascending; ValueError for none, and for what `QuantSpec` refuses."""
    if not isinstance(bits, Iterable):
        raise ValueError(f"bits must be an iterable of integers from 2 to 8, got {bits!r}")
    widths = tuple(bits)
    for width in widths:
        QuantSpec(bits=width)
    if not widths:
        raise ValueError("bits is empty: at least one width is needed")
    return tuple(sorted(set(widths)))


def _is_sparsity(value: object) -> bool:
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]+):([0-9]+)", value)
        return found is not None and 0 < int(found[1]) < int(found[2])
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1
