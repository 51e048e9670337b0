"""What a layer loses at each width: held-out errors, and what they do to the model's output."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapq_triton import ErrorCurves, QuantSpec, allocate, error_curves, layer_error, quantize, solve
from sapq_triton.calibrate import collect_hessians
from sapq_triton.layers import as_weight, find_layers, weight_matrix
from sapq_triton.scores import weight_gradient
from tests.tiny import assert_same_state, state

SPEC, WIDTHS = QuantSpec(4), (2, 3, 5)


def cnn() -> nn.Sequential:
    """Three kinds of convolution, BatchNorm behind one, activations in place, five logits."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(inplace=True),
        nn.Linear(12, 5, bias=False),
    )  # fmt: skip


class Tokens(nn.Module):
    """[N, T] tokens; linear layers on [N, T, C], on [N * T, C] and on [T, N, C]; one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        x = self.embedding(input_ids)
        x = x + F.relu(self.one(x))
        x = x + F.relu(self.two(x.flatten(0, 1))).view_as(x)
        x = x + self.three(x.transpose(0, 1)).transpose(0, 1).tanh()
        x = x + F.relu(self.one(x))
        return SimpleNamespace(logits=self.head(x))


def images(count: int) -> list[Tensor]:
    return [torch.randn(6, 3, 7, 7) for _ in range(count)]


def tokens(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(11, (4, 5))} for _ in range(count)]


def curves_of(model: nn.Module, batches: Any, *scores: Any, **options: Any) -> ErrorCurves:
    options = {"bits": WIDTHS, "score": scores, "bias_correction": False, **options}
    return error_curves(model, batches, SPEC, **options)


def losses(
    model: nn.Module, hessians: dict[str, Tensor], name: str, **options: Any
) -> list[Tensor]:
    """W - Q of a layer at each width"""
    weight = weight_matrix(model.get_submodule(name))
    results = [solve(weight, hessians[name], QuantSpec(bits), **options) for bits in WIDTHS]
    return [weight - result.dequantize() for result in results]


def close(actual: Any, expected: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(
        torch.tensor(actual).double(), torch.tensor(expected).double(), rtol=rtol, atol=0
    )


# --- relative: which batches are whose ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"order": "nearest"}, {"damp": 1.0}], ids=str)
def test_layers_are_solved_on_one_part_and_measured_on_the_other(options: Any) -> None:
    model, batches = cnn().eval(), images(6)
    found = curves_of(model, batches, "relative", **options)
    fit = collect_hessians(model, [batches[i] for i in (0, 2, 3, 4)])
    test = collect_hessians(model, [batches[i] for i in (1, 5)])
    assert list(found.layers) == list(find_layers(model))
    assert found.loss is None and not found.skipped
    for name, curve in found.layers.items():
        weight = weight_matrix(model.get_submodule(name))
        energy = layer_error(weight, torch.zeros_like(weight), test[name]).sum()
        errors = [
            float(layer_error(lost, torch.zeros_like(lost), test[name]).sum() / energy)
            for lost in losses(model, fit, name, **options)
        ]
        close(curve.errors["relative"], errors)
        assert [spec.bits for spec in curve.specs] == list(WIDTHS)
        assert curve.shape == tuple(weight.shape)


def test_pruned_convolutions_keep_the_pattern_that_quantize_makes() -> None:
    """Groups of an N:M pattern are channels at one position, not neighbours in the window."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3)).eval()
    batches = [torch.randn(4, 8, 6, 6) for _ in range(2)]
    spec = QuantSpec(4, sparsity="2:4")
    found = error_curves(model, batches, spec, bits=[4], score="relative").layers["0"]
    fit, test = (collect_hessians(model, [batch])["0"] for batch in batches)
    weight = weight_matrix(model[0])
    result = solve(weight, fit, spec, window=9)
    energy = layer_error(weight, torch.zeros_like(weight), test).sum()
    close(
        found.errors["relative"],
        [float(layer_error(weight, result.dequantize(), test).sum() / energy)],
    )
    refuses = copy.deepcopy(model).double()  # what comes later would name its dtype
    for order in ({"order": "obq"}, {"starts": "obq"}):
        with pytest.raises(ValueError, match="does not prune"):
            error_curves(refuses, batches, spec, **order)


