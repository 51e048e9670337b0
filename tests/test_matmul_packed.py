"""matmul_packed: exact on small integers, elsewhere as close as its sums and one rounding are."""

import pytest
import torch
from torch import Tensor

from sapq_triton import ops, reference
from sapq_triton.kernels import launch
from sapq_triton.packing import pack, period, words

BITS = range(2, 9)
# the interpreter multiplies the bit patterns of bfloat16 operands (triton 3.9)
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16")
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    BFLOAT16,
]
CASES = [  # bits, M, N, K, G
    *[pytest.param(bits, 3, 5, 37, 1, id=f"{bits}-bits") for bits in BITS],
    *[pytest.param(bits, 2, 5, 120, 15, id=f"{bits}-bits-groups") for bits in (3, 7)],
    pytest.param(4, 17, 33, 256, 2, id="block-in-a-group"),
    pytest.param(3, 1, 5, 192, 6, id="period-in-a-group"),
    pytest.param(4, 3, 5, 99, 11, id="period-over-groups"),
    pytest.param(4, 40, 5, 128, 16, id="many-rows"),
    pytest.param(3, 35, 3, 70, 2, id="many-rows-odd"),
]
SHAPES = [  # M, N, K, G
    pytest.param(3, 37, 1056, 1, id="one-group"),
    pytest.param(17, 33, 1024, 2, id="block-in-a-group"),
    pytest.param(40, 5, 512, 8, id="many-rows"),
    pytest.param(5, 37, 384, 12, id="period-in-a-group"),
    pytest.param(4, 9, 165, 33, id="period-over-groups"),
    pytest.param(35, 70, 99, 11, id="many-rows-odd"),
]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, int]


def integers(
    M: int, N: int, K: int, G: int, bits: int, symmetric: bool, dtype: torch.dtype, device: object
) -> Arguments:
    """Rows of -3 to 3, scales that are powers of two: all sums are exact in float32.

    The bits behind the last code are 1: they must not count.
    """
    x = torch.randint(-3, 4, (M, K)).to(device, dtype)
    qweight = pack(torch.randint(0, 2**bits, (N, K), dtype=torch.uint8), bits)
    if K * bits % 32:
        qweight[:, -1] |= -1 << K * bits % 32
    scale = 2.0 ** torch.randint(-2, 1, (N, G))
    qzeros = pack(torch.randint(0, 2**bits, (N, G), dtype=torch.uint8), bits).to(device)
    return x, qweight.to(device), scale.to(device), None if symmetric else qzeros, bits


