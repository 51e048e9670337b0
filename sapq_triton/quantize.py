"""Quantize a model layer by layer: the one place that knows whole models.

Two forward passes per batch, and some more of mixtures of experts. The first, of the untouched
model, notes the order of execution, which layers get the same inputs, and the moments that the
BatchNorm correction needs. The second runs all batches in lockstep: each layer is solved on the
outputs of the already quantized ones, and each BatchNorm and bias is corrected on the way.
"""

import copy
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import layers, packed
from .calibrate import Action, ChannelMoments, Lockstep, Place, Replay
from .corrections import BatchNormRule, Corrections
from .finite import check_finite, check_parts
from .first_pass import Observer, merge_visits
from .forward import Forward, feed, to_device, undisturbed
from .hessian import HessianSum, Prior, is_paired
from .layers import Layer
from .machine import Stopwatch, environment, peak_memory
from .ops import Backend, Precision, uses_triton
from .preset import PresetName, choose
from .priors import Pooling
from .progress import Advance, layer_cost, progress_bar
from .ranks import Ranks
from .report import LayerReport, Quantized, Report
from .solver import solve
from .solving import DAMP, Solving
from .spec import Order, QuantSpec, Starts
from .targets import (
    Call,
    Station,
    Target,
    VersionedRef,
    find_leaders,
    find_targets,
)
from .waves import Probe, Wave, Waves, find_experts, find_waves