def test_batches_that_are_held_out_by_hand() -> None:
    model, (a, b, c) = cnn().eval(), images(3)
    scores = ("relative", "fisher", "measured", "trace")
    expected = curves_of(model, [a, b, c], *scores)
    assert curves_of(model, [a, c], *scores, held_out=[b]) == expected
    assert curves_of(model, iter([a, b, c]), *scores) == expected
    assert curves_of(model, [a, c], *scores, held_out=[a]) != expected
    assert curves_of(model, [a, b], *scores, held_out=[b]) != expected


def in_proportion(losses: list[float], relative: tuple[float, ...]) -> list[float]:
    """The relative errors, times the mean of loss / relative error."""
    ratios = [loss / error for loss, error in zip(losses, relative, strict=True)]
    return [sum(ratios) / len(ratios) * error for error in relative]


# --- fisher and trace: against gradients of single examples ---------------------------------------


def literal_fisher(
    model: nn.Module,
    fit: list[Any],
    test: list[Any],
    run: Callable[[Any], Tensor],
    loss: str,
    samples: int,
    mask_of: Callable[[Any], Tensor | None] = lambda batch: None,
    whole: tuple[str, ...] = (),
) -> dict[str, tuple[list[float], float]]:
    """A backward pass per example, to the weights; `whole`: layers that take a batch as one."""
    names = list(find_layers(model))
    hessians = collect_hessians(model, fit, forward=lambda m, b: run(b))
    lost = {name: losses(model, hessians, name) for name in names}
    found = {name: ([0.0] * len(WIDTHS), 0.0) for name in names}
    generator, positions = torch.Generator().manual_seed(0), 0
    weights = [model.get_submodule(name).weight for name in names]
    for batch in test:
        output, mask = run(batch), mask_of(batch)
        examples = len(output)
        if loss == "kl":
            positions += samples * (output[..., 0].numel() if mask is None else int(mask.sum()))
        else:
            positions += samples * examples
        for _ in range(samples):
            if loss == "kl":
                p = output.detach().softmax(-1).flatten(0, -2)
                labels = torch.multinomial(p, 1, generator=generator).view(output.shape[:-1])
                value = output.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
                value = value if mask is None else value * mask
            else:
                signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
                value = output * signs
            each = [value[n].sum() for n in range(examples)]
            per_example = [torch.autograd.grad(v, weights, retain_graph=True) for v in each]
            for place, name in enumerate(names):
                module = copy.copy(model.get_submodule(name))
                products, norm = torch.zeros(examples, len(WIDTHS)), 0.0
                for n in range(examples):
                    gradient = per_example[n][place]
                    for width in range(len(WIDTHS)):
                        error = as_weight(module, lost[name][width])
                        products[n, width] = (gradient * error).sum()
                if name in whole:
                    products = products.sum(0, keepdim=True)
                    norm = float(sum(g[place] for g in per_example).square().sum())
                else:
                    norm = float(sum(g[place].square().sum() for g in per_example))
                squares, total = found[name]
                added = (products.double().square().sum(0)).tolist()
                found[name] = [a + b for a, b in zip(squares, added, strict=True)], total + norm
    result = {}
    for name, (squares, norm) in found.items():
        flat = [float(error.square().sum()) for error in lost[name]]
        mean_trace = norm / positions / lost[name][0].numel()
        result[name] = [s / 2 / positions for s in squares], [mean_trace * f / 2 for f in flat]
    return result


