"""Quantize a model part by part, and write each part as soon as it is done."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .formats import save_part
from .formats.job import Activations, Job, Role
from .forward import Forward
from .layers import find_layers
from .preset import PresetName, choose
from .progress import Advance
from .quantize import quantize
from .ranks import Ranks
from .report import Report
from .solver import solve
from .solving import DAMP
from .spec import Order, QuantSpec
from .stream import Chain, isolated, leave_gaps, run_behind


def check_solve(preset: PresetName, order: Order | None) -> None:
    """ValueError that else came in the middle of a job, which then refuses the corrected call."""
    options = choose(preset, order=order, damp=DAMP)
    del options["drift_correction"]
    one = torch.ones(1, 1)
    solve(one, one, QuantSpec(), **options, backend="reference")


@dataclass(frozen=True)
class Blockwise:
    """A model, what it is to become, and the job on the disk that knows how far it is.

    chain: of the blocks of the model, or why it is one part. forward: called as
    forward(model, batch). options: of `quantize`, skip among them. dtype: of the weights that are
    written. in_memory: activations between the blocks. behind: layers are quantized that run after
    the last block.
    """

    model: nn.Module
    chain: Chain | str
    batches: Sequence[Any]
    forward: Forward
    spec: QuantSpec
    format: str
    options: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    in_memory: bool
    behind: bool
    job: Job
    ranks: Ranks
    advance: Advance

    @property
    def names(self) -> list[str]:
        """Of the parts: the blocks, and what is left of the model without them."""
        return [*(self.chain.names if isinstance(self.chain, Chain) else ()), "the rest"]

    def run(self) -> list[Report]:
        """Of each part, without codes: what the job has finished already is not done again."""
        reports = [Report.from_json(part["report"]) for part in self.job.parts]
        for layer in (layer for report in reports for layer in report.layers):
            self.advance(layer.name)
        for number, name in enumerate(self.names[len(reports) :], len(reports)):
            here = self.job.activations(number, self.in_memory)
            there = self.job.activations(number + 1, self.in_memory)
            if isinstance(self.chain, Chain) and number < len(self.chain.names):
                part, report = self._block(self.chain, number, here, there)
            else:
                part, report = self._rest(here)
            if self.ranks.rank == 0:
                save_part(part, self.job.part(number), self.format, report)
            needed = number + 2 < len(self.names) or (number + 2 == len(self.names) and self.behind)
            written: dict[str, str] = {}
            for sums in self.ranks.gather(there.flush() if needed else {}):
                written |= sums
            if self.ranks.rank == 0:
                self.job.finish({"name": name, "report": report.to_json()}, written)
            reports.append(report.without_codes())
        return reports

    def _block(
        self, chain: Chain, number: int, here: Activations, there: Activations
    ) -> tuple[nn.Module, Report]:
        """A quantized copy of a block; what it puts out is written for the next one."""
        name, arguments = chain.names[number], chain.arguments[number]
        if number == 0:
            for batch, activations in chain.first.items():
                here.write(batch, "quantized", activations)
        part = isolated(self.model, name).to(self.device, self.dtype)

        def step(model: nn.Module, batch: int, role: Role) -> None:
            activations = here.read(batch, role).to(self.device)
            output = arguments[batch].call(model.get_submodule(name), activations)
            there.write(batch, role, output)

        def forward(model: nn.Module, batch: int) -> None:
            step(model, batch, "quantized" if model is part else "original")

        report = self._quantize(part, forward)
        if report.layers:
            return part, report
        with torch.no_grad():
            for batch in self.ranks.own(len(self.batches)):
                step(part, batch, "quantized")
                if here.has(batch, "original"):
                    step(part, batch, "original")
        return part, report

    def _rest(self, here: Activations) -> tuple[nn.Module, Report]:
        """The model without its blocks, or all of it where there are none."""
        if isinstance(self.chain, str):
            self.model.to(self.device, self.dtype)
            return self.model, self._quantize(
                self.model, lambda model, batch: self.forward(model, self.batches[batch])
            )
        leave_gaps(self.model, self.chain)
        if not self.behind:
            return self.model, Report((), {}, {}, 0.0)
        self.model.to(self.device)

        def forward(model: nn.Module, batch: int) -> None:
            role: Role = "quantized" if model is self.model else "original"
            activations = here.read(batch, role).to(self.device)
            run_behind(model, self.batches[batch].to(self.device), activations, self.forward)

        return self.model, self._quantize(self.model, forward)

    def _quantize(self, part: nn.Module, forward: Forward) -> Report:
        """In place, packed. Patterns that match no layer of this part match one of another."""
        names = [*find_layers(part)]
        skip = [p for p in self.options["skip"] if fnmatch.filter(names, p)]
        if all(any(fnmatch.fnmatchcase(name, p) for p in skip) for name in names):
            return Report((), dict.fromkeys(names, "as asked"), {}, 0.0)
        return quantize(
            part, range(len(self.batches)), self.spec, **{**self.options, "skip": skip},
            forward=forward, pack=True, progress=self.advance,
        )  # fmt: skip