def literal(x: Tensor, qweight: Tensor, scale: Tensor, qzeros: Tensor | None, bits: int) -> Tensor:
    """One code after another, in Python's integers and float64."""

    def code(row: list[int], i: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(row))
        return stream >> (bits * i) & (2**bits - 1)

    N, G = scale.shape
    K = x.shape[1]
    weight = torch.zeros(N, K, dtype=torch.float64)
    for n, row in enumerate(qweight.tolist()):
        for k in range(K):
            g = k // (K // G)
            zero = 2 ** (bits - 1) if qzeros is None else code(qzeros[n].tolist(), g)
            weight[n, k] = (code(row, k) - zero) * scale[n, g].item()
    return x.double().cpu() @ weight.T


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_reference_is_the_literal_sum(bits: int, symmetric: bool) -> None:
    arguments = integers(2, 3, 45, 5, bits, symmetric, torch.float32, "cpu")
    expected = literal(*arguments)
    for result in (
        reference.matmul_packed(*arguments).double(),
        reference.matmul_packed(arguments[0].double(), *arguments[1:]),
        ops.matmul_packed(*arguments).double(),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K, G", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_exact_at_any_size(
    bits: int, M: int, N: int, K: int, G: int, dtype: torch.dtype, device: torch.device
) -> None:
    test_integers_are_exact(bits, M, N, K, G, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, M, N, K, G", CASES)
def test_integers_are_exact(
    bits: int, M: int, N: int, K: int, G: int, dtype: torch.dtype, device: torch.device
) -> None:
    for symmetric in (False, True):
        arguments = integers(M, N, K, G, bits, symmetric, dtype, device)
        y = ops.matmul_packed(*arguments, "ieee", "triton")
        expected = reference.matmul_packed(arguments[0].double(), *arguments[1:])
        torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale_dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow, id="float32"),
        pytest.param(torch.float16, id="float16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("bits, M, N, K, G", CASES[9:])
def test_bound(
    bits: int,
    M: int,
    N: int,
    K: int,
    G: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Roundings of float32 sums, of y, and of weights where the contract says so."""
    x, qweight, scale, qzeros, _ = integers(M, N, K, G, bits, False, dtype, device)
    x = torch.randn(M, K, device=device).to(dtype)
    scale = torch.rand(N, G, device=device).add(0.01).to(scale_dtype)
    y = ops.matmul_packed(x, qweight, scale, qzeros, bits, "ieee", "triton")
    expected = reference.matmul_packed(x.double(), qweight, scale, qzeros, bits)
    largest = x.double().abs() @ (scale.double() * 2**bits).repeat_interleave(K // G, 1).T
    whole = M <= ops.FEW_ROWS and (G == 1 or K // G % (16 * period(bits)[0]) == 0)
    rounded = 0.0 if whole or dtype == torch.float32 else torch.finfo(dtype).eps / 2
    bound = largest * (rounded / 2 + 16 * torch.finfo(torch.float32).eps)
    bound += expected.abs() * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("G", [1, 4])
def test_a_weight_of_16_bits_is_rounded_once(G: int, device: torch.device) -> None:
    """One weight per element of y, of scales that 16 bits do not hold."""
    codes = torch.randint(0, 8, (40, 16), dtype=torch.uint8, device=device)
    scale = torch.rand(40, G, device=device) + 0.5
    x = torch.eye(16, dtype=torch.float16, device=device)
    y = ops.matmul_packed(x, pack(codes, 3), scale, None, 3, "ieee", "triton")
    expected = ((codes.float() - 4) * scale.repeat_interleave(16 // G, 1)).half()
    torch.testing.assert_close(y, expected.T, rtol=0, atol=0)


def test_any_strides(device: torch.device) -> None:
    x, qweight, scale, qzeros, bits = integers(6, 10, 160, 5, 3, False, torch.float32, device)
    expected = reference.matmul_packed(x.double(), qweight, scale, qzeros, bits).float()
    assert qzeros is not None
    wide = torch.full((12, 330), torch.nan, device=device)
    wide[::2, 5:325:2] = x
    reordered = [t.T.contiguous().T for t in (qweight, scale, qzeros)]
    for rows in (wide[::2, 5:325:2], x.T.contiguous().T):
        y = ops.matmul_packed(rows, *reordered, bits, "ieee", "triton")
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for count in (9, ops.FEW_ROWS + 1):
        one_row = x[:1].expand(count, -1)
        y = ops.matmul_packed(one_row, *reordered, bits, "ieee", "triton")
        torch.testing.assert_close(y, expected[:1].expand(count, -1), rtol=0, atol=0)


def test_infinities_behind_the_last_column_do_not_count(device: torch.device) -> None:
    x, *rest = integers(4, 6, 50, 2, 3, False, torch.float32, device)
    beside = torch.full((4, 128), torch.inf, device=device)
    beside[:, :50] = x
    y = ops.matmul_packed(beside[:, :50], *rest, "ieee", "triton")
    torch.testing.assert_close(y, reference.matmul_packed(x, *rest), rtol=0, atol=0)


def test_splits_of_the_columns_add_up(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many programs as blocks, and one for all of them."""
    from sapq_triton.kernels import matmul_packed as kernel

    arguments = integers(3, 5, 900, 2, 4, False, torch.float16, device)
    expected = reference.matmul_packed(arguments[0].double(), *arguments[1:]).half()
    monkeypatch.setattr(kernel, "LEAST_BLOCKS", 1)
    for programs in (1, 3, 1000):
        monkeypatch.setattr(kernel, "PROGRAMS", programs)
        y = ops.matmul_packed(*arguments, "ieee", "triton")
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_the_same_every_time(device: torch.device) -> None:
    x, *rest = integers(3, 5, 512, 4, 4, False, torch.float32, device)
    x = torch.randn_like(x)
    first, second = (ops.matmul_packed(x, *rest, "tf32x3", "triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_blocks_have_the_same_result(dtype: torch.dtype, device: torch.device) -> None:
    arguments = integers(20, 37, 300, 1, 4, False, dtype, device)
    expected = reference.matmul_packed(arguments[0].double(), *arguments[1:]).to(dtype)
    entry = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_P": 64, "num_warps": 1}
    with launch.override("matmul_packed ieee", entry):
        y = ops.matmul_packed(*arguments, "ieee", "triton")
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("M, N", [(0, 5), (3, 0)])
def test_nothing_to_do(M: int, N: int, backend: str, device: torch.device) -> None:
    x, scale = torch.zeros(M, 8, device=device), torch.ones(N, 1, device=device)
    qweight = torch.zeros(N, 1, dtype=torch.int32, device=device)
    assert ops.matmul_packed(x, qweight, scale, None, 4, "ieee", backend).shape == (M, N)


def test_gradient_of_the_input(device: torch.device) -> None:
    x, qweight, scale, qzeros, bits = integers(3, 5, 24, 2, 4, False, torch.float32, device)
    x.requires_grad_()
    y = ops.matmul_packed(x, qweight, scale, qzeros, bits, "ieee", "triton")
    y.backward(torch.arange(15.0, device=device).view(3, 5))
    weight = reference.dequantize_packed(qweight, scale, qzeros, bits, 24, torch.float32)
    expected = torch.arange(15.0, device=device).view(3, 5) @ weight
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_operator_is_registered_as_torch_asks(device: torch.device) -> None:
    x, *rest = integers(3, 5, 24, 2, 4, False, torch.float32, device)
    operator = torch.ops.sapq_triton.matmul_packed.default
    torch.library.opcheck(operator, (x.requires_grad_(), *rest))


def changed(**changes: object) -> dict[str, object]:
    zeros = torch.zeros(5, 4, dtype=torch.int32)
    usual = {"x": torch.ones(2, 30), "qweight": zeros, "scale": torch.ones(5, 3), "bits": 4}
    return usual | {"qzeros": zeros[:, :1]} | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.ones(30)}, r"x must be \[M, K\] of float16, bfloat16 or float32, got \[30\]"),
        ({"x": torch.ones(2, 30).double()}, r"got \[2, 30\] of torch.float64"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"scale": torch.ones(5)}, r"scale must be \[R, G\] where G divides 30 columns, got \[5\]"),
        ({"scale": torch.ones(5, 4)}, r"where G divides 30 columns, got \[5, 4\]"),
        ({"scale": torch.ones(5, 3).int()}, "scale must be floating point, got torch.int32"),
        ({"x": torch.ones(2, 33)}, r"qweight must be \[5, 5\], got \[5, 4\]"),
        ({"qweight": torch.zeros(5, 4)}, "qweight must be int32, got torch.float32"),
        ({"qzeros": torch.zeros(5, 2).int()}, r"qzeros must be \[5, 1\], got \[5, 2\]"),
        ({"qzeros": torch.zeros(5, 1).long()}, "qzeros must be int32, got torch.int64"),
        ({"precision": "fp32"}, "precision must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    assert ops.matmul_packed(**changed()).shape == (2, 5)
    with pytest.raises(ValueError, match=message):
        ops.matmul_packed(**changed(**changes))


def test_padding_is_no_code() -> None:
    """The test data has set bits behind the last code, else the tests above would see nothing."""
    _, qweight, *_ = integers(1, 2, 45, 5, 3, False, torch.float32, "cpu")
    assert qweight.shape == (2, words(45, 3)) and (qweight[:, -1] >> 7 == -1).all()