Meeting = Lockstep | Replay


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    spec: QuantSpec,
    *,
    skip: Iterable[str] = (),
    overrides: Mapping[str, QuantSpec] | None = None,
    preset: PresetName = "best",
    order: Order | None = None,
    block: int | None = None,
    starts: Starts | None = None,
    sweeps: int | None = None,
    candidates: int | None = None,
    rounds: int | None = None,
    damp: float | None = None,
    precision: Precision = "tf32x3",
    backend: Backend = "auto",
    batchnorm: BatchNormRule = "paired",
    bias_correction: bool = True,
    drift_correction: float | None = None,
    hessian_dtype: torch.dtype = torch.float32,
    attention_mask: str | None = "attention_mask",
    forward: Forward | None = None,
    pack: bool = False,
    replay: bool = False,
    distributed: bool = False,
    deterministic: bool = False,
    progress: bool | Advance = True,
) -> Report:
    """Quantize the weights of a model in place; codes and grids are in the report.

    model: any nn.Module. Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and transformers' Conv1D
        layers are quantized, unless skipped; each weight keeps its dtype and holds dequantized
        values.
    batches: calibration inputs. A tensor is passed as the only argument, a dict as keywords, a
        tuple or list as positional arguments (those beyond what `model.forward` takes, such as
        labels, are dropped); tensors are moved to the device of the model. All batches stay in
        memory, and so do the live activations of all of them. Each has a thread of its own: a few
        large batches are better than many small ones.
    spec: the grid; overrides: glob pattern of layer names -> another spec, the last match wins.
    skip: glob patterns of layer names that are left as they are.
    preset: what options that are None mean. "best" is for the least loss; "fast" is one
        factorization and one loop in activation order: GPTQ.
    order, block, starts, sweeps, candidates, rounds, damp, precision, backend: as in `solve`. A
        damp of None is chosen for each layer in "best", from .01 to 1: by the error on every fourth
        batch, from the second on, of a solve on the others (`regularize.choose`); then all batches
        count. Where there is one batch it is .01. Crops of one image, or parts of one text, belong
        into one batch: what is held out should not resemble the rest more than new data does.
    batchnorm: "paired" changes the statistics of each BatchNorm as much as quantization changed
        its input on the calibration data, so that its output there has the mean and variance that
        it had: with s = sqrt(var_q / var_fp), running_mean = mean_q + s (running_mean - mean_fp)
        and running_var *= s^2. "reestimate" resets and estimates them anew; "keep" leaves them.
    bias_correction: add (W - Q) E[x] to each bias, E[x] the mean input row of the calibration, so
        that rounding a layer does not shift its mean output (arXiv 1906.04721, 4.2); where no
        BatchNorm that is corrected or re-estimated follows.
    drift_correction: how far, from 0 to 1, a layer aims at the outputs that the full-precision
        model has, instead of those that its own weight has on the inputs that quantization has
        changed: see `hessian.drifted`. A copy of the model runs beside it on each batch: twice the
        memory of weights and activations. None is chosen for each layer in "best", like damp, or
        .5 where there is one batch. Not in order "nearest".
    hessian_dtype: torch.float32 or torch.float64, of the sums and the factorization.
    attention_mask: key of a dict batch; tokens where it is 0 count neither in the Hessians nor in
        the means of layers whose input has its shape. None: every token counts.
    forward: called as forward(model, batch) instead of the rules above.
    pack: turn each layer into one that holds its codes in place of its weight (`packed`), in place:
        the outputs stay, memory falls. Layers that share a weight share the codes. A layer whose
        class is not PyTorch's own, or with an attribute of a name that packed layers use, keeps its
        dequantized weight, with a note in its report.
    replay: run each batch anew for every layer, instead of once with the live activations of all
        batches in memory. The results are the same; as many forward passes as layers.
    distributed: among the processes of torch.distributed's default group, each of which makes this
        call with the same arguments, on a device of its own, and gets the same model and report.
        Each runs its part of the batches; sums, and what they find on the way, are put together.
    deterministic: sum each batch apart, and add the sums in the order of the batches: the bits of
        the result do not depend on the number of processes, on GPUs as far as PyTorch's products do
        not depend on the number of rows, which was not tried. Takes memory for a Hessian per batch.
        Else each process sums its batches, and sums are added by rank.
    progress: a bar of tqdm on stderr; some lines where tqdm is not installed, or nobody watches. Or
        a function to call with the name of each layer that is done.

    Layers that get the same tensor (query, key and value; gate and up) and have the same spec share
    one Hessian and one order of columns: they are solved as one matrix with the rows of all, but
    where a share of the weights becomes zero: each layer loses that share.

    A group size that does not divide the columns of a layer becomes one group per row there. A
    layer is not pruned where the M of an N:M sparsity does not divide its input channels. Layers
    that no batch reaches are rounded to nearest. Layers called several times in a forward pass, or
    sharing a weight, are solved once, on inputs of the full-precision model. All of this is noted
    in the report. ValueError for bad arguments, before anything is changed; after an exception the
    model is as it was.

    An expert of a mixture, a module named experts.3 or the like, may see few tokens: a layer of it
    that gets fewer rows than it has columns, or none, is solved on its Hessian and, as C more rows,
    on that which it has when the expert runs on the tokens of all (`hessian.Prior`). Such layers
    keep that matrix until they are solved. Experts in one tensor, as transformers 5 has them, are
    no layers: the report names them, and `experts.unfuse` makes layers of them.

    The experts of a block do not wait for one another: the first layers of all of them are solved
    together, in batches of those of one form, then the second ones, and so on. For each such wave
    the module that runs the experts runs once more on each batch, to sum the rows of its layers.
    Several processes deal the batches out by their cost (`waves`, `solving`).

    The passes of all batches are interleaved. A forward that leaves something in an attribute for
    a later layer to pick up would find what another batch left: calibrate it on one batch. Autocast
    is off, unless `forward` turns it on.
    """
    started = time.perf_counter()
    overrides = dict(overrides or {})
    options = choose(
        preset, order=order, block=block, starts=starts, sweeps=sweeps, candidates=candidates,
        rounds=rounds, damp=damp, drift_correction=drift_correction,
    )  # fmt: skip
    drift = options.pop("drift_correction")
    options |= dict(precision=precision, backend=backend)
    _check(model, batches, spec, skip, overrides, batchnorm, drift, hessian_dtype, options)
    _check_flags(
        bias_correction=bias_correction, pack=pack, replay=replay, distributed=distributed,
        deterministic=deterministic,
    )  # fmt: skip
    if options["order"] == "nearest":
        options["damp"], drift = DAMP, 0.0
    batches, skip = list(batches), list(skip)
    if not batches:
        raise ValueError("batches is empty: calibration needs at least one batch")
    targets, skipped = find_targets(model, spec, skip, overrides)
    if not targets:
        raise ValueError(f"no layer to quantize; left out: {skipped or 'none found'}")
    if pack:
        for target in targets.values():
            packed.check_spec(target.spec)
            twins = [model.get_submodule(name) for name in target.twins]
            if reason := next(filter(None, map(packed.obstacle, twins)), None):
                target.notes.append(f"not packed: {reason}")
    ranks = Ranks(distributed)
    run = _Run(
        model, batches, targets, batchnorm, bias_correction, drift, hessian_dtype,
        attention_mask, forward or feed, replay, ranks, deterministic, options,
    )  # fmt: skip
    stage = run.stopwatch.stage
    with undisturbed(model), _restored_on_error(model):
        with stage("first forward pass"):
            run.observe()
        with progress_bar(run.costs(), progress) as advance, stage("second forward pass"):
            run.solve_all(advance)
        if batchnorm == "reestimate":
            with stage("BatchNorm statistics"):
                run.corrections.reestimate(run.run_all)
        if pack:
            with stage("packing"):
                run.pack()
        skipped |= run.corrections.kept
        told = dict(
            model=type(model).__name__, preset=preset, spec=asdict(spec), skip=skip,
            overrides={name: asdict(other) for name, other in overrides.items()},
            **options, drift_correction=drift, batchnorm=batchnorm, bias_correction=bias_correction,
            hessian_dtype=str(hessian_dtype).removeprefix("torch."), attention_mask=attention_mask,
            pack=pack, replay=replay, batches=len(batches), processes=ranks.size,
            deterministic=deterministic,
        )  # fmt: skip
        return Report(
            layers=tuple(run.layers_done),
            skipped=skipped,
            corrected=run.corrections.corrected,
            seconds=time.perf_counter() - started,
            stages=run.stopwatch.seconds,
            memory=peak_memory(run.device),
            environment=environment(run.device),
            options=told,
        )


