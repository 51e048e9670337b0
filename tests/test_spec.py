"""QuantSpec: what it derives, and every value that it refuses."""

import dataclasses
import math
from typing import Any

import pytest

from sapq_triton import QuantSpec

REFUSED = [  # arguments, message
    pytest.param({"bits": 1}, r"bits must be an integer from 2 to 8, got 1$", id="bits-1"),
    pytest.param({"bits": 9}, r"bits must be .* got 9$", id="bits-9"),
    pytest.param({"bits": 4.0}, r"bits must be .* got 4\.0", id="bits-float"),
    pytest.param({"bits": True}, r"bits must be .* got True", id="bits-bool"),
    pytest.param({"bits": "4"}, r"bits must be .* got '4'", id="bits-text"),
    pytest.param({"group_size": 0}, r"group_size must be positive, or -1 .* got 0$", id="group-0"),
    pytest.param(
        {"group_size": -2}, r"group_size must be positive, or -1 .* got -2$", id="group--2"
    ),
    pytest.param(
        {"group_size": 32.0}, r"group_size must be an integer, got 32\.0", id="group-float"
    ),
    pytest.param({"group_size": True}, r"group_size must be an integer, got True", id="group-bool"),
    pytest.param({"group_size": None}, r"group_size must be an integer, got None", id="group-none"),
    pytest.param({"symmetric": 1}, r"symmetric must be True or False, got 1$", id="symmetric-1"),
    pytest.param(
        {"symmetric": None}, r"symmetric must be True or False, got None", id="symmetric-none"
    ),
    pytest.param(
        {"scale_search": "mean"},
        r"scale_search must be one of \('absmax', 'mse', 'hessian'\), got 'mean'",
        id="search-unknown",
    ),
    pytest.param(
        {"scale_search": ["mse"]}, r"scale_search must be .* got \['mse'\]", id="search-list"
    ),
    pytest.param(
        {"scale_dtype": "float64"},
        r"scale_dtype must be one of \('float32', .*'power-of-two', 'uint8'\), got 'float64'",
        id="scale-float64",
    ),
    pytest.param({"scale_dtype": None}, r"scale_dtype must be .* got None", id="scale-none"),
    pytest.param(
        {"codebook": "nf3", "symmetric": True},
        r"codebook must be one of \('int', 'nf4', 'fp4'\), got 'nf3'",
        id="codebook-unknown",
    ),
    pytest.param(
        {"codebook": "nf4", "symmetric": True, "bits": 3},
        r"codebook 'nf4' has 16 levels: bits must be 4, got 3",
        id="codebook-bits",
    ),
    pytest.param(
        {"codebook": "fp4"},
        r"codebook 'fp4' has no zero point: symmetric must be True, got False",
        id="codebook-asymmetric",
    ),
    pytest.param(
        {"codebook": "fp4", "symmetric": True, "sparsity": 0.5},
        r"sparsity 0.5 needs the integers: codebook must be 'int', got 'fp4'",
        id="codebook-sparse",
    ),
    *(
        pytest.param({"sparsity": value}, message, id=f"sparsity-{value}")
        for value, message in [
            ("5:4", r"sparsity must be .N:M. with 0 < N < M, a share .* or None, got '5:4'$"),
            ("4:4", r"sparsity must be .* got '4:4'"),
            ("0:4", r"sparsity must be .* got '0:4'"),
            ("2:", r"sparsity must be .* got '2:'"),
            ("2:4:8", r"sparsity must be .* got '2:4:8'"),
            ("-2:4", r"sparsity must be .* got '-2:4'"),
            ("2:4\n", r"sparsity must be .* got '2:4\\n'"),
            ("50%", r"sparsity must be .* got '50%'"),
            (-1, r"sparsity must be .* got -1"),
            (1, r"sparsity must be .* got 1"),
            (1.5, r"sparsity must be .* got 1\.5"),
            (math.nan, r"sparsity must be .* got nan"),
            (True, r"sparsity must be .* got True"),
            ((2, 4), r"sparsity must be .* got \(2, 4\)"),
        ]
    ),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_bad_value_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


@pytest.mark.parametrize("columns, group_size", [(96, 64), (7, 2), (4, 8), (1, 3)])
def test_group_size_that_does_not_divide(columns: int, group_size: int) -> None:
    """The message lists what would be legal, and all of that is."""
    with pytest.raises(ValueError, match=f"{group_size} does not divide {columns} col") as caught:
        QuantSpec(group_size=group_size).columns_per_group(columns)
    listed = str(caught.value).partition("legal are -1 and [")[2].rstrip("]")
    legal = [int(size) for size in listed.split(", ")]
    assert legal == [size for size in range(1, columns + 1) if columns % size == 0]
    assert all(QuantSpec(group_size=size).columns_per_group(columns) == size for size in legal)


@pytest.mark.parametrize("group_size, expected", [(-1, 96), (96, 96), (32, 32), (1, 1)])
def test_columns_per_group(group_size: int, expected: int) -> None:
    assert QuantSpec(group_size=group_size).columns_per_group(96) == expected


@pytest.mark.parametrize("bits, qmax", [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_qmax(bits: int, qmax: int) -> None:
    assert QuantSpec(bits).qmax == qmax


def test_shrink() -> None:
    searched = QuantSpec(scale_search="mse").shrink
    assert (len(searched), searched[0], searched[-1]) == (80, 1.0, pytest.approx(0.21))
    assert list(searched) == sorted(searched, reverse=True)
    assert QuantSpec(scale_search="absmax").shrink == (1.0,)


@pytest.mark.parametrize(
    "sparsity, n_of_m, share",
    [(None, None, 0), ("2:4", (2, 4), 0), ("7:32", (7, 32), 0), (0.5, None, 0.5), (0, None, 0)],
)
def test_sparsity(
    sparsity: str | float | None, n_of_m: tuple[int, int] | None, share: float
) -> None:
    spec = QuantSpec(sparsity=sparsity)
    assert (spec.n_of_m, spec.share) == (n_of_m, share)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3  # type: ignore[misc]
    assert QuantSpec(3) == QuantSpec(bits=3) and len({QuantSpec(3), QuantSpec(3)}) == 1
