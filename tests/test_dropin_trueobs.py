"""TrueOBS with the published signature: quantization, N:M and unstructured pruning."""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.dropin import TrueOBS
from sapq_triton.layers import weight_matrix

Problem = tuple[nn.Module, Tensor]


def linear(columns: int = 16, rows: int = 7) -> Problem:
    x = torch.randn(200, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    return nn.Linear(columns, rows), x * torch.rand(columns).add(0.3)


LAYERS: list[Any] = [
    pytest.param(linear, id="linear"),
    pytest.param(lambda: (nn.Conv2d(4, 5, 2), torch.randn(5, 4, 7, 8)), id="conv2d"),
    pytest.param(
        lambda: (nn.Conv2d(8, 6, 2, groups=2), torch.randn(5, 8, 7, 8)), id="conv2d-groups"
    ),
    pytest.param(lambda: (nn.Conv1d(4, 5, 3), torch.randn(9, 4, 12)), id="conv1d"),
]


def prepared(problem: Problem, *args: Any, **options: Any) -> TrueOBS:
    layer, inputs = problem
    obs = TrueOBS(copy.deepcopy(layer), *args, **options)
    for batch in inputs.split(-(-len(inputs) // 2)):
        obs.add_batch(batch, None)
    obs.quantizer.configure(4, perchannel=True, sym=False)
    return obs


def matrices(obs: TrueOBS) -> tuple[Tensor, Tensor]:
    """weight float64 [rows, columns], and the Hessian of each row [rows, columns, columns]"""
    hessian = obs._hessian().repeat_interleave(obs.rows // len(obs._hessian()), 0)
    return weight_matrix(obs.layer).flatten(0, 1).double().clone(), hessian.clone()


def obs_literally(
    w: Tensor, hessian: Tensor, steps: int, n_of_m: tuple[int, int] | None = None
) -> tuple[list[Tensor], list[float]]:
    """One row: the weights after each removal, and its cost; a new inverse each time."""
    w, left, states, costs = w.clone(), list(range(len(w))), [], []
    states.append(w.clone())
    for _ in range(steps):
        inverse = torch.linalg.inv(hessian[left][:, left])
        best, cost = -1, math.inf
        for place, c in enumerate(left):
            if n_of_m is not None:
                n, m = n_of_m
                bucket = range(c // m * m, c // m * m + m)
                if sum(other not in left for other in bucket) >= n:
                    continue
            if (now := (w[c] ** 2 / inverse[place, place]).item()) < cost:
                best, cost = place, now
        w[left] -= w[left[best]] / inverse[best, best] * inverse[best]
        w[left[best]] = 0
        del left[best]
        states.append(w.clone())
        costs.append(cost)
    return states, costs


def obq_literally(w: Tensor, hessian: Tensor, scale: float, zero: float, qmax: int) -> Tensor:
    """One row of exact OBQ; what is 0 stays 0 and compensates for nothing."""
    w, out = w.clone(), torch.zeros_like(w)
    left = w.nonzero()[:, 0].tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        now = w[left]
        q = (((now / scale).round() + zero).clamp(0, qmax) - zero) * scale
        error = (now - q).square()
        outlier = bool((error > scale**2 / 4).any())
        best = int(error.argmax() if outlier else (error / inverse.diagonal()).argmin())
        out[left[best]] = q[best]
        w[left] -= (now[best] - q[best]) / inverse[best, best] * inverse[best]
        del left[best]
    return out


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", LAYERS)
def test_compat_is_exact_obq(make: Any, sparse: bool) -> None:
    layer, inputs = make()
    if sparse:
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    obs = prepared((layer, inputs), compat=True)
    bits = 2 if sparse else 4
    # with a shrunk range there are outliers, which go first: before the zeros
    obs.quantizer.configure(bits, perchannel=True, sym=False, mse=sparse)
    before, hessian = matrices(obs)
    obs.quantize(parallel=3)
    after, _ = matrices(obs)
    scale, zero = (t.flatten().tolist() for t in (obs.quantizer.scale, obs.quantizer.zero))
    expected = torch.stack([
        obq_literally(w, h, s, z, 2**bits - 1)
        for w, h, s, z in zip(before, hessian, scale, zero, strict=True)
    ])  # fmt: skip
    assert (after[before == 0] == 0).all()
    errors = [layer_error(before[:, None], q[:, None], hessian).sum() for q in (after, expected)]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=1e-3)
    assert ((after - expected).abs() < 1e-5).double().mean() > 0.98
    assert obs.error == pytest.approx(errors[0].item(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"starts": 3, "sweeps": 1, "rounds": 2}], ids=str)
@pytest.mark.parametrize("make", LAYERS)
def test_default_is_our_solver(make: Any, options: dict[str, Any]) -> None:
    obs = prepared(make(), rel_damp=0.02, **options)
    before, hessian = weight_matrix(obs.layer).clone(), obs._hessian()
    obs.quantize()
    spec = QuantSpec(4, scale_search="absmax")
    grid = (t.view(*before.shape[:2], 1) for t in (obs.quantizer.scale, obs.quantizer.zero))
    scale, zero = grid
    how: dict[str, Any] = {"scale": scale, "zero_point": zero, "damp": 0.02, "sweeps": 2, **options}
    expected = solve(before, hessian, spec, **how)
    torch.testing.assert_close(weight_matrix(obs.layer), expected.dequantize())
    assert obs.error == pytest.approx(expected.report.error.sum().item())


def test_a_pruned_weight_needs_a_decision() -> None:
    layer, inputs = linear()
    layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    zeros = layer.weight == 0
    obs = prepared((layer, inputs))
    with pytest.raises(ValueError, match="keep_zeros"):
        obs.quantize()
    obs.quantize(keep_zeros=True)
    assert (obs.layer.weight[zeros] == 0).all()
    lost = prepared((layer, inputs))
    lost.quantize(keep_zeros=False)
    assert (lost.layer.weight[zeros] != 0).any()
    assert lost.error < obs.error


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
def test_nmprune_is_the_greedy_loop_of_each_row(n: int, m: int) -> None:
    obs = prepared(linear(), rel_damp=0.01)
    before, hessian = matrices(obs)
    damped = hessian + 0.01 * hessian[0].diagonal().mean() * torch.eye(16)
    expected = torch.stack([
        obs_literally(w, h, 16 // m * n, (n, m))[0][-1]
        for w, h in zip(before, damped, strict=True)
    ])  # fmt: skip
    obs.nmprune(n, m, parallel=3)
    after, _ = matrices(obs)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert (after.unflatten(1, (-1, m)) == 0).sum(2).eq(n).all()
    assert obs.error == pytest.approx(layer_error(before, after, hessian[0]).item(), rel=1e-4)


def test_nmprune_counts_along_the_input_channels_of_a_convolution() -> None:
    obs = prepared((nn.Conv2d(8, 6, 3, groups=2), torch.randn(9, 8, 9, 10)))
    obs.nmprune(2, 4)
    zeros = obs.layer.weight == 0  # [6, 4, 3, 3]
    assert zeros.sum(1).eq(2).all()
    assert not zeros.flatten(1).unflatten(1, (-1, 4)).sum(2).eq(2).all()


@pytest.mark.parametrize("make", LAYERS)
def test_unstructured_pruning_is_the_greedy_loop_of_each_row(make: Any) -> None:
    obs = prepared(make(), rel_damp=0.01)
    before, hessian = matrices(obs)
    ridge = 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)
    damped = hessian + ridge[:, None, None] * torch.eye(obs.columns)
    rows = [obs_literally(w, h, obs.columns) for w, h in zip(before, damped, strict=True)]
    costs = sorted((cost, row) for row, (_, each) in enumerate(rows) for cost in each)
    obs.prepare_unstr(parallel=3)
    sparsities = [0, 0.3, 0.5, 1]
    for sparsity, weight in zip(sparsities, obs.prune_unstr(sparsities), strict=True):
        lost = [row for _, row in costs[: math.ceil(before.numel() * sparsity)]]
        expected = torch.stack([
            states[lost.count(row)] for row, (states, _) in enumerate(rows)
        ])  # fmt: skip
        assert weight.shape == before.shape and weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(matrices(obs)[0], before)  # the layer is left as it is


def test_what_is_pruned_already_stays_so_and_compensates_for_nothing() -> None:
    layer, inputs = linear()
    layer.weight.data[torch.rand_like(layer.weight) < 0.3] = 0
    obs = prepared((layer, inputs))
    before, hessian = matrices(obs)
    obs.prepare_unstr(parallel=4)
    (half,) = obs.prune_unstr([0.5])
    assert (half[before == 0] == 0).all()
    assert (half == 0).sum() == math.ceil(before.numel() * 0.5)
    for w, out, h in zip(before, half.double(), hessian, strict=True):
        left = out.nonzero()[:, 0]
        exact = torch.linalg.solve(h[left][:, left], (h @ w)[left])
        torch.testing.assert_close(out[left], exact, rtol=1e-4, atol=1e-5)


def test_dead_columns() -> None:
    layer, inputs = linear()
    inputs[:, 4] = 0
    before = layer.weight[:, 4].clone()
    ours = prepared((layer, inputs))
    ours.quantize()
    assert ((ours.layer.weight[:, 4] - before).abs() <= ours.quantizer.scale[:, 0] / 2 + 1e-6).all()
    for run in (TrueOBS.quantize, TrueOBS.nmprune):
        published = prepared((layer, inputs), compat=True)
        run(published)
        assert (published.layer.weight[:, 4] == 0).all()


def test_singular_hessians_get_one_on_their_diagonal() -> None:
    layer, _ = linear()
    inputs = torch.randn(5, 16)
    obs = prepared((layer, inputs))
    before, hessian = matrices(obs)
    assert torch.linalg.matrix_rank(hessian[0]) == 5
    obs.nmprune(2, 4)
    expected = torch.stack([
        obs_literally(w, h + torch.eye(16), 8, (2, 4))[0][-1]
        for w, h in zip(before, hessian, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(matrices(obs)[0], expected, rtol=1e-3, atol=1e-4)


def test_empty_batches_count_for_nothing() -> None:
    obs, inputs = TrueOBS(nn.Linear(16, 4)), torch.randn(5, 16)
    expected = TrueOBS(obs.layer)
    expected.add_batch(inputs)
    for batch in (inputs[:0], inputs, inputs[:0]):
        obs.add_batch(batch)
    assert obs.nsamples == 5 and torch.equal(obs._hessian(), expected._hessian())


def test_signatures() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        return {
            name: p.default
            for name, p in inspect.signature(function).parameters.items()
            if p.default is not inspect.Parameter.empty
        }

    assert list(inspect.signature(TrueOBS).parameters)[:2] == ["layer", "rel_damp"]
    assert defaults(TrueOBS.quantize)["parallel"] == 32
    assert defaults(TrueOBS.nmprune) == {"n": 2, "m": 4, "parallel": 32}
    assert defaults(TrueOBS.prepare_unstr) == {"parallel": 32}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda obs: obs.quantize(parallel=0), "parallel"),
        (lambda obs: obs.nmprune(5, 4), "0 < n <= m"),
        (lambda obs: obs.nmprune(2, 5), "divisor of 16"),
        (lambda obs: obs.nmprune(2.0, 4), "must be integers, got n = 2.0, m = 4"),
        (lambda obs: obs.prune_unstr([0.5]), "prepare_unstr"),
        (lambda obs: (obs.prepare_unstr(), obs.prune_unstr([1.5])), "from 0 to 1"),
        (lambda obs: (obs.free(), obs.quantize()), "free"),
        (lambda obs: TrueOBS(obs.layer, rel_damp=-1), "rel_damp"),
        (lambda obs: TrueOBS(obs.layer, compat=True, order="obq"), "compat"),
        (lambda obs: (obs.quantizer.configure(2, trits=True), obs.quantize()), "trits"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(prepared(linear()))
