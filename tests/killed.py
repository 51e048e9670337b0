"""Kill a job at random moments until it is finished, and see how often it went on.

    python tests/killed.py SOURCE TEXT OUT KILLS SEED

Each attempt is a process of its own, forked, so that it need not import anything. After each job
the bytes of all files are compared with those of a job that was left alone. Prints JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from sapq_triton.formats.job import JOB, job_folder
from sapq_triton.language import quantize_folder

EACH = 3  # kills of one job, at most


def attempt(options: dict[str, Any], deadline: float | None) -> bool:
    """Whether it came to its end before it was killed, so many seconds after its start."""
    child = os.fork()
    if child == 0:
        try:
            quantize_folder(**options)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if deadline is not None:
        time.sleep(deadline)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if status:
        sys.exit("the job failed by itself")
    return True


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which has times in it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("report.")}


def main(source: Path, text: Path, out: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = dict(
        source=source, target=out / "whole", calibration=text, format="sapq", samples=12,
        sequence_length=24, group_size=32,
    )  # fmt: skip
    quantize_folder(**options)  # here: what it imports need not be imported again
    started = time.monotonic()
    attempt(options, None)
    usual = time.monotonic() - started
    expected = contents(out / "whole")
    options["target"] = target = out / "killed"
    job, draw = job_folder(target), random.Random(seed)
    killed, after = 0, [0] * 10  # kills by the number of finished parts that they left
    while killed < kills:
        for _ in range(min(EACH, kills - killed)):
            if attempt(options, draw.uniform(0, usual)):
                break
            killed += 1
            content = json.loads((job / JOB).read_text()) if (job / JOB).exists() else {"parts": []}
            after[len(content["parts"])] += 1
        else:
            attempt(options, None)
        assert contents(target) == expected, "other bytes"
        left = {path.name for path in out.iterdir()} - {"whole", "killed"}
        assert not left, left
        shutil.rmtree(target)
    print(json.dumps({"kills": killed, "after parts": after, "seconds unharmed": round(usual, 2)}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
