"""Experts that saw few tokens: their own Hessian, and with that of all experts as a prior.

    python -m benchmarks.accuracy.experts

Activations and weights of all-MiniLM-L6-v2 (see `minilm`), for lack of a trained mixture. The 1536
hidden units of three of its feed-forward blocks are cut into 8 experts of 192. A gate sends each
token to one of them: that whose center, the input of a token drawn at random, is nearest in
direction, with a bias that falls by SKEW standard deviations from expert to expert. Calibration on
2, 8 and 32 sequences of 256 tokens; errors on 64 others, of the tokens that each expert gets there:
tr((W - Q) H (W - Q)^T) / tr(W H W^T), means over experts, up and down projections apart. The prior
is what an expert's own layers make of all tokens; "mixed" what each expert makes of its own: hidden
units of different experts have nothing in common.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.accuracy.minilm import load
from sapq_triton import QuantSpec, layer_error, solve

BLOCKS, EXPERTS, SKEW = (0, 2, 4), 8, 0.35
SEQUENCES, HELD_OUT = (2, 8, 32), 64
STRENGTHS = {"C / 4": 0.25, "C": 1.0, "4 C": 4.0, "pool alone": torch.inf}
BUCKETS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # rows by columns


def hessian(x: Tensor) -> Tensor:
    return 2 / max(len(x), 1) * x.T @ x


def problems(bits: int) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Projection, rows by columns, and held-out error by method."""
    model, sequences = load()
    inputs: dict[int, Tensor] = {}
    for block in BLOCKS:
        layer = model.encoder.layer[block].intermediate
        layer.register_forward_pre_hook(lambda _, args, b=block: inputs.update({b: args[0]}))
    with torch.no_grad():
        model(input_ids=sequences[: HELD_OUT + max(SEQUENCES)])
    for block, x in inputs.items():
        up = model.encoder.layer[block].intermediate.dense
        down = model.encoder.layer[block].output.dense
        random = torch.Generator().manual_seed(block)
        flat = torch.nn.functional.normalize(x.flatten(0, 1) - x.mean((0, 1)), dim=1)
        centers = flat[torch.randint(len(flat), (EXPERTS,), generator=random)]
        score = flat @ centers.T
        score -= SKEW * score.std() * torch.arange(EXPERTS)
        routed = score.argmax(1).view(x.shape[:2])
        width = len(up.weight) // EXPERTS
        parts = []
        for expert in range(EXPERTS):
            units = slice(expert * width, (expert + 1) * width)
            first, last = up.weight[units].detach(), down.weight[:, units].detach()

            parts.append((expert, first, last, up.bias[units].detach()))
        for count in SEQUENCES:
            seen, new = slice(HELD_OUT, HELD_OUT + count), slice(0, HELD_OUT)
            for name in ("up", "down"):
                mine, tested, weights, pools = [], [], [], []
                everyone = x[seen].flatten(0, 1)
                for expert, first, last, bias in parts:
                    rows = [x[s][routed[s] == expert] for s in (seen, new)]
                    if name == "down":
                        rows = [torch.nn.functional.gelu(r @ first.T + bias) for r in rows]
                    mine.append(rows[0])
                    tested.append(rows[1])
                    weights.append(first if name == "up" else last)
                    made = torch.nn.functional.gelu(everyone @ first.T + bias)
                    pools.append(hessian(everyone if name == "up" else made))
                mixed = hessian(torch.cat(mine))
                for weight, own, other, pool in zip(weights, mine, tested, pools, strict=True):
                    if len(own) and len(other):
                        columns = weight.shape[1]
                        errors = compare(weight, own, pool, mixed, hessian(other), bits)
                        yield name, len(own) / columns, errors


def compare(
    weight: Tensor, own: Tensor, pool: Tensor, mixed: Tensor, test: Tensor, bits: int
) -> dict[str, float]:
    n, columns = own.shape
    hessians = {"own": hessian(own)} | {
        f"k = {name}": pool if k == torch.inf else (n * hessian(own) + k * columns * pool)
        / (n + k * columns)
        for name, k in STRENGTHS.items()
    } | {"k = C, mixed": (n * hessian(own) + columns * mixed) / (n + columns)}  # fmt: skip
    spec, energy = QuantSpec(bits), layer_error(weight, torch.zeros_like(weight), test)
    nearest = solve(weight, pool, spec, order="nearest")
    errors = {"nearest": (layer_error(weight, nearest.dequantize(), test) / energy).item()}
    for name, h in hessians.items():
        result = solve(weight, h, spec)
        errors[name] = (layer_error(weight, result.dequantize(), test) / energy).item()
    return errors


def main() -> None:
    torch.set_num_threads(1)
    for bits in (4, 3):
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        for name, ratio, errors in problems(bits):
            bucket = sum(ratio >= bound for bound in BUCKETS) - 1
            found.setdefault((name, bucket), []).append(errors)
        methods = list(next(iter(found.values()))[0])
        print(f"| W{bits}, rows / columns | experts | " + " | ".join(methods) + " |")
        print("|---" * (len(methods) + 2) + "|")
        for (name, bucket), all_errors in sorted(found.items(), reverse=True):
            means = [sum(e[m] for e in all_errors) / len(all_errors) for m in methods]
            high = BUCKETS[bucket + 1] if bucket + 1 < len(BUCKETS) else "∞"
            print(
                f"| {name}, {BUCKETS[bucket]:g}–{high} | {len(all_errors)} | "
                + " | ".join(f"{mean:.4f}" for mean in means)
                + " |",
                flush=True,
            )
        print()


if __name__ == "__main__":
    main()