@pytest.mark.parametrize("loss", ["kl", "squared"])
def test_fisher_of_convolutions(loss: Any) -> None:
    model, batches = cnn().eval(), images(3)
    found = curves_of(model, batches, "fisher", "trace", "relative", loss=loss, samples=2)
    expected = literal_fisher(model, [batches[0], batches[2]], [batches[1]], model, loss, 2)
    assert found.loss == loss
    for name, (fisher, trace) in expected.items():
        errors = found.layers[name].errors
        close(errors["fisher"], in_proportion(fisher, errors["relative"]))
        close(found.layers[name].errors["trace"], trace)


def test_fisher_of_a_first_layer_that_is_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).eval()
    batches = [torch.randn(8, 5) for _ in range(2)]
    found = curves_of(model, batches, "fisher", "relative", samples=2)
    expected = literal_fisher(model, batches[:1], batches[1:], model, "kl", 2)
    for name, (fisher, _) in expected.items():
        errors = found.layers[name].errors
        close(errors["fisher"], in_proportion(fisher, errors["relative"]))


def test_fisher_of_tokens() -> None:
    """An example is a sequence, however a layer sees it; the calls of a layer count together."""
    model, batches = Tokens().eval(), tokens(2)
    found = curves_of(model, batches, "fisher", "trace", "relative", samples=3)
    assert found.loss == "kl"

    def run(batch: Any) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    # [T, N, C] with T = 5 cannot be split into N = 4: the batch is one example
    expected = literal_fisher(model, batches[:1], batches[1:], run, "kl", 3, whole=("three",))
    for name, (fisher, trace) in expected.items():
        errors = found.layers[name].errors
        close(errors["fisher"], in_proportion(fisher, errors["relative"]))
        if name != "one":  # norms are of each call
            close(found.layers[name].errors["trace"], trace)


def test_padding_does_not_count() -> None:
    model = Tokens().eval()
    batches = [
        batch | {"attention_mask": torch.arange(5) < torch.tensor([[5], [3], [4], [2]])}
        for batch in tokens(2)
    ]

    def run(batch: Any) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    found = curves_of(model, batches, "fisher", "measured", "relative")
    other = [
        batch | {"input_ids": torch.where(batch["attention_mask"], batch["input_ids"], 3)}
        for batch in batches
    ]
    changed = curves_of(model, other, "fisher", "measured", "relative")
    unmasked = curves_of(model, other, "fisher", "measured", "relative", attention_mask=None)
    for name in ("one", "head"):  # their inputs have the shape of the mask
        for score in found.scores:
            values = found.layers[name].errors[score]
            close(changed.layers[name].errors[score], values)
            assert unmasked.layers[name].errors[score] != pytest.approx(values, rel=1e-3)


def test_estimate_is_the_loss_of_a_small_error() -> None:
    """Unbiased: a softmax of one layer has a Fisher matrix that can be summed over all labels."""
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    batches = [torch.randn(40, 6), torch.randn(30, 6)]
    found = curves_of(model, batches, "fisher", "measured", bits=[8], samples=300)
    weight = weight_matrix(model[0])
    hessian = collect_hessians(model, batches[:1])["0"]
    lost = (weight - solve(weight, hessian, QuantSpec(8)).dequantize())[0]
    p, error = model(batches[1]).softmax(1).detach(), batches[1] @ lost.T
    variance = (p * error.square()).sum(1) - (p * error).sum(1).square()
    exact = float(variance.mean() / 2)
    assert found.layers["0"].errors["fisher"][0] == pytest.approx(exact, rel=0.05)
    assert found.layers["0"].errors["measured"][0] == pytest.approx(exact, rel=0.02)


def test_seed_decides_and_repeats() -> None:
    model, batches = cnn().eval(), images(2)
    first = curves_of(model, batches, "fisher")
    assert curves_of(model, batches, "fisher") == first
    assert curves_of(model, batches, "fisher", seed=1) != first