def _check(
    model: nn.Module,
    batches: object,
    spec: object,
    skip: object,
    overrides: Mapping[str, object],
    batchnorm: object,
    drift: object,
    hessian_dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    """ValueError for arguments that would fail later, or would quietly mean something else."""
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(
            f"batches must be an iterable of batches, got one {type(batches).__name__}; "
            "pass [batch] for a single one"
        )
    if isinstance(skip, str):
        raise ValueError(f"skip must be an iterable of patterns, got {skip!r}; pass [{skip!r}]")
    if not isinstance(skip, Iterable):
        raise ValueError(f"skip must be an iterable of patterns, got {skip!r}")
    for name, value in (("spec", spec), *((f"overrides[{k!r}]", v) for k, v in overrides.items())):
        if not isinstance(value, QuantSpec):
            raise ValueError(f"{name} must be a QuantSpec, got {value!r}")
    if batchnorm not in get_args(BatchNormRule):
        raise ValueError(f"batchnorm must be one of {get_args(BatchNormRule)}, got {batchnorm!r}")
    if drift is not None and (
        isinstance(drift, bool) or not isinstance(drift, int | float) or not 0 <= drift <= 1
    ):
        raise ValueError(f"drift_correction must be a number from 0 to 1, got {drift!r}")
    lazy = [name for name, tensor in _tensors(model) if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} not initialized yet; run the model once before")
    # a problem of one weight: the solver says what it thinks of its options before the model runs
    HessianSum(1, 1, dtype=hessian_dtype)
    one = next((p for p in model.parameters() if p.is_floating_point()), torch.ones(1))
    uses_triton(one, options["backend"])
    sparse = any(isinstance(s, QuantSpec) and s.sparsity for s in (spec, *overrides.values()))
    solve(
        torch.ones(1, 1), torch.ones(1, 1), QuantSpec(sparsity=0.5 if sparse else None),
        **{**options, "damp": DAMP if options["damp"] is None else options["damp"],
           "backend": "reference"},
    )  # fmt: skip


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


class _Run:
    """State of one call of `quantize`: what the first pass found, and what the second one did."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        targets: dict[str, Target],
        batchnorm: BatchNormRule,
        bias_correction: bool,
        drift_correction: float | None,
        hessian_dtype: torch.dtype,
        mask_key: str | None,
        forward: Forward,
        replay: bool,
        ranks: Ranks,
        deterministic: bool,
        options: dict[str, Any],
    ) -> None:
        self.model, self.batches, self.targets = model, batches, targets
        self.ranks, self.own = ranks, ranks.own(len(batches))
        self.deterministic = deterministic
        self.stopwatch = Stopwatch()
        self.solving = Solving(options, drift_correction, hessian_dtype, ranks, self.stopwatch)
        # where something is to be chosen on them, every fourth batch from the second on
        self.held_out = {*range(1, len(batches), 4)} if self.solving.chooses else set()
        self.hessian_dtype, self.mask_key = hessian_dtype, mask_key
        self.forward, self.replay, self.options = forward, replay, options
        self.device = next(model.parameters()).device
        self.modules = dict(model.named_modules())
        self.corrections = Corrections(self.modules, batchnorm, bias_correction, ranks)
        self.layers_done: list[LayerReport] = []
        self.sequence: list[Station] = []  # order of execution
        self.repeats: dict[Station, int] = {}  # most visits in one forward pass
        self.outputs: dict[str, int] = {}  # layer -> numbers that it put out, in all batches
        # of the batch that this thread runs: its mask, and what each layer got, by name
        self._pass = threading.local()
        self._original: dict[tuple[int, str], Tensor] = {}  # full-precision inputs, by batch, layer
        self._waves = Waves({})

    def observe(self) -> None:
        """First pass, of the untouched model: order of execution, repeats, shared inputs, means."""
        twins = [twin for target in self.targets.values() for twin in target.twins]
        observer = Observer(
            {twin: self.modules[twin] for twin in twins},
            self.corrections.norms,
            mask=lambda: self._pass.mask,
        )
        with _removed(observer.hooks):
            for number in self.own:
                observer.begin(number)
                self._run_batch(self.batches[number], number)
        self.outputs = observer.outputs
        everywhere = {
            n: seen for part in self.ranks.gather(observer.found) for n, seen in part.items()
        }
        batches = [everywhere[number] for number in sorted(everywhere)]
        self.sequence, self.repeats = merge_visits(batch.visits for batch in batches)
        for number, batch in enumerate(batches):
            self.corrections.follower |= batch.follower
            for (what, name), count in batch.visits.items():
                if what == "norm":
                    self.corrections.saw(number, name, count, batch.moments.get((what, name), []))
        for experts in find_experts(self.targets):
            for target in itertools.chain(*experts.values()):
                target.routed = True
        self._sum_repeated()
        find_leaders(self.targets, [batch.inputs for batch in batches])
        self._pool_experts()
        self._waves = Waves(self._find_waves())

    def _find_waves(self) -> dict[str, list[Wave]]:
        sums = len(self.batches) if self.deterministic else 1 + self.solving.chooses
        order = [name for what, name in self.sequence if what == "solve"]
        copies = (1 + self.solving.drifts) * sums
        found = find_waves(self.modules, self.targets, order, copies)
        if found:
            probe = Probe(found, self.modules)
            with _removed(probe.hooks):
                for number in self.own:
                    probe.begin()
                    self._run_batch(self.batches[number], number)
            for name in set().union(*self.ranks.gather(probe.unfit)):
                del found[name]
        return found

    def costs(self) -> dict[str, float]:
        """What each layer takes, in proportion; a Hessian where it is its own."""
        costs = {}
        for name, target in self.targets.items():
            groups, rows, columns = layers.matrix_shape(target.module)
            own = [] if target.leader else target.twins
            inputs = sum(self.outputs.get(twin, 0) for twin in own) // (groups * rows)
            costs[name] = layer_cost(groups, rows, columns, inputs)
        return costs

    def _sum_repeated(self) -> None:
        """Hessians of layers that run more than once per pass, before anything is changed."""
        hooks = []
        for target in self.targets.values():
            count = sum(self.repeats.get(("solve", twin), 0) for twin in target.twins)
            if count > 1:
                target.notes.append(f"called {count} times: calibrated on full-precision inputs")
                target.repeated = True
                hooks += [
                    self.modules[twin].register_forward_pre_hook(
                        partial(self._add_call, target, twin), with_kwargs=True
                    )
                    for twin in target.twins
                ]
        if hooks:
            with _removed(hooks):
                for number in self.own:
                    self._run_batch(self.batches[number], number)

    def _pool_experts(self) -> None:
        """A `Prior` for layers of experts that fewer rows come to than they have columns.

        Each such expert is run on what all experts of its block get: another pass.
        """
        pooling = Pooling(
            self.targets, self.modules, self.ranks.gather(self.outputs), self._add_call
        )
        if not pooling.pools:
            return
        with _removed(pooling.hooks):
            for number in self.own:
                self._run_batch(self.batches[number], number)
        for target, pool, members in pooling.pools:
            total, held_out = self.solving.sums(pool)
            total.merge(held_out)
            if total.rows:
                target.prior = Prior(total.take()[0], total.rows, members)

    def solve_all(self, advance: Advance) -> None:
        """Second pass, in lockstep: solve a layer, correct what follows, go on."""
        original = _copied(self.model) if self.solving.drifts else None
        passes = []
        for number in self.own:
            batch = self.batches[number]
            if original is not None:
                passes.append(partial(self._run_batch, batch, number, original))
            passes.append(partial(self._run_batch, batch, number))
        corrections = self.corrections
        moments = {n: ChannelMoments() for n in corrections.norms if corrections.corrects(n)}
        actions: dict[Station, Action] = {
            ("solve", twin): partial(self._solve, target, advance)
            for target in self.targets.values()
            for twin in target.twins
        }
        actions |= {
            ("norm", name): partial(corrections.correct_norm, name, now)
            for name, now in moments.items()
        }
        actions |= {wave.station: partial(self._solve_wave, wave, advance) for wave in self._waves}
        seen = [station for station in self._waves.order(self.sequence) if station in actions]
        meeting = (Replay if self.replay else Lockstep)(
            passes, {station: actions[station] for station in [*seen, *actions]}, self._agree
        )
        hooks = []
        if original is not None:
            hooks += [
                original.get_submodule(name).register_forward_pre_hook(
                    partial(self._meet_original, meeting, target, name), with_kwargs=True
                )
                for target in self.targets.values()
                if not target.repeated
                for name in target.twins
            ]
        for name, waves in self._waves.blocks.items():
            for model in (self.model, *([] if original is None else [original])):
                meet = partial(self._meet_wave, meeting, quantizes=model is self.model)
                hooks.append(
                    model.get_submodule(name).register_forward_pre_hook(
                        partial(self._waves.run, waves, meet), with_kwargs=True
                    )
                )
        for target in self.targets.values():
            for twin in target.twins:
                hooks.append(
                    self.modules[twin].register_forward_pre_hook(
                        partial(self._meet_layer, meeting, target, twin), with_kwargs=True
                    )
                )
        hooks += [
            corrections.norms[name].register_forward_pre_hook(
                partial(self._meet_norm, meeting, name, now), with_kwargs=True
            )
            for name, now in moments.items()
        ]
        with _removed(hooks):
            meeting.run()
        missed = [target for target in self.targets.values() if not target.solved]
        for target in missed:
            target.leader, target.solution = None, None
            target.notes.append("no calibration row reached it")
        for target in missed:
            self._solve(target, advance)

    def _meet_wave(self, meeting: Meeting, wave: Wave, quantizes: bool) -> None:
        meeting.meet(wave.station, acts=quantizes)
        if not quantizes:
            for target in wave.targets:
                self._original.pop((self._pass.number, target.name), None)

    def _solve_wave(self, wave: Wave, advance: Advance) -> None:
        """Those that rows have come to; what none has reached by now is as any other layer."""
        wave.done = True
        with self.stopwatch.stage("solves"):
            seen = self.ranks.gather([t.name for t in wave.targets if any(t.sums.values())])
            reached = {name for names in seen for name in names}
            for target in wave.targets:
                self._settle(target)
            groups = [
                self._with_companions(target)
                for target in wave.targets
                if target.leader is None and not target.solved and target.name in reached
            ]
            if groups:
                self.solving.solve(groups)
            for target in (target for group in groups for target in group):
                self._finish(target)
                advance(target.name)

    def _agree(self, own: Place | None) -> Place | None:
        """The first of the places where the passes of all processes wait."""
        places = [place for place in self.ranks.gather(own) if place is not None]
        first = min((number for number, _ in places), default=None)
        if first is None:
            return None
        return first, any(due for number, due in places if number == first)

    def _meet_layer(
        self, meeting: Meeting, target: Target, name: str, module: Layer, args: Any, kwargs: Any
    ) -> None:
        if self._waves.passes_by(name):
            return
        station: Station = ("solve", name)
        if not target.solved and meeting.is_new(station):
            call = self._call(name, args, kwargs)
            if target.leader is not None:
                self._share_inputs(meeting, target, target.leader, call)
            elif not target.repeated:
                self._add_rows(target, call)
        if target.leader is None:  # its companions ask for it
            self._pass.inputs[name] = VersionedRef(layers.called_with(name, args, kwargs))
        if not target.solved and not self._waves.collects(name):
            meeting.meet(station)

    def _meet_original(
        self, meeting: Meeting, target: Target, name: str, module: Layer, args: Any, kwargs: Any
    ) -> None:
        """The full-precision model waits with its input: the quantized one comes after it."""
        if self._waves.passes_by(name) or target.solved:
            return
        key = self._pass.number, name
        inputs = layers.called_with(name, args, kwargs)
        if self._waves.collects(name):  # it waits when all experts have run, and may change this
            self._original[key] = inputs.clone()
            return
        self._original[key] = inputs
        meeting.meet(("solve", name), acts=False)
        del self._original[key]

    def _share_inputs(self, meeting: Meeting, target: Target, leader: Target, call: Call) -> None:
        """The rows are in the leader's Hessian, unless quantization changed the model's ways."""
        if not self.replay:
            target.calls.append(call)
        met = self._pass.inputs.get(leader.name)
        if met is None or not met.matches(call.inputs):
            if self.replay and self.ranks.size > 1:
                raise ValueError(
                    f"once quantized, {target.name!r} is not on the inputs of {leader.name!r}, "
                    "which several processes cannot tell each other when they replay"
                )
            self._part_from_leader(target, leader)  # calls of other batches, which wait, too
            if isinstance(meeting, Replay):
                wave = [wave.station for wave in self._waves if target in wave.targets]
                meeting.forget(("solve", target.name), *wave)

    def _call(self, name: str, args: Any, kwargs: Any) -> Call:
        original = self._original.get((self._pass.number, name))
        inputs = layers.called_with(name, args, kwargs)
        return Call(inputs, self._pass.mask, original, self._pass.number)

    def _add_call(self, target: Target, name: str, module: Layer, args: Any, kwargs: Any) -> None:
        self._add_rows(target, self._call(name, args, kwargs))

    def _add_rows(self, target: Target, call: Call) -> None:
        with self.stopwatch.stage("Hessians"):
            started = time.perf_counter()
            self._sum_rows(target, call)
            target.seconds_hessian += time.perf_counter() - started

    def _sum_rows(self, target: Target, call: Call) -> None:
        rows, window = layers.input_rows(target.module, call.inputs.detach(), call.mask)
        check_finite(rows, f"the input of {target.name!r}", " during calibration")
        sums = target.sums[call.batch in self.held_out]
        key = call.batch if self.deterministic else self.ranks.rank
        if key not in sums:
            sums[key] = target.empty_sum(self.hessian_dtype, self.solving.drifts)
        total = sums[key]
        total.add(rows, window, self.options["precision"], self.options["backend"])
        if total.drifts is not None and not target.repeated:
            if call.original is not None and call.original.shape == call.inputs.shape:
                before, _ = layers.input_rows(target.module, call.original, call.mask)
                check_finite(before, f"the input of {target.name!r} in the full-precision model")
                if target.routed and window is None:
                    paired = is_paired(rows, before)
                    total.unmatched += int((~paired).sum())
                    before = before.where(paired[:, None], rows)
                total.add_drift(rows, before, window)
            else:
                total.unmatched += len(rows)

    def _solve(self, target: Target, advance: Advance) -> None:
        """Solve a layer, unless its leader has brought the solution, and put that into effect."""
        if not target.solved:  # by a twin that other batches reached first
            with self.stopwatch.stage("solves"):
                self._finish(target)
            advance(target.name)

    def _part_from_leader(self, target: Target, leader: Target) -> None:
        """What `_share_inputs` does, and where calls of this process had no reason, for them."""
        target.leader, target.solution = None, None
        target.notes.append(f"once quantized, not on the inputs of {leader.name}: solved alone")
        for call in target.calls:
            self._add_rows(target, call)

    def _settle(self, target: Target) -> None:
        """Whether it has a leader, which other processes may have found that it has not."""
        if target.led_by is not None:
            alone = self.ranks.gather(target.leader is None)
            if any(alone) and target.leader is not None:
                self._part_from_leader(target, target.leader)

    def _with_companions(self, target: Target) -> list[Target]:
        return [target, *(other for other in self.targets.values() if other.leader is target)]

    def _finish(self, target: Target) -> None:
        self._settle(target)
        if target.solution is None:
            self.solving.solve([self._with_companions(target)])
        solution, target.solution = target.solution, None
        assert solution is not None
        started = time.perf_counter()
        result, report = solution.result, solution.result.report
        target.notes += report.notes
        quantized = result.dequantize()
        if solution.rows:
            lost = solution.weight.float() - quantized
            target.notes += self.corrections.correct_biases(target.twins, lost, solution.mean)
        layers.store_weight(target.module, quantized)
        check_parts(target.module, target.name, ("weight", "bias"), ", once quantized")
        if solution.others:
            names = ", ".join(solution.others)
            apart = f"shares the Hessian of {names}, solved by itself"
            together = f"solved together with {names}: one Hessian"
            target.notes.append(apart if target.spec.share else together)
        B, R, C = result.codes.shape
        grids = result.scale.cpu(), result.zero_point.cpu()
        self.layers_done.append(
            LayerReport(
                name=target.name,
                kind=target.kind,
                shape=tuple(target.module.weight.shape),
                matrix=(B, R, C),
                spec=target.spec,
                order=report.order,
                quantized=Quantized(result.codes.cpu(), *grids),
                error=float(report.error.sum()),
                energy=float(report.energy.sum()),
                nearest_error=solution.baseline.error,
                rows=solution.rows,
                damp=float(report.damp.max()),
                drift_correction=solution.drift_correction,
                dead_columns=int(report.dead_columns.sum()),
                fallbacks=int(report.fallback.sum()),
                sparsity=float(result.sparsity.mean()),
                seconds_hessian=target.seconds_hessian,
                seconds_solve=solution.seconds + time.perf_counter() - started,
                columns=solution.baseline.columns,
                notes=tuple(target.notes),
            )
        )
        target.solved, target.calls, target.prior = True, [], None

    def _meet_norm(
        self,
        meeting: Meeting,
        name: str,
        now: ChannelMoments,
        module: Layer,
        args: Any,
        kwargs: Any,
    ) -> None:
        station: Station = ("norm", name)
        if name in self.corrections.corrected:
            return
        if meeting.is_new(station):
            now.add(layers.called_with(name, args, kwargs), self._pass.number)
        meeting.meet(station)

    def run_all(self) -> None:
        for batch in self.batches:
            self._run_batch(batch)

    def pack(self) -> None:
        """Codes in place of weights; all of them are made before the first layer is changed."""
        made = []
        for layer in self.layers_done:
            twins = [self.modules[name] for name in self.targets[layer.name].twins]
            if not any(map(packed.obstacle, twins)):
                device = twins[0].weight.device
                codes, scale, zero_point = (
                    tensor.to(device) for tensor in (layer.codes, layer.scale, layer.zero_point)
                )
                tensors = packed.pack_weight(codes, scale, zero_point, layer.spec)
                made.append((twins, layer.spec, tensors))
        for twins, spec, tensors in made:
            for twin in twins:
                packed.to_packed(twin, spec, tensors)

    def _run_batch(self, batch: Any, number: int = 0, model: nn.Module | None = None) -> None:
        batch = to_device(batch, self.device)
        mask = batch.get(self.mask_key) if isinstance(batch, Mapping) and self.mask_key else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            check_finite(mask, f"the {self.mask_key} of a batch", "; it must hold 0 and 1")
        self._pass.inputs, self._pass.number = {}, number
        if model is not None:  # what an earlier pass of the batch has left
            for key in [key for key in self._original if key[0] == number]:
                del self._original[key]
        self._waves.begin()
        self._pass.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.forward(model or self.model, batch)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"drift_correction runs a copy of the model, which cannot be made ({error}); "
            "pass drift_correction=0"
        ) from error


@contextmanager
def _removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put all parameters and buffers back, their values and themselves, if anything is raised."""
    stores: list[Any] = [s for m in model.modules() for s in (m._parameters, m._buffers)]
    held = [(store, dict(store)) for store in stores]
    saved = [(tensor, tensor.detach().clone()) for _, tensor in _tensors(model)]
    try:
        yield
    except BaseException:
        for store, tensors in held:
            store.clear()
            store.update(tensors)
        for tensor, value in saved:
            layers.overwrite(tensor, value)
        raise
