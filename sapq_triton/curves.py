"""How much each layer loses at each bit width: solved on some batches, measured on others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import layers, scores
from .allocate import ErrorCurves, LayerCurve
from .finite import check_finite
from .forward import Forward, feed, to_device, undisturbed
from .hessian import HessianSum
from .layers import Layer
from .result import layer_error
from .scores import Loss, Rounded
from .solver import solve
from .spec import QuantSpec, check_bits
from .targets import Target, VersionedRef, find_targets

Score = Literal["fisher", "measured", "trace", "relative"]
BITS = (2, 3, 4, 5, 6, 8)


def error_curves(
    model: nn.Module,
    batches: Iterable[Any],
    spec: QuantSpec,
    bits: Iterable[int] = BITS,
    *,
    score: Score | Sequence[Score] = "fisher",
    held_out: Iterable[Any] | None = None,
    skip: Iterable[str] = (),
    loss: Loss | None = None,
    samples: int = 4,
    seed: int = 0,
    measured_bits: int | None = None,
    bias_correction: bool = True,
    hessian_dtype: torch.dtype = torch.float32,
    attention_mask: str | None = "attention_mask",
    forward: Forward | None = None,
    **options: Any,
) -> ErrorCurves:
    """What rounding each layer costs at each width, on batches that its solve has not seen.

    model, spec, skip, hessian_dtype, attention_mask: as in `quantize`; the model is left as it was.
    batches: as in `quantize`; two at least, or with `held_out` one. Layers are solved on the inputs
        of the full-precision model, each by itself.
    bits: widths to solve at; all else is as in `spec`.
    score: one, or several at the price of one solve, of
        "fisher": the loss that the layer alone would cause, to second order, by gradients of
            sampled labels (`scores.fisher`): a backward pass per held-out batch and sample. In
            proportion to its layer errors, by the mean of loss / layer error over the widths.
        "measured": that loss with the layer alone rounded to `measured_bits`, and at other widths
            in proportion to its layer errors: a forward pass per layer and held-out batch.
        "trace": mean trace of the Fisher matrix, times |W - Q|^2 / 2 (HAWQ-v2, arXiv 1911.03852).
        "relative": tr((W - Q) H (W - Q)^T) / tr(W H W^T), which knows nothing of the model.
    held_out: batches on which the errors are measured; by default every fourth of `batches`, from
        the second on, none of which then takes part in a solve.
    loss: "kl" of the softmax over the last axis of the model's output, or "squared", half the
        squared change of the output. By default "kl" for `.logits` and for matrices of more than
        one column, else "squared".
    samples, seed: of labels or signs for each held-out batch, in "fisher" and "trace".
    measured_bits: one of `bits`; by default the middle one, the lower of two.
    bias_correction: count in "fisher", "trace" and "measured" what is left when the mean error of
        each output channel is corrected, as `quantize` does where the layer has a bias or a
        BatchNorm follows.
    forward: called as forward(model, batch), and its result is what `loss` compares.
    options: of `solve`, such as order, damp, or sweeps, but `window`, which is that of each layer.

    In memory at once: the Hessians of all layers, and the codes of all layers at all widths. Layers
    that no batch of either part reaches have no curve, but a reason in `skipped`. ValueError for
    bad arguments, for a model of which no layer is left to measure, and where a score needs a
    gradient that the model does not let through.
    """
    wanted = (score,) if isinstance(score, str) else tuple(dict.fromkeys(score))
    widths = check_bits(bits)
    middle = widths[(len(widths) - 1) // 2] if measured_bits is None else measured_bits
    _check(wanted, batches, held_out, spec, skip, loss, samples, middle, widths)
    fit, test = _split(batches, held_out)
    options = {**options, "measure": False}
    # a problem of one weight: the solver says what it thinks of its options before the model runs
    one, sparse = torch.ones(1, 1), QuantSpec(sparsity=0.5 if spec.sparsity else None)
    solve(one, one, sparse, **{**options, "backend": "reference"})
    targets, skipped = find_targets(model, spec, list(skip), {})
    if not targets:
        raise ValueError(f"no layer to measure; left out: {skipped or 'none found'}")
    device = next(model.parameters()).device

    def run(batch: Any) -> object:
        return (forward or feed)(model, to_device(batch, device))

    def mask_of(batch: Any) -> Tensor | None:
        mask = batch.get(attention_mask) if isinstance(batch, Mapping) and attention_mask else None
        return mask.bool().to(device) if isinstance(mask, Tensor) and mask.ndim == 2 else None

    found: dict[str, dict[str, tuple[float, ...]]] = {}
    with undisturbed(model):
        if wanted == ("relative",):
            loss = None
        elif loss is None:
            loss = scores.natural_loss(run(test[0]))
        sums, normed = _input_sums(model, targets, fit, run, mask_of, hessian_dtype, options)
        rounded = {}
        for name, target in targets.items():
            corrected = bias_correction and (target.module.bias is not None or name in normed)
            if name in sums:
                rounded[name] = _rounded(target, sums.pop(name), widths, corrected, options)
            else:
                skipped[name] = "no calibration row reached it"
        sums, _ = _input_sums(model, targets, test, run, mask_of, hessian_dtype, options)
        of_layers = {
            name: _layer_errors(layer, sums.pop(name).take()[0])
            for name, layer in rounded.items()
            if name in sums
        }
        found["relative"] = {
            name: tuple(error / energy if energy > 0 else 0.0 for error in errors)
            for name, (errors, energy) in of_layers.items()
        }
        if loss and {"fisher", "trace"} & set(wanted):
            estimates = scores.fisher(model, test, rounded, run, mask_of, loss, samples, seed)
            found["fisher"] = {
                name: _in_proportion(dict(enumerate(losses)), of_layers[name][0])
                for name, (losses, _) in estimates.items()
                if name in of_layers
            }
            found["trace"] = {
                name: _isotropic(rounded[name], trace) for name, (_, trace) in estimates.items()
            }
        if loss and "measured" in wanted:
            place = widths.index(middle)
            measured = scores.measured(model, test, rounded, place, run, mask_of, loss)
            found["measured"] = {
                name: _in_proportion({place: measured[name]}, errors)
                for name, (errors, _) in of_layers.items()
            }
    curves = {}
    for name, layer in rounded.items():
        if not all(name in found[each] for each in wanted):
            skipped[name] = "no held-out batch shows what it does"
            continue
        curves[name] = LayerCurve(
            shape=layers.matrix_shape(layer.module),
            specs=tuple(result.spec for result in layer.results),
            errors={each: found[each][name] for each in wanted},
            notes=tuple(targets[name].notes),
        )
    return ErrorCurves(curves, wanted, loss, skipped)


def _check(
    wanted: tuple[str, ...],
    batches: object,
    held_out: object,
    spec: object,
    skip: object,
    loss: object,
    samples: object,
    middle: int,
    widths: tuple[int, ...],
) -> None:
    for name in wanted:
        if name not in get_args(Score):
            raise ValueError(f"score must be one of {get_args(Score)}, got {name!r}")
    if not wanted:
        raise ValueError(f"score is empty: one at least of {get_args(Score)}")
    for name, value in (("batches", batches), ("held_out", held_out)):
        if isinstance(value, Tensor | Mapping):
            raise ValueError(
                f"{name} must be an iterable of batches, got one {type(value).__name__}"
            )
    if isinstance(skip, str):
        raise ValueError(f"skip must be an iterable of patterns, got {skip!r}; pass [{skip!r}]")
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"spec must be a QuantSpec, got {spec!r}")
    if loss not in (None, *get_args(Loss)):
        raise ValueError(f"loss must be one of {get_args(Loss)} or None, got {loss!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    if middle not in widths:
        raise ValueError(f"measured_bits must be one of bits {widths}, got {middle!r}")


def _split(batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    """Batches that layers are solved on, and others that measure what they lose."""
    everything = list(batches)
    if held_out is not None:
        fit, test = everything, list(held_out)
        if not fit or not test:
            raise ValueError(f"{'held_out' if fit else 'batches'} is empty")
        return fit, test
    if len(everything) < 2:
        raise ValueError(
            f"{len(everything)} batch cannot be split into one to solve on and one to measure on: "
            "pass two or more, or held_out"
        )
    return [b for i, b in enumerate(everything) if i % 4 != 1], everything[1::4]


def _input_sums(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Sequence[Any],
    run: Callable[[Any], object],
    mask_of: Callable[[Any], Tensor | None],
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> tuple[dict[str, HessianSum], set[str]]:
    """Sums of the inputs of each layer that is reached, and names of those whose output goes
    straight into a BatchNorm."""
    how = {key: options[key] for key in ("precision", "backend") if key in options}
    sums: dict[str, HessianSum] = {}
    normed: set[str] = set()
    latest: list[tuple[str, VersionedRef]] = []
    mask: Tensor | None = None

    def before(name: str, module: Layer, args: Any, kwargs: Any) -> None:
        inputs = layers.called_with(name, args, kwargs)
        rows, window = layers.input_rows(module, inputs, mask)
        check_finite(rows, f"the input of {name!r}", " during calibration")
        if name not in sums:
            groups, _, columns = layers.matrix_shape(module)
            sums[name] = HessianSum(groups, columns, rows.device, dtype)
        sums[name].add(rows, window, **how)

    def after(name: str, module: Layer, args: Any, output: object) -> None:
        latest[:] = [(name, VersionedRef(output))] if isinstance(output, Tensor) else []

    def norm(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = layers.called_with("BatchNorm", args, kwargs)
        normed.update(name for name, output in latest if output.matches(inputs))

    hooks = [
        module.register_forward_pre_hook(norm, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    for name, target in targets.items():
        for twin in target.twins:
            module = model.get_submodule(twin)
            hooks += [
                module.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                module.register_forward_hook(partial(after, name)),
            ]
    try:
        for batch in batches:
            mask = mask_of(batch)
            run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        total.check(name)
    return {name: total for name, total in sums.items() if total.rows}, normed


def _rounded(
    target: Target,
    total: HessianSum,
    widths: tuple[int, ...],
    corrected: bool,
    options: Mapping[str, Any],
) -> Rounded:
    """A layer, solved at each width."""
    weight, (hessian, _) = layers.weight_matrix(target.module), total.take()
    options = {**options, "window": layers.window_size(target.module)}
    results = [
        solve(weight, hessian, replace(target.spec, bits=width), **options) for width in widths
    ]
    mean = total.mean() if corrected else None
    return Rounded(target.module, tuple(target.twins), tuple(results), mean)


def _layer_errors(layer: Rounded, hessian: Tensor) -> tuple[tuple[float, ...], float]:
    """tr((W - Q) H (W - Q)^T) at each width, and tr(W H W^T)."""
    weight = layers.weight_matrix(layer.module)
    errors = [layer_error(weight, q.dequantize(), hessian).sum() for q in layer.results]
    energy = layer_error(weight, torch.zeros_like(weight), hessian).sum()
    return tuple(float(error) for error in errors), float(energy)


def _isotropic(layer: Rounded, trace: float) -> tuple[float, ...]:
    """1/2 mean trace |W - Q|^2 at each width."""
    lost = layer.lost().flatten(1)
    squares = lost.square().sum(1, dtype=torch.float64)
    return tuple((trace / lost.shape[1] / 2 * squares).tolist())


def _in_proportion(losses: Mapping[int, float], errors: tuple[float, ...]) -> tuple[float, ...]:
    """Losses known at some widths, by place, at all of them: in proportion to the layer errors.

    What one rounding does to the output depends on its direction by chance, and an estimate on its
    samples; the layer error averages over many inputs, and falls steadily with the bits.
    """
    ratios = [loss / errors[place] for place, loss in losses.items() if errors[place] > 0]
    ratio = sum(ratios) / len(ratios) if ratios else 0.0  # no error at any width that is known
    return tuple(ratio * error for error in errors)