# --- corrected means ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4), nn.Conv1d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, groups=2, stride=2),
        nn.Conv3d(6, 4, 2), nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, padding=1),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_gradient_less_the_mean_gives_corrected_errors(layer: Any) -> None:
    axes = len(getattr(layer, "kernel_size", ()))
    inputs = torch.randn(3, 5, 6) if axes == 0 else torch.randn(3, 6, *[5] * axes)
    lost, mean = (
        torch.randn_like(weight_matrix(layer)),
        torch.randn(weight_matrix(layer).shape[::2]),
    )
    wrong = copy.deepcopy(layer)
    wrong.weight.data, wrong.bias.data = as_weight(layer, lost), torch.zeros(4)
    error = wrong(inputs).detach()
    grad = torch.randn_like(error)
    shift = (lost @ mean[:, :, None]).flatten().reshape(-1, *[1] * axes)
    close(
        float((weight_gradient(layer, inputs, grad, None) * lost).sum()),
        float((grad * error).sum()),
    )
    close(
        float((weight_gradient(layer, inputs, grad, mean) * lost).sum()),
        float((grad * (error - shift)).sum()),
    )
    if axes:  # an image without a batch axis
        one = weight_gradient(layer, inputs[0], grad[0], mean)
        torch.testing.assert_close(one, weight_gradient(layer, inputs[:1], grad[:1], mean))


def test_means_are_corrected_where_quantize_corrects_them() -> None:
    """Where there is a bias or a BatchNorm follows; measured against models with a moved bias."""
    model, batches = cnn().eval(), images(2)
    hessians = collect_hessians(model, batches[:1])
    plain = curves_of(model, batches, "measured", "fisher", measured_bits=2)
    found = curves_of(model, batches, "measured", "fisher", measured_bits=2, bias_correction=True)
    assert found.layers["11"] == plain.layers["11"]  # neither a bias nor a BatchNorm
    before = model(batches[1]).double().log_softmax(1)
    for name in ("3", "9", "11"):
        for curves, corrects in ((plain, False), (found, True)):
            wrong = copy.deepcopy(model)
            layer: Any = wrong.get_submodule(name)
            lost = losses(model, hessians, name)[0]
            layer.weight.data -= as_weight(layer, lost)
            if corrects and layer.bias is not None:
                inputs = model[: int(name)](batches[0])
                kernel = getattr(layer, "kernel_size", None)
                if kernel is None:
                    mean = inputs.mean(0)[None]
                else:
                    patches = F.unfold(inputs, kernel, stride=layer.stride)
                    mean = patches.mean((0, 2)).view(layer.groups, -1)
                layer.bias.data += (lost @ mean[:, :, None]).flatten()
            after = wrong(batches[1]).double().log_softmax(1)
            expected = (before.exp() * (before - after)).sum(1).mean()
            close(curves.layers[name].errors["measured"][0], expected.item(), rtol=1e-3)
    for name in ("0", "3", "5", "9"):
        assert found.layers[name].errors["fisher"] != plain.layers[name].errors["fisher"]


# --- measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "squared"])
def test_measured_at_one_width_and_in_proportion(loss: Any) -> None:
    model, batches = cnn().eval(), images(2)
    found = curves_of(model, batches, "measured", "relative", measured_bits=2, loss=loss)
    hessians = collect_hessians(model, batches[:1])
    before = model(batches[1]).double()
    for name in ("0", "5", "11"):
        wrong = copy.deepcopy(model)
        layer: Any = wrong.get_submodule(name)
        layer.weight.data -= as_weight(layer, losses(model, hessians, name)[0])
        after = wrong(batches[1]).double()
        if loss == "kl":
            expected = F.kl_div(
                after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
            )
        else:
            expected = (after - before).square().sum() / 2 / len(after)
        errors = found.layers[name].errors
        close(errors["measured"][0], expected.item(), rtol=1e-3)
        ratio = [x / errors["relative"][0] * errors["measured"][0] for x in errors["relative"]]
        close(errors["measured"], ratio)
    middle = curves_of(model, batches, "measured")
    assert middle == curves_of(model, batches, "measured", measured_bits=3)


