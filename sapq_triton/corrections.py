"""What quantization shifts on the way and is put right: statistics of BatchNorms, and biases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calibrate import BatchMoments, ChannelMoments
from .finite import check_parts
from .layers import Layer, overwrite
from .ranks import Ranks

BatchNormRule = Literal["paired", "reestimate", "keep"]


class Corrections:
    """Of one model, by name of the BatchNorm or layer.

    rule, biases: the options `batchnorm` and `bias_correction` of `quantize`.
    corrected: the largest absolute shift of those that were corrected. kept: why some BatchNorms
    are not.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], rule: BatchNormRule, biases: bool, ranks: Ranks
    ) -> None:
        self.modules: Mapping[str, Any] = modules
        self.rule, self.biases, self.ranks = rule, biases, ranks
        self.norms: dict[str, Layer] = {
            name: module
            for name, module in modules.items()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self.corrected: dict[str, float] = {}
        self.kept: dict[str, str] = {}
        self.visits: dict[str, int] = {}  # of each BatchNorm, most in one forward pass
        self.before: dict[str, ChannelMoments] = {}  # of what goes in, in the original model
        self.follower: dict[str, str] = {}  # layer -> BatchNorm that its output goes straight into
        self._biases: dict[int, list[str]] = {}  # names of all modules that hold a bias
        for name, module in modules.items():
            if (bias := module._parameters.get("bias")) is not None:
                self._biases.setdefault(id(bias), []).append(name)
        for name in self.norms:
            self._check(name)

    def saw(self, batch: int, name: str, visits: int, moments: Sequence[BatchMoments]) -> None:
        """What a batch brought to a BatchNorm of the untouched model."""
        if self.rule == "reestimate" and any(part.number == 1 for part in moments):
            raise ValueError(
                f"batchnorm 'reestimate' has no variance of one value per channel, which is what "
                f"batch {batch} brings to {name!r}: give larger batches, or choose 'paired'"
            )
        self.visits[name] = max(visits, self.visits.get(name, 0))
        if moments:
            self.before.setdefault(name, ChannelMoments()).parts[batch] = list(moments)
        if self.rule == "paired" and self.visits[name] > 1:
            self.kept[name] = f"called {self.visits[name]} times in a forward pass"

    def corrects(self, name: str) -> bool:
        """By the paired rule: what a second call sees depends on the correction of the first."""
        return self.rule == "paired" and self.visits.get(name) == 1

    def correct_norm(self, name: str, now: ChannelMoments) -> None:
        """By the paired rule, see `quantize`. now: what this process sees go in."""
        module, was = self.norms[name], self.before[name].total if name in self.before else None
        shift, everywhere = torch.zeros(1), ChannelMoments()
        for part in self.ranks.gather(now.parts):
            everywhere.parts |= part
        if was is not None and (became := everywhere.total) is not None:
            # a channel that was constant, or has become so, has no scale to correct
            usable = (was.variance > 0) & (became.variance > 0)
            ratio = torch.where(usable, became.variance / was.variance, 1.0)
            old = module.running_mean.double().cpu()
            mean = became.mean + (old - was.mean) * ratio.sqrt()
            shift = mean - old
            module.running_mean.copy_(mean)
            module.running_var *= ratio.to(module.running_var)
            self._check(name, ": so does its input, or its squares overflow float32")
        self.corrected[name] = float(shift.abs().max())

    def _corrects_bias(self, name: str) -> bool:
        norm = self.follower.get(name)
        handled = norm is not None and (self.rule == "reestimate" or self.corrects(norm))
        return self.biases and self.modules[name].bias is not None and not handled

    def correct_biases(self, twins: Sequence[str], lost: Tensor, mean: Tensor) -> list[str]:
        """b += (W - Q) E[x]: lost W - Q [B, R, C], mean E[x] [B, C]; why a bias was not corrected

        Only what this layer's rounding changes, on the inputs it now has. Restoring the mean output
        of the full-precision model instead was tried: without BatchNorm to restore the variance as
        well, it flattened the deep layers of YOLOv5n (W4 mAP50-95 of SAPQ .20 instead of .30).
        """
        shift = (lost.to(mean.dtype) @ mean[:, :, None]).flatten()
        shifted: set[int] = set()  # twins may share their bias as well
        kept = []
        for name in filter(self._corrects_bias, twins):
            bias = self.modules[name].bias
            holders = self._biases.get(id(bias), [])
            if others := [holder for holder in holders if holder not in twins]:
                kept.append(f"its bias, shared with {', '.join(others)}, is not corrected")
            elif not holders:
                kept.append("its bias, computed from other parameters, is not corrected")
            elif id(bias) not in shifted:
                shifted.add(id(bias))
                overwrite(bias, bias + shift.to(bias))
                self.corrected[name] = float(shift.abs().max())
        return kept

    def reestimate(self, run: Callable[[], None]) -> None:
        """Reset the statistics of all BatchNorms in use, and average them over what `run` runs."""
        norms = {name: norm for name, norm in self.norms.items() if name in self.visits}
        old = {name: (norm.momentum, norm.running_mean.clone()) for name, norm in norms.items()}
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
                norm.train()
            run()
        finally:
            for name, norm in norms.items():
                norm.momentum, mean = old[name]
                self.corrected[name] = float((norm.running_mean - mean).abs().max())
                norm.eval()
        for name in norms:
            self._check(name, " on the calibration data")

    def _check(self, name: str, hint: str = "") -> None:
        parts = ("weight", "bias", "running_mean", "running_var")
        check_parts(self.norms[name], name, parts, hint)
