"""Mean bits by layer: uniform widths against those of each score, in one model.

    python -m benchmarks.accuracy.mixed lite0 --images IMAGES.zip --json mixed-lite0.json
    python -m benchmarks.accuracy.mixed yolov5n --weights yolov5n.onnx --images COCO.zip
    python -m benchmarks.accuracy.mixed smollm2 --wikitext wiki.test.raw --group-size 64

lite0 and yolov5n: data and models as in the modules of that name; each seed shuffles the images,
`--calibration` of them calibrate and all others evaluate. output: relative squared change of
objectness and class scores. smollm2: half of `--calibration` sequences of 512 tokens from later
WikiText-2, half from `pydoc_data.topics`, chosen by the seed; the first `--sequences` of 1024
tokens of WikiText-2 evaluate.

`error_curves` holds a quarter of the calibration batches back; `quantize` then calibrates on all of
them. The mean of bits is over the weights of the quantized layers. With --json every cell is
written as soon as it is measured, and cells that the file holds are not run again.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, markdown
from sapq_triton import ErrorCurves, QuantSpec, allocate, error_curves, quantize
from sapq_triton.curves import BITS, Score
from sapq_triton.preset import choose

UNIFORM, ERROR = "uniform", ", standard error"
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class Trial:
    """One model and one split of its data.

    quality: what a quantized model is worth on the evaluation data, name -> value, changes to the
    full-precision model among them. options: of `error_curves`. skip: of that and of `quantize`.
    """

    model: nn.Module
    batches: list[Any]
    quality: Callable[[nn.Module], dict[str, float]]
    options: dict[str, Any]
    skip: tuple[str, ...] = ()


def with_error(name: str, values: Tensor) -> dict[str, float]:
    """Mean over the examples, and its standard error."""
    error = values.std() / len(values) ** 0.5
    return {name: values.mean().item(), name + ERROR: error.item()}


# --- models ---------------------------------------------------------------------------------------


def lite0(options: argparse.Namespace) -> Callable[[int], Trial]:
    from benchmarks.accuracy.lite0 import BATCH, read_images
    from sapq_triton.models.efficientnet_lite import load_efficientnet_lite0, preprocess

    model = load_efficientnet_lite0()
    pixels, labels = read_images(options.images)

    @torch.inference_mode()
    def logits(each: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([each(preprocess(part)) for part in images.split(BATCH)]).double()

    before = logits(model, pixels)

    def trial(seed: int) -> Trial:
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        calibration, held_out = shuffled.tensor_split([options.calibration])

        def quality(quantized: nn.Module) -> dict[str, float]:
            after, was = logits(quantized, pixels[held_out]), before[held_out]
            found, fp32, truth = after.argmax(1), was.argmax(1), labels[held_out]
            change = 100 * ((found == truth).double() - (fp32 == truth).double())
            p, q = was.log_softmax(1), after.log_softmax(1)
            divergence = (p.exp() * (p - q)).sum(1)
            return {
                "top-1": 100 * (found == truth).double().mean().item(),
                **with_error("change", change),
                **with_error("agreement", 100 * (found == fp32).double()),
                **with_error("KL to fp32", divergence),
            }

        batches = [preprocess(part) for part in pixels[calibration].split(BATCH)]
        return Trial(model, batches, quality, {"loss": "kl"})

    return trial


def yolov5n(options: argparse.Namespace) -> Callable[[int], Trial]:
    from benchmarks.accuracy.coco import SIDE, evaluate, read_archive
    from benchmarks.accuracy.yolov5n import Split, batches, detect
    from sapq_triton.models.yolov5 import load_yolov5_onnx

    model = load_yolov5_onnx(options.weights)
    examples = read_archive(options.images)
    before = detect(model, examples)

    def scaled(each: nn.Module, batch: Tensor) -> Tensor:
        """Boxes in units of the image, so that they weigh like the scores from 0 to 1."""
        boxes, scores = each(batch).tensor_split([4], -1)
        return torch.cat((boxes / SIDE, scores), -1)

    @torch.inference_mode()
    def scores(each: nn.Module, images: list[Tensor]) -> Tensor:
        """Of objects and classes, of every box: [images, boxes, scores]"""
        return torch.cat([each(batch)[..., 4:] for batch in images])

    def trial(seed: int) -> Trial:
        split = Split.of(len(examples), options.calibration, seed)
        held_out = [examples[i] for i in split.evaluation]
        objects = [example.objects for example in held_out]
        was = evaluate([before[i] for i in split.evaluation], objects)
        images = batches(held_out)
        original = scores(model, images)

        def quality(quantized: nn.Module) -> dict[str, float]:
            now = evaluate(detect(quantized, held_out), objects)
            change = (scores(quantized, images) - original).square().sum((1, 2))
            return {
                "mAP50": now.map50,
                "mAP50-95": now.map50_95,
                "change": now.map50_95 - was.map50_95,
                **with_error("output", change / original.square().sum((1, 2)).mean()),
            }

        inputs = batches([examples[i] for i in split.calibration])
        return Trial(model, inputs, quality, {"loss": "squared", "forward": scaled})

    return trial


def smollm2(options: argparse.Namespace) -> Callable[[int], Trial]:
    from benchmarks.accuracy.smollm2 import load, load_tokenizer, perplexity, sequences, topics

    model, tokenizer = load(), load_tokenizer()
    text = options.wikitext.read_text()
    test = sequences(tokenizer, text, 1024, options.sequences)
    before = perplexity(model, test)
    skipped = 2 * options.sequences  # of 512 tokens, which evaluate
    later = sequences(tokenizer, text, 512, 200, skipped), sequences(tokenizer, topics(), 512, 200)

    def trial(seed: int) -> Trial:
        generator = torch.Generator().manual_seed(seed)
        half = options.calibration // 2
        parts = [tokens[torch.randperm(200, generator=generator)[:half]] for tokens in later]
        mixed = torch.stack(parts, 1).flatten(0, 1)  # a batch holds both texts

        def quality(quantized: nn.Module) -> dict[str, float]:
            now = perplexity(quantized, test)
            return {"perplexity": now, "change": now - before, "log ratio": math.log(now / before)}

        def forward(each: Any, ids: Tensor) -> Tensor:
            logits: Tensor = each(input_ids=ids, use_cache=False).logits
            return logits

        batches = list(mixed.split(2))
        return Trial(model, batches, quality, {"loss": "kl", "forward": forward}, ("lm_head",))

    return trial


# --- measurement ----------------------------------------------------------------------------------


def measure(trial: Trial, spec: QuantSpec, curves: ErrorCurves | None, score: str,
            mean_bits: float) -> dict[str, Any]:  # fmt: skip
    """Quantize a copy with the widths of a score, or uniformly, and evaluate it."""
    found, overrides, bits = None, {}, {}
    if curves is not None:
        found = allocate(curves, mean_bits=mean_bits, score=score)
        overrides, bits = found.overrides, {n: s.bits for n, s in found.specs.items()}
    model = copy.deepcopy(trial.model)
    report = quantize(
        model, trial.batches, spec, overrides=overrides, skip=trial.skip,
        forward=trial.options.get("forward"), progress=False,
    )  # fmt: skip
    weights = sum(layer.codes.numel() for layer in report.layers)
    return {
        **trial.quality(model),
        "mean bits": sum(x.codes.numel() * x.spec.bits for x in report.layers) / weights,
        "bytes": sum(layer.bytes for layer in report.layers),
        "layer error": report.relative_error,
        "seconds": report.seconds,
        "bits": bits,
    }


def run(options: argparse.Namespace, trials: Callable[[int], Trial]) -> dict[str, Any]:
    """All cells by "score | seed", those of the file among them."""
    setup = {
        "model": options.model,
        "mean bits": options.mean_bits,
        "bits": options.bits,
        "group size": options.group_size,
        "symmetric": options.symmetric,
        "calibration": options.calibration,
        "samples": options.samples,
        "options": choose("best"),  # those of `quantize`, which may have others tomorrow
        "data": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for name in ("images", "weights", "wikitext")
            if (path := getattr(options, name, None))
        },
    }
    result: dict[str, Any] = {"setup": setup, "cells": {}, "curves": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
        if result["setup"] != setup:
            raise SystemExit(f"{options.json} was measured with {result['setup']}: name another")
    spec = QuantSpec(math.floor(options.mean_bits), options.group_size, options.symmetric)
    for seed in options.seeds:
        keys = {score: f"{score} | {seed}" for score in [UNIFORM, *options.scores]}
        missing = [score for score, key in keys.items() if key not in result["cells"]]
        if not missing:
            continue
        trial = trials(seed)
        curves, seconds = None, 0.0
        if missing != [UNIFORM]:
            started = time.perf_counter()
            curves = error_curves(
                trial.model, trial.batches, spec, options.bits, skip=trial.skip,
                score=[score for score in missing if score != UNIFORM], samples=options.samples,
                **trial.options,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            print(f"curves of seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
            result["curves"][str(seed)] = result["curves"].get(str(seed), {}) | {
                score: {name: curve.errors[score] for name, curve in curves.layers.items()}
                for score in curves.scores
            }
        for score in missing:
            used = None if score == UNIFORM else curves
            cell = measure(trial, spec, used, score, options.mean_bits)
            cell |= {"seconds of curves": seconds if used else 0.0}
            result["cells"][keys[score]] = cell | {"environment": environment(torch.device("cpu"))}
            shown = {k: round(v, 4) for k, v in cell.items() if isinstance(v, float)}
            print(keys[score], shown, file=sys.stderr, flush=True)
            if options.json:
                partial = options.json.with_name(options.json.name + ".partial")
                partial.write_text(json.dumps(result, indent=1) + "\n")
                os.replace(partial, options.json)  # an interruption leaves the old file whole
    return result


# --- table ----------------------------------------------------------------------------------------


def table(result: dict[str, Any], seeds: Sequence[int]) -> str:
    """Means over the seeds, ± what is known of the noise."""
    setup = result["setup"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, cell in result["cells"].items():
        score, _, seed = key.rpartition(" | ")
        if int(seed) in seeds:
            groups.setdefault(score, []).append(cell)
    left_out = ("environment", "bits", "seconds of curves")
    columns = [
        name
        for name in next(iter(groups.values()))[0]
        if name not in left_out and not name.endswith(ERROR)
    ]
    rows = []
    for score, cells in groups.items():
        row = [score]
        for name in columns:
            values = torch.tensor([cell[name] for cell in cells], dtype=torch.float64)
            text = f"{values.mean().item():+.3g}" if name == "change" else f"{values.mean():.4g}"
            if name + ERROR in cells[0]:
                text += f" ± {sum(cell[name + ERROR] for cell in cells) / len(cells):.2g}"
            elif name == "change" and len(cells) > 1:
                text += f" ± {values.std().item():.2g}"
            row.append(text)
        rows.append(row)
    grid = "symmetric" if setup["symmetric"] else "asymmetric"
    groups_of = "per channel" if setup["group size"] < 0 else f"groups of {setup['group size']}"
    commits = sorted({cell["environment"]["commit"] for cell in result["cells"].values()})
    by_example = any("change" + ERROR in cell for cells in groups.values() for cell in cells)
    noise = (
        "± is the standard error over the examples of one seed, each paired with its fp32 result"
        if by_example
        else "± is the sample standard deviation over the seeds"
        if len(seeds) > 1
        else "noise is not known, there is one seed"
    )
    return (
        f"{setup['model']}, mean of {setup['mean bits']:g} bits, widths {setup['bits']}, "
        f"{groups_of}, {grid} MSE grid, {setup['calibration']} calibration examples, seeds "
        f"{', '.join(map(str, seeds))}, commit {', '.join(commits)}; {noise}\n\n"
        + markdown(("bits by", *columns), rows)
    )


# --- command line ---------------------------------------------------------------------------------

TRIALS = {"lite0": (lite0, 128), "yolov5n": (yolov5n, 32), "smollm2": (smollm2, 16)}


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.accuracy.mixed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", choices=TRIALS)
    parser.add_argument("--images", type=Path, help="lite0, yolov5n: a zip")
    parser.add_argument("--weights", type=Path, help="yolov5n: an ONNX file")
    parser.add_argument("--wikitext", type=Path, help="smollm2: the test text of WikiText-2")
    parser.add_argument("--sequences", type=int, default=4, help="smollm2: that evaluate (4)")
    parser.add_argument("--mean-bits", type=float, default=4.0)
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--calibration", type=int, help="examples (128, 32, 16)")
    parser.add_argument("--samples", type=int, default=4, help="of labels, for gradients (4)")
    parser.add_argument("--scores", nargs="*", choices=SCORES, default=list(SCORES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--json", type=Path, help="keep the cells here, and go on from what it holds"
    )
    options = parser.parse_args(arguments)
    needed = {"lite0": ["images"], "yolov5n": ["images", "weights"], "smollm2": ["wikitext"]}
    for name in needed[options.model]:
        if getattr(options, name) is None:
            parser.error(f"{options.model} needs --{name}")
    options.calibration = options.calibration or TRIALS[options.model][1]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of(arguments)
    make, _ = TRIALS[options.model]
    result = run(options, make(options))
    print(table(result, options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