# --- the whole ------------------------------------------------------------------------------------


def test_a_layer_that_matters_gets_the_bits() -> None:
    """The relative error cannot know that half of the first layer's output is ignored."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strong, self.weak = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.strong(x) + self.weak(x) / 100

    model = Halves().eval()
    batches = [torch.randn(64, 24) for _ in range(2)]
    curves = error_curves(model, batches, SPEC, score=("fisher", "relative"), loss="squared")
    found = allocate(curves, mean_bits=4)
    assert found.specs["strong"].bits == 6 and found.specs["weak"].bits == 2
    lost = {}
    for score in curves.scores:
        quantized = copy.deepcopy(model)
        widths = allocate(curves, mean_bits=4, score=score).overrides
        quantize(quantized, batches, SPEC, overrides=widths, progress=False)
        lost[score] = (quantized(batches[1]) - model(batches[1])).square().sum()
    assert lost["fisher"] < lost["relative"] / 5


def test_the_model_is_left_as_it_was() -> None:
    model, batches = cnn(), images(2)
    model[0].weight.requires_grad_(False)
    model[9].eval()
    before = state(model)
    curves_of(model, batches, "fisher", "measured", "trace", "relative")
    assert_same_state(model, before)
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert model.training and model[0].training and not model[9].training
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model, batches = cnn(), images(2)
    before, calls = state(model), [0]

    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 7:  # some layer is rounded
            raise RuntimeError("broken")
        result: Tensor = m(batch)
        return result

    with pytest.raises(RuntimeError, match="broken"):
        curves_of(model, batches, "measured", forward=forward)
    assert_same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_frozen_models_have_curves_as_well() -> None:
    model, batches = cnn().eval(), images(2)
    expected = curves_of(model, batches, "fisher")
    assert curves_of(model.requires_grad_(False), batches, "fisher") == expected


def test_shared_weights_are_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)))

    model, batches = Twice().eval(), [torch.randn(7, 5) for _ in range(2)]
    found = curves_of(model, batches, "fisher", "relative")
    assert list(found.layers) == ["first"]
    assert found.layers["first"].notes == ("weight shared with second",)
    expected = literal_shared(model, batches)
    errors = found.layers["first"].errors
    close(errors["fisher"], in_proportion(expected, errors["relative"]))


def literal_shared(model: Any, batches: list[Tensor]) -> list[float]:
    rows = torch.cat([batches[0], F.relu(model.first(batches[0]))]).detach()
    weight = weight_matrix(model.first)
    output = model(batches[1])
    generator, totals = torch.Generator().manual_seed(0), torch.zeros(len(WIDTHS))
    lost = [
        (weight - solve(weight, 2 / len(rows) * rows.T @ rows, QuantSpec(b)).dequantize())[0]
        for b in WIDTHS
    ]
    for _ in range(4):
        labels = torch.multinomial(output.detach().softmax(1), 1, generator=generator)
        value = output.log_softmax(1).gather(1, labels)[:, 0]
        for each in value:
            (gradient,) = torch.autograd.grad(each, [model.first.weight], retain_graph=True)
            totals += torch.stack([(gradient * error).sum().square() for error in lost])
    return (totals / 2 / 4 / len(output)).tolist()


def test_layers_without_a_curve_have_a_reason() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.rare, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + (self.rare(x) if x[0, 0] > 0 else 0)

    model = Branches().eval()
    batches = [torch.ones(3, 4), -torch.ones(3, 4)]
    for scores in (("fisher",), ("relative",), ("measured",)):
        found = curves_of(model, batches, *scores, skip=["n*r"])
        assert list(found.layers) == ["used"]
        assert found.skipped == {
            "never": "as asked",
            "rare": "no held-out batch shows what it does",
        }
    found = curves_of(model, batches, "fisher")
    assert found.skipped["never"] == "no calibration row reached it"


def test_a_layer_without_weights_loses_nothing() -> None:
    model, batches = cnn().eval(), images(2)
    nn.init.zeros_(model[5].weight)
    found = curves_of(model, batches, "fisher", "measured", "trace", "relative")
    assert set(found.layers["5"].errors.values()) == {(0.0,) * len(WIDTHS)}
    assert allocate(found, mean_bits=5).specs["5"].bits == WIDTHS[0]


@pytest.mark.parametrize("score", ["fisher", "measured"])
def test_outputs_that_cannot_be_compared(score: Any) -> None:
    model, batches = cnn().eval(), images(2)
    for forward in (lambda m, x: (m(x),), lambda m, x: m(x).argmax(1)):
        with pytest.raises(ValueError, match=r"must return a floating point tensor"):
            curves_of(model, batches, score, forward=forward)
    with pytest.raises(ValueError, match="output of the full-precision model holds NaN or Inf"):
        curves_of(model, batches, score, forward=lambda m, x: m(x) / 0)


def test_models_without_gradients() -> None:
    model, batches = cnn().eval(), images(2)
    with pytest.raises(ValueError, match="no gradient reaches the layers"):
        curves_of(model, batches, "fisher", forward=lambda m, x: m(x).detach())

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.add_(self.layer(y))

    rows = [torch.randn(5, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="the input of 'layer' is changed in place after"):
        curves_of(InPlace(), rows, "fisher")
    assert curves_of(InPlace(), rows, "measured").layers


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="input of '0' holds NaN or Inf during calibration"):
        curves_of(cnn().eval(), [torch.full((2, 3, 7, 7), torch.nan)] * 2, "relative")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "hessian"}, r"score must be one of \('fisher', .*\), got 'hessian'"),
        ({"score": ()}, "score is empty"),
        ({"bits": [4, 9]}, "bits must be an integer from 2 to 8, got 9"),
        ({"bits": 4}, "bits must be an iterable of integers from 2 to 8, got 4"),
        ({"loss": "mse"}, r"loss must be one of \('kl', 'squared'\) or None, got 'mse'"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"measured_bits": 4}, r"measured_bits must be one of bits \(2, 3, 5\), got 4"),
        ({"skip": "head"}, r"skip must be an iterable of patterns, got 'head'"),
        ({"skip": ["nothing*"]}, "pattern 'nothing\\*' matches no layer"),
        ({"held_out": []}, "held_out is empty"),
        ({"held_out": torch.ones(2, 3, 7, 7)}, "held_out must be an iterable .*, got one Tensor"),
        ({"held_out": {"x": 1}}, "held_out must be an iterable of batches, got one dict"),
        ({"skip": ["*"]}, "no layer to measure; left out: {'0': 'as asked'"),
        ({"order": "best"}, "order must be one of"),
        ({"block": 0}, "block must be an integer of at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curves_of(cnn(), images(2), "relative", **options)


def test_models_in_which_nothing_is_left_to_measure() -> None:
    rows = [torch.randn(5, 4) for _ in range(2)]
    packed = nn.Sequential(nn.Linear(4, 4, bias=False))
    quantize(packed, rows, QuantSpec(4), pack=True, progress=False)
    for model, why in (
        (nn.Sequential(nn.ReLU()), "none"),
        (packed, "{'0': 'it is packed already'}"),
    ):
        with pytest.raises(ValueError, match=f"no layer to measure; left out: {why}"):
            curves_of(model, rows, "relative")


def test_bad_batches() -> None:
    for batches, message in (
        ([torch.ones(2, 3, 7, 7)], "1 batch cannot be split"),
        ([], "0 batch"),
        (torch.ones(2, 3, 7, 7), "batches must be an iterable of batches, got one Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            curves_of(cnn(), batches, "relative")
    with pytest.raises(ValueError, match="batches is empty"):
        curves_of(cnn(), [], "relative", held_out=images(1))
    with pytest.raises(ValueError, match="spec must be a QuantSpec, got 4"):
        error_curves(cnn(), images(2), 4)  # type: ignore[arg-type]
