"""Run a reader on changed files, within limits of time and memory, and count what it does.

One reader, some cases: python -m tests.fuzz.harness READER --cases N --first K
"""

import argparse
import contextlib
import faulthandler
import json
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from .mutate import mutated
from .readers import READERS, Changed, Reader

SECONDS = 5
ADDRESSES = 2**30  # of memory beyond what the process had before its first case
WARM = 30  # cases during which libraries still load their parts


@dataclass
class Tally:
    """refused: with an error that the command line turns into one line. faults: anything else."""

    reader: str
    cases: int = 0
    refused: int = 0
    accepted: int = 0
    unchanged: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)  # by case


class Hang(BaseException):
    """Not an Exception: no reader may take it for a damaged file."""


def case(files: dict[str, bytes], reader: str, number: int) -> Changed:
    """The files that case `number` changes; the same ones in every process."""
    return mutated(files, Random(f"{reader} {number}"))


def fuzz(reader: Reader, folder: Path, numbers: range, progress: Path | None = None) -> Tally:
    """folder: empty. progress: a file that names the case that runs, for whoever watches."""
    reader.make(folder)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix}
    kept = {path.name for path in folder.iterdir()}
    assert reader.read(folder, {}), f"{reader.name} refuses a good file"
    tally, started = Tally(reader.name), time.perf_counter()
    with _limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            if progress is not None:
                progress.write_text(str(number))
            changed = case(files, reader.name, number)
            changed = {k: v for k, v in changed.items() if v != files[k]}
            tally.cases += 1
            if not changed:
                tally.unchanged += 1
                continue
            for name, content in changed.items():
                _put(folder / name, content)
            before, high = time.perf_counter(), _peak()
            try:
                with _alarm():
                    reader.read(folder, changed)
                tally.accepted += 1
            except (ValueError, OSError, ModuleNotFoundError) as error:
                tally.refused += 1
                if not _is_clear(error):
                    tally.faults[number] = f"unclear {type(error).__name__}: {error}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                tally.faults[number] = f"{type(error).__name__}: {error}"[:300]
            tally.slowest = max(tally.slowest, time.perf_counter() - before)
            if tally.cases > WARM and _peak() - high > reader.mebibytes * 2**20:
                tally.faults[number] = f"took {(_peak() - high) / 2**20:.0f} MiB"
            for name in changed:
                _put(folder / name, files[name])
            for path in folder.iterdir():  # what a case has left
                if path.name not in kept:
                    path.unlink()
    tally.seconds = time.perf_counter() - started
    return tally


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def _is_clear(error: BaseException) -> bool:
    """Raised on purpose: a subclass of ValueError comes from a parser that nobody watched."""
    return type(error) in (ValueError, ModuleNotFoundError) or isinstance(error, OSError)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """An allocation that no small file justifies fails, instead of being granted and never used."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESSES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", choices=[*READERS])
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--progress", type=Path)
    options: Any = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(options.first, options.first + options.cases)
        tally = fuzz(READERS[options.reader](), Path(folder), numbers, options.progress)
    json.dump(asdict(tally), sys.stdout)


if __name__ == "__main__":
    main()
