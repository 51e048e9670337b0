"""Peak memory of quantizing a language model from a folder into a folder, by its size and the way.

    python -m benchmarks.memory --json memory.json

Random Llamas of so many blocks of 3.2 million weights (float32, 12.9 MB); 16 sequences of 256
tokens, in two batches, calibrate. Each run is a process of its own, on a CPU. The whole model in
memory: transformers loads it, `quantize(pack=True)`, `save`. Block by block: `quantize_folder`,
with and without `spill`. Anonymous memory is what the process cannot give back to the system, and
is looked at every 20 ms; resident memory also counts pages of the files that it reads.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, markdown
from sapq_triton import QuantSpec, quantize, quantize_folder, save
from tests.tiny import save_tokenizer

WAYS = ("whole", "blocks", "blocks, spilled")
SAMPLES, LENGTH, GROUP = 16, 256, 64
MB = 1e6


def make(folder: Path, blocks: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def run_body(model: Any, tokens: torch.Tensor) -> object:
    return model.base_model(input_ids=tokens, use_cache=False)


def run(way: str, source: Path, text: Path, out: Path, preset: Any) -> None:
    torch.set_num_threads(1)
    if way != "whole":
        quantize_folder(
            source, out, text, group_size=GROUP, format="sapq", samples=SAMPLES,
            sequence_length=LENGTH, preset=preset, spill="spilled" in way, progress=False,
        )  # fmt: skip
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"]
    batches = torch.tensor(tokens[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH).split(8)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    report = quantize(
        model, batches, QuantSpec(4, GROUP, True, scale_dtype="float16"), pack=True,
        preset=preset, skip=["lm_head"], progress=False,
        forward=run_body,
    )  # fmt: skip
    save(model, out, report=report)


def status(process: int) -> dict[str, int]:
    """Of a process, in bytes: RssAnon, VmHWM, ..."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


def measure(way: str, source: Path, text: Path, out: Path, preset: str) -> dict[str, float]:
    started, anonymous, resident = time.monotonic(), 0, 0
    child = os.fork()
    if child == 0:
        try:
            run(way, source, text, out, preset)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    before = status(child)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            now = status(child)
        except (FileNotFoundError, ProcessLookupError):
            break
        if now:  # a process that is ending has none
            anonymous = max(anonymous, now["RssAnon"])
            resident = max(resident, now["VmHWM"])
        time.sleep(0.02)
    if not (out / "sapq.json").exists():
        raise SystemExit(f"{way} failed")
    return {
        "anonymous MB": (anonymous - before["RssAnon"]) / MB,
        "resident MB": (resident - before["VmRSS"]) / MB,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 48, 96])
    parser.add_argument("--presets", nargs="+", default=["fast"])
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import pydoc_data.topics

    import transformers  # noqa: F401  (before the fork: no run is to count it)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(pydoc_data.topics.topics.values()))
        for blocks in options.blocks:
            source = folder / f"model-{blocks}"
            maker = os.fork()  # for the memory that it takes
            if maker == 0:
                make(source, blocks)
                os._exit(0)
            os.waitpid(maker, 0)
            size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / MB
            written: set[bytes] = set()
            for preset in options.presets:
                for way in options.ways:
                    out = folder / f"{way}-{preset}-{blocks}"
                    found = measure(way, source, folder / "text.txt", out, preset)
                    rows.append({"blocks": blocks, "model MB": size, "preset": preset,
                                 "way": way, **found})  # fmt: skip
                    print(rows[-1], flush=True)
                    if way != "whole":  # the same bits, before anything is said about memory
                        written.add(b"".join(
                            path.read_bytes() for path in sorted(out.glob("*.safetensors"))
                        ))  # fmt: skip
                if len(written) > 1:
                    raise SystemExit("the ways do not come to the same bits")
                written.clear()
    if options.json:
        content = {"environment": environment(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    columns = ("model MB", "preset", "way", "anonymous MB", "resident MB", "seconds")
    print(markdown(columns, [
        tuple(f"{row[c]:.0f}" if isinstance(row[c], float) else row[c] for c in columns)
        for row in rows
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
