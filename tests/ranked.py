"""Quantize models among several processes, and write down the bits that each comes to.

    python tests/ranked.py models PROCESSES OUT DEVICE [NAMES]
    python tests/ranked.py folder PROCESSES SOURCE TEXT OUT DYING

The processes are forked and meet over gloo; over nccl, too, where DEVICE is cuda and each has a GPU
of its own; 0 models: without torch.distributed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, blockwise, quantize, quantize_folder
from tests.test_replay import MODELS

SPEC = QuantSpec(bits=3)
TIMEOUT = timedelta(seconds=60)


def digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def bits(model: nn.Module, report: Report) -> dict[str, Any]:
    """All that does not depend on how long it took."""
    return {
        "state": {name: digest(tensor) for name, tensor in model.state_dict().items()},
        "layers": [
            [x.name, digest(x.codes), x.error, x.rows, x.damp, x.drift_correction, x.notes]
            for x in report.layers
        ],
        "corrected": report.corrected,
    }


def wide() -> tuple[nn.Module, list[Any]]:
    """A layer whose rows are shared, and whose parts are not of one size."""
    return nn.Sequential(nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 8)), list(
        torch.randn(5, 200, 512).unbind()
    )


ALL = {**MODELS, "wide": wide}


def results(distributed: bool, device: str, names: list[str]) -> dict[str, Any]:
    found = {}
    for name, preset, replay in product(names, ("best", "fast"), (False, True)):
        if replay and name == "wide":
            continue  # takes long
        if replay and name.startswith(("parting", "missing")):
            continue  # what several processes refuse
        torch.manual_seed(0)
        model, batches = ALL[name]()
        report = quantize(
            model.to(device), batches, SPEC, preset=preset, replay=replay, progress=False,  # type: ignore[arg-type]
            distributed=distributed, deterministic=True,
        )  # fmt: skip
        found[f"{name}, {preset}, {'replay' if replay else 'lockstep'}"] = bits(model, report)
    return found


def fork(processes: int, store: Path, work: Any, backend: str = "gloo") -> list[int]:
    """work(rank) in so many processes that have a group; their exit statuses."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                dist.init_process_group(
                    backend, init_method=f"file://{store}", rank=rank, world_size=processes,
                    timeout=TIMEOUT,
                )  # fmt: skip
                work(rank)
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def models(processes: int, out: Path, device: str, names: list[str]) -> None:
    def work(rank: int) -> None:
        own = f"cuda:{rank}" if spread else device
        if spread:
            torch.cuda.set_device(own)
        content = json.dumps(results(processes > 0, own, names))
        (out / f"{processes}-{rank}.json").write_text(content)

    spread = device == "cuda" and gpus() >= processes > 1
    if processes == 0:
        work(0)
    else:
        backend = "cpu:gloo,cuda:nccl" if spread else "gloo"
        if any(fork(processes, out / f"store-{processes}", work, backend)):
            sys.exit("a process failed")


def gpus() -> int:
    """Their number, asked in a process of its own: where CUDA is at work nobody may fork."""
    asked = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.check_output([sys.executable, "-c", asked]))


def folder(processes: int, source: Path, text: Path, out: Path, dying: int) -> None:
    """dying: the process that kills itself in the middle of the third block, if it is not -1."""

    def work(rank: int) -> None:
        solved: list[Any] = []

        def quantize_or_die(*args: Any, **options: Any) -> Report:
            solved.append(args)
            if len(solved) == 3 and rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return quantize(*args, **options)

        blockwise.quantize = quantize_or_die  # type: ignore[assignment]
        quantize_folder(
            source, out, text, samples=40, sequence_length=24, group_size=32, format="sapq",
            distributed=True, deterministic=True, progress=False,
        )  # fmt: skip

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as store:
        statuses = fork(processes, Path(store) / "store", work)
    print(json.dumps({"statuses": statuses, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "models":
        models(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:] or [*ALL])
    else:
        from transformers.utils import logging

        logging.disable_progress_bar()
        source, text, out = map(Path, sys.argv[3:6])
        folder(int(sys.argv[2]), source, text, out, int(sys.argv[6]))
