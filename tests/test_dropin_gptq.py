"""GPTQ with the published signature: our solver by default, the published algorithm in compat."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, layer_error, solve
from sapq_triton.dropin import GPTQ, Quantizer
from sapq_triton.dropin.problem import find_grids, solve_on_grid
from sapq_triton.layers import input_rows, weight_matrix

Problem = tuple[nn.Module, Tensor]


def linear(columns: int = 80, rows: int = 12) -> Problem:
    """A layer, and inputs whose columns differ in size and are correlated."""
    x = torch.randn(4, 60, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    return nn.Linear(columns, rows), x * torch.rand(columns).add(0.2)


def conv1d_of_transformers() -> Problem:
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 24)
    return module, torch.randn(3, 40, 24)


LAYERS: list[Any] = [
    pytest.param(linear, id="linear"),
    pytest.param(conv1d_of_transformers, id="transformers-conv1d"),
    pytest.param(lambda: (nn.Conv1d(4, 6, 3), torch.randn(5, 4, 30)), id="conv1d"),
    pytest.param(
        lambda: (nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(5, 4, 12, 13)), id="conv2d"
    ),
    pytest.param(
        lambda: (nn.Conv2d(6, 9, 3, groups=3), torch.randn(5, 6, 12, 13)), id="conv2d-groups"
    ),
    pytest.param(lambda: (nn.Conv2d(5, 5, 3, groups=5), torch.randn(5, 5, 12, 13)), id="depthwise"),
    pytest.param(
        lambda: (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(5, 4, 9, 9)), id="transposed"
    ),
]


def prepared(problem: Problem, **options: Any) -> GPTQ:
    """A copy of the layer, shown the inputs in two batches."""
    layer, inputs = problem
    gptq = GPTQ(copy.deepcopy(layer), **options)
    for batch in (inputs[:1], inputs[1:]):
        gptq.add_batch(batch, None)
    return gptq


def configured(gptq: GPTQ, bits: int = 4, **options: Any) -> GPTQ:
    gptq.quantizer.configure(bits, **{"perchannel": True, "sym": False, **options})
    return gptq


def matrix(gptq: GPTQ) -> Tensor:
    """float64 [rows, columns]"""
    return weight_matrix(gptq.layer).flatten(0, 1).double()


def find_grid(w: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """The asymmetric grid of the full range: [R, n]  ->  [R], [R]"""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    flat = high == low
    low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
    scale = (high - low) / qmax
    return scale, (-low / scale).round()


def gptq_literally(
    weight: Tensor,
    hessian: Tensor,
    qmax: int,
    group_size: int,
    block: int,
    damp: float,
    actorder: bool,
    static_groups: bool,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2210.17323, one column at a time, float64  ->  weight, group of column

    Within a block the columns to its right see each error at once, those behind it at its end.
    Grids are found at the first column of a group, from a matrix that has the latter updates only.
    """
    C = weight.shape[1]
    updated, hessian = weight.clone(), hessian.clone()
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    if group_size == C:
        grids[0] = find_grid(updated, qmax)
    for c in range(C):
        if hessian[c, c] == 0:
            hessian[c, c] = 1
            updated[:, c] = 0
    if group_size < C and static_groups:
        for g in range(-(-C // group_size)):
            grids[g] = find_grid(updated[:, g * group_size : (g + 1) * group_size], qmax)
    order = sorted(range(C), key=lambda c: -hessian[c, c].item()) if actorder else list(range(C))
    updated, hessian = updated[:, order], hessian[order][:, order]
    hessian += damp * hessian.diagonal().mean() * torch.eye(C)
    U = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT  # H^-1 = U^T U
    out, groups = torch.empty_like(weight), torch.empty(C, dtype=torch.int64)
    for start in range(0, C, block):
        end = min(start + block, C)
        within, errors = updated[:, start:end].clone(), []
        for c in range(start, end):
            g = order[c] // group_size if static_groups else c // group_size
            if group_size < C and not static_groups and c % group_size == 0:
                grids[g] = find_grid(updated[:, c : c + group_size], qmax)
            scale, zero = grids[g]
            w = within[:, c - start].clone()
            q = (((w / scale).round() + zero).clamp(0, qmax) - zero) * scale
            errors.append((w - q) / U[c, c])
            for later in range(c, end):
                within[:, later - start] -= errors[-1] * U[c, later]
            out[:, order[c]], groups[order[c]] = q, g
        for later in range(end, C):
            for c, error in zip(range(start, end), errors, strict=True):
                updated[:, later] -= error * U[c, later]
    return out, groups


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize(
    "group_size, static_groups, block",
    [(-1, False, 32), (16, False, 32), (16, True, 32), (24, False, 16), (48, False, 20)],
    ids=["one-grid", "stale-grids", "static", "group-beyond-block", "ragged"],
)
def test_compat_is_the_published_algorithm(
    actorder: bool, group_size: int, static_groups: bool, block: int
) -> None:
    layer, inputs = linear()
    inputs[..., 5] = 0  # never fires: its weights become 0
    gptq = configured(prepared((layer, inputs), compat=True))
    before = matrix(gptq)
    rows = inputs.double().flatten(0, 1)
    hessian = 2 / len(inputs) * rows.T @ rows
    expected, groups = gptq_literally(
        before, hessian, 15, 80 if group_size < 0 else group_size, block, 0.01, actorder,
        static_groups,
    )  # fmt: skip
    gptq.fasterquant(block, 0.01, group_size, actorder, static_groups)
    assert torch.equal(gptq.g_idx.long(), groups)
    after = matrix(gptq)
    assert (after[:, 5] == 0).all()
    errors = [layer_error(before, q, hessian).item() for q in (after, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert gptq.error == pytest.approx(errors[0], rel=1e-4)
    assert ((after - expected).abs() < 1e-5).double().mean() > 0.99
    # and what it says of itself is what it stored
    scale, zero = (t[:, gptq.g_idx.long()] for t in (gptq.scale, gptq.zero))
    torch.testing.assert_close((gptq.codes - zero) * scale, after.float())


@pytest.mark.parametrize("compat", [False, True])
def test_kernels_find_the_same(compat: bool, device: torch.device) -> None:
    layer, inputs = linear(24, 4)
    problem, codes = (layer.to(device), inputs.to(device)), []
    for backend in ("reference", "triton"):
        gptq = configured(prepared(problem, compat=compat, backend=backend))
        gptq.fasterquant(16, groupsize=8, actorder=True)
        codes.append(gptq.codes)
    assert torch.equal(*codes)


def test_compat_with_groups_of_a_convolution_is_each_group_by_itself() -> None:
    layer, inputs = nn.Conv2d(6, 8, 3, groups=2), torch.randn(5, 6, 12, 13)
    together = configured(prepared((layer, inputs), compat=True))
    together.fasterquant(groupsize=8, actorder=True)
    assert together.g_idx.shape == (2, 27) and not torch.equal(*together.g_idx)
    for group in range(2):
        part = nn.Conv2d(3, 4, 3)
        part.weight.data = layer.weight.data[4 * group : 4 * group + 4].clone()
        alone = configured(prepared((part, inputs[:, 3 * group : 3 * group + 3]), compat=True))
        alone.fasterquant(groupsize=8, actorder=True)
        rows = slice(4 * group, 4 * group + 4)
        torch.testing.assert_close(together.layer.weight[rows], alone.layer.weight)
        assert torch.equal(together.g_idx[group], alone.g_idx)


@pytest.mark.parametrize("make", LAYERS)
def test_hessian_is_of_the_rows_that_the_layer_multiplies(make: Any) -> None:
    layer, inputs = make()
    gptq = prepared((layer, inputs))
    groups, rows, columns = weight_matrix(layer).shape
    assert (gptq.rows, gptq.columns, gptq.nsamples) == (groups * rows, columns, len(inputs))
    assert gptq.dev == inputs.device
    x, window = input_rows(layer, inputs)
    patches = x.T[None] if window is None else window.patches(x)
    expected = (2 / len(inputs) * patches @ patches.mT).squeeze(0)
    torch.testing.assert_close(gptq.H, expected.view_as(gptq.H), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"order": "natural"}, {"starts": 3, "sweeps": 1, "rounds": 2}], ids=str
)
def test_default_is_our_solver(make: Any, options: dict[str, Any], actorder: bool) -> None:
    gptq = configured(prepared(make(), **options), sym=True)
    before, hessian = weight_matrix(gptq.layer).clone(), gptq._hessian()
    gptq.fasterquant(actorder=actorder)
    spec = QuantSpec(4, symmetric=True, scale_search="absmax")
    grid = gptq.scale.view(*before.shape[:2], 1)
    expected = solve(before, hessian, spec, **{"scale": grid, "sweeps": 2, **options})
    torch.testing.assert_close(weight_matrix(gptq.layer), expected.dequantize())
    assert torch.equal(gptq.codes, expected.codes.flatten(0, 1))
    assert gptq.error == pytest.approx(expected.report.error.sum().item())
    assert gptq.damp == 0.01 and not gptq.fallback
    assert torch.equal(gptq.g_idx, torch.zeros(gptq.columns, dtype=torch.int32))


@pytest.mark.parametrize("group_size", [16, 48, 128])
def test_groups_lie_in_original_order_and_the_last_may_be_short(group_size: int) -> None:
    gptq = configured(prepared(linear()))
    before, hessian = matrix(gptq).float(), gptq._hessian()[0]
    gptq.fasterquant(groupsize=group_size, actorder=True, damp_percent=0.05)
    assert torch.equal(gptq.g_idx, torch.arange(80, dtype=torch.int32) // group_size)
    assert gptq.scale.shape == gptq.zero.shape == (12, -(-80 // min(group_size, 80)))
    for group, columns in enumerate(before.split(group_size, 1)):
        scale, zero = find_grid(columns, 15)
        torch.testing.assert_close(gptq.scale[:, group], scale)
        assert torch.equal(gptq.zero[:, group], zero)
    scale, zero = (t[:, gptq.g_idx.long()] for t in (gptq.scale, gptq.zero))
    torch.testing.assert_close((gptq.codes - zero) * scale, matrix(gptq).float())
    rounded = (((before / scale).round() + zero).clamp(0, 15) - zero) * scale
    assert gptq.error < 0.7 * layer_error(before, rounded, hessian).item()


def test_a_short_group_changes_nothing_for_the_others() -> None:
    """Columns that are made up to fill it must leave the solution of the real ones alone."""
    layer, inputs = linear(96)
    inputs[..., 80:] = 0
    full = configured(prepared((layer, inputs)))
    with torch.no_grad():
        full.layer.weight[:, 80:] = 0
    cut = nn.Linear(80, 12)
    cut.weight.data = layer.weight.data[:, :80].clone()
    short = configured(prepared((cut, inputs[..., :80])))
    for gptq in (full, short):
        gptq.fasterquant(groupsize=48, actorder=True)
    assert torch.equal(full.codes[:, :80], short.codes)
    assert full.dead_columns == 16 and short.dead_columns == 0


def test_made_up_columns_are_not_reported_as_dead() -> None:
    gptq = configured(prepared(linear()))
    weight, hessian = gptq._weight(), gptq._hessian()
    hessian[:, 5] = 0
    hessian[:, :, 5] = 0
    scale, zero = find_grids(weight, 48, gptq._find)
    solved = solve_on_grid(
        weight, hessian, scale, zero, bits=4, group_size=48,
        order="sensitivity", block=128, sweeps=2, damp=0.01,
    )  # fmt: skip
    assert solved.report.dead_columns.tolist() == [1]
    assert solved.codes.shape == solved.quantized.shape == weight.shape


def test_rows_without_a_batch_are_one_sample() -> None:
    gptq = GPTQ(nn.Linear(8, 3))
    gptq.add_batch(torch.randn(20, 8), None)
    assert gptq.nsamples == 1
    gptq.add_batch(torch.randn(4, 20, 8), None)
    assert gptq.nsamples == 5


@pytest.mark.parametrize("make", LAYERS)
def test_empty_batches_count_for_nothing(make: Any) -> None:
    layer, inputs = make()
    gptq, expected = GPTQ(layer), GPTQ(layer)
    for batch in (inputs[:0], inputs, inputs[:0]):
        gptq.add_batch(batch)
    expected.add_batch(inputs)
    assert gptq.nsamples == len(inputs) and torch.equal(gptq._hessian(), expected._hessian())


def test_columns_that_never_fired_are_rounded_not_zeroed() -> None:
    layer, inputs = linear()
    inputs[..., [3, 50]] = 0
    gptq = configured(prepared((layer, inputs)))
    before = matrix(gptq)
    gptq.fasterquant(actorder=True)
    assert ((matrix(gptq) - before)[:, [3, 50]].abs() <= gptq.scale / 2 + 1e-6).all()
    assert gptq.dead_columns == 2
    unseen = configured(GPTQ(copy.deepcopy(layer)))
    unseen.fasterquant()
    assert ((matrix(unseen) - before).abs() <= unseen.scale / 2 + 1e-6).all()


def test_singular_hessians_are_damped_more_and_said_so() -> None:
    layer, _ = linear()
    gptq = configured(prepared((layer, torch.randn(2, 3, 80))))
    gptq.fasterquant(percdamp=0)
    assert gptq.damp > 0 and not gptq.fallback
    strict = configured(prepared((layer, torch.randn(2, 3, 80)), compat=True))
    with pytest.raises(ValueError, match="not positive definite with percdamp 0"):
        strict.fasterquant(percdamp=0)


@pytest.mark.parametrize("compat", [False, True])
def test_same_inputs_same_bits(compat: bool) -> None:
    problem, seen = linear(), []
    for _ in range(2):
        gptq = configured(prepared(problem, compat=compat))
        gptq.fasterquant(groupsize=16, actorder=True)
        seen.append(gptq.layer.weight.clone())
    assert torch.equal(*seen)


def test_weights_keep_their_dtype_and_one_grid_may_serve_all_rows() -> None:
    layer, inputs = linear()
    gptq = configured(prepared((layer.bfloat16(), inputs.bfloat16())), perchannel=False)
    gptq.fasterquant()
    assert gptq.layer.weight.dtype == torch.bfloat16
    assert gptq.scale.unique().numel() == 1


def test_a_quantizer_that_is_ready_is_not_asked_again() -> None:
    gptq = configured(prepared(linear()))
    gptq.quantizer.find_params(torch.ones(12, 80), weight=True)
    gptq.fasterquant()
    assert (gptq.scale == 1 / 15).all()
    gptq.quantizer.scale = torch.ones(5, 1)
    with pytest.raises(ValueError, match="1 or 12 elements"):
        gptq.fasterquant()


def test_another_quantizer_may_take_its_place() -> None:
    class Halves(Quantizer):
        def find_params(self, x: Tensor, weight: bool = False) -> None:
            super().find_params(x, weight)
            self.scale /= 2

    plain, halved = configured(prepared(linear())), prepared(linear())
    halved.layer.load_state_dict(plain.layer.state_dict())
    halved.quantizer = Halves()
    for gptq in (plain, configured(halved)):
        gptq.fasterquant(groupsize=16)
    assert torch.equal(halved.scale, plain.scale / 2)


def test_signature() -> None:
    parameters = inspect.signature(GPTQ.fasterquant).parameters
    assert {name: p.default for name, p in list(parameters.items())[1:]} == {
        "blocksize": 128,
        "percdamp": 0.01,
        "groupsize": -1,
        "actorder": False,
        "static_groups": False,
    }


@pytest.mark.parametrize("alias", ["act_order", "desc_act"])
def test_aliases(alias: str) -> None:
    problem = linear()
    # the published algorithm: our own takes no notice of actorder
    first, second = (configured(prepared(problem, compat=True)) for _ in range(2))
    first.fasterquant(128, 0.05, 16, True)
    second.fasterquant(block_size=128, dampening_frac=0.05, group_size=16, **{alias: True})
    assert torch.equal(first.codes, second.codes)


def test_keywords_twice_or_unknown() -> None:
    gptq = configured(prepared(linear()))
    for call in (
        lambda: gptq.fasterquant(groupsize=16, group_size=16),
        lambda: gptq.fasterquant(128, 0.01, 16, group_size=16),
        lambda: gptq.fasterquant(act_order=True, desc_act=True),
    ):
        with pytest.raises(ValueError, match="given twice; give one of"):
            call()
    with pytest.raises(TypeError, match=r"'group'; legal are .*'groupsize'.*'group_size'"):
        gptq.fasterquant(group=16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda gptq: gptq.fasterquant(groupsize=0), "groupsize must be positive"),
        (lambda gptq: gptq.fasterquant(groupsize=2.5), "groupsize must be an integer, got 2.5"),
        (lambda gptq: gptq.fasterquant(blocksize=0), "blocksize must be"),
        (lambda gptq: gptq.fasterquant(percdamp=-1), "damp must be"),
        (lambda gptq: (gptq.free(), gptq.fasterquant()), "free"),
        (lambda gptq: (gptq.free(), gptq.add_batch(torch.ones(1, 80), None)), "free"),
        (lambda gptq: (configured(gptq, trits=True), gptq.fasterquant()), "trits"),
        (lambda gptq: GPTQ(nn.Embedding(3, 4)), "Embedding"),
        (lambda gptq: GPTQ(nn.Linear(3, 4, device="meta")), "meta"),
        (lambda gptq: GPTQ(nn.Linear(3, 4), compat=True, order="natural"), "compat"),
        (lambda gptq: configured(GPTQ(nn.Linear(3, 4), compat=True)).fasterquant(), "no inputs"),
        (lambda gptq: GPTQ(nn.Linear(3, 4)).fasterquant(groupsize=2), "configure"),
        (lambda gptq: configured(GPTQ(nn.Linear(3, 4), order="up")).fasterquant(), "order must"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(configured(prepared(linear())))


def test_documented_hook_loop() -> None:
    layer, inputs = linear()
    gptq = GPTQ(layer)
    gptq.quantizer.configure(4, perchannel=True, sym=False)
    handle = layer.register_forward_hook(lambda _, inp, out: gptq.add_batch(inp[0].data, out.data))
    before = layer(inputs)
    handle.remove()
    gptq.fasterquant(percdamp=0.01, groupsize=16, actorder=True)
    gptq.free()
    assert gptq.H is None
    change = (layer(inputs) - before).square().sum()
    assert gptq.error == pytest.approx(2 * change.item() / len(inputs), rel=1e-3)
