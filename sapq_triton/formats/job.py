"""A long job on the disk: its finished parts, what goes into the next one, and what it is about.

Beside the folder FOLDER to be written lies `.FOLDER.job`:
    job.json              what the job is about; its finished parts; checksums of all, and of itself
    part-00003/           a finished part, a folder as `save_part` writes it
    activations-00004/    of each batch, what goes into the part that is worked on
A part counts from the moment at which job.json names it: whenever the process is killed, all before
that stays, and what is not named is removed by the next one.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .folder import (
    MANIFEST,
    Tensors,
    optional,
    program,
    read_json,
    read_manifest,
    refuse_foreign,
    sha256,
    sync,
    write_file,
    write_json,
)

JOB = "job.json"
VERSION = 1

Role = Literal["quantized", "original"]


@dataclass
class Activations:
    """Of each batch, what goes into a part in the quantized model, and in the original one.

    in_memory: else only those are in memory that are in use.
    """

    folder: Path
    in_memory: bool
    _held: dict[tuple[int, Role], Tensor] = field(default_factory=dict)
    _written: set[tuple[int, Role]] = field(default_factory=set)

    def write(self, number: int, role: Role, activations: Tensor) -> None:
        """number: of the batch."""
        self._written.add((number, role))
        if self.in_memory:
            self._held[number, role] = activations.cpu()
        else:
            self._save(number, role, activations)

    def read(self, number: int, role: Role) -> Tensor:
        """On the CPU, a copy. The original ones are the quantized ones where nobody wrote them."""
        for each in (role, "quantized"):
            if (number, each) in self._held:
                return self._held[number, each].clone()
            if self._file(number, each).exists():
                tensor = optional("safetensors.torch").load_file(self._file(number, each))
                found: Tensor = tensor["activations"]
                if self.in_memory:
                    self._held[number, each] = found.clone()
                return found
        raise RuntimeError(f"{self.folder}: activations of batch {number} are missing")

    def has(self, number: int, role: Role) -> bool:
        return (number, role) in self._held or self._file(number, role).exists()

    def flush(self) -> dict[str, str]:
        """All that was written is on the disk: checksums by the name of the file."""
        self.folder.mkdir(exist_ok=True)
        for (number, role), tensor in self._held.items():
            self._save(number, role, tensor)
        files = [self._file(*key) for key in sorted(self._written)]
        for path in (*files, self.folder):
            sync(path)
        return {path.name: sha256(path) for path in files}

    def _file(self, number: int, role: Role) -> Path:
        return self.folder / f"{number:05}-{role}.safetensors"

    def _save(self, number: int, role: Role, tensor: Tensor) -> None:
        self.folder.mkdir(exist_ok=True)
        content = {"activations": tensor.detach().cpu().contiguous()}
        write_file(self._file(number, role), content)


class Job:
    """An unfinished job. Made by `open_job`, in one process, which alone may finish parts.

    content: that of job.json.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What was noted about the finished ones."""
        found: list[dict[str, Any]] = self.content["parts"]
        return found

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}"

    def activations(self, number: int, in_memory: bool) -> Activations:
        """What goes into this part; empty unless it is the first that is not finished."""
        return Activations(self.folder / f"activations-{number:05}", in_memory)

    def finish(self, note: Mapping[str, Any], activations: Mapping[str, str]) -> None:
        """Count the part that was written last. activations: checksums of what goes into the next
        one, by file.
        """
        number = len(self.parts)
        entry = {"manifest": sha256(self.part(number) / MANIFEST), **note}
        self.content["parts"].append(entry)
        self.content["activations"] = dict(activations)
        self._write()
        shutil.rmtree(self.folder / f"activations-{number:05}", ignore_errors=True)

    def _write(self) -> None:
        partial = self.folder / f"{JOB}.partial"
        write_json(partial, {**self.content, "sha256": _digest(self.content)})
        sync(partial)
        os.replace(partial, self.folder / JOB)
        sync(self.folder)

    def _resume(self) -> None:
        """ValueError where what lies there is another job, or is damaged."""
        path = self.folder / JOB
        stored = read_json(path)
        if stored.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {stored.get('version')!r}; this program reads {VERSION}"
            )
        if stored.pop("sha256", None) != _digest(stored):
            raise ValueError(f"{path} has changed since it was written: begin anew")
        about, own = stored.get("about"), json.loads(json.dumps(self.content["about"]))
        if changes := list(_changes(about, own)):
            raise ValueError(
                f"{self.folder} is an unfinished job, and not this one: {'; '.join(changes)}. Go "
                "on with what it was begun with, or begin anew (restart=True, --restart)"
            )
        self.content = stored
        for number, part in enumerate(self.parts):
            manifest = self.part(number) / MANIFEST
            if not manifest.is_file() or sha256(manifest) != part["manifest"]:
                raise ValueError(f"{manifest} has changed since it was written: begin anew")
            Tensors.of(self.part(number)).check(read_manifest(self.part(number)))
        folder = self.activations(len(self.parts), False).folder
        for name, digest in stored["activations"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise ValueError(f"{folder / name} has changed since it was written: begin anew")

    def _clear(self) -> None:
        """Remove what a killed process has left unfinished."""
        known = {JOB, *(self.part(number).name for number in range(len(self.parts)))}
        if self.content["activations"]:
            known.add(self.activations(len(self.parts), False).folder.name)
        for path in self.folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _changes(stored: Any, own: Any, where: str = "") -> Iterator[str]:
    """Each leaf that is not the same, in words."""
    if isinstance(stored, dict) and isinstance(own, dict):
        for key in sorted(stored.keys() | own.keys()):
            if stored.get(key) != own.get(key):
                yield from _changes(stored.get(key), own.get(key), f"{where}{key} ".lstrip())
    elif stored != own:
        short = lambda value: value if len(str(value)) <= 40 else f"{str(value)[:12]}…"
        yield f"{where}was {short(stored)}, is {short(own)}"


def job_folder(target: Path) -> Path:
    target = target.resolve()
    return target.with_name(f".{target.name}.job")


@contextmanager
def open_job(target: Path, about: Mapping[str, Any], restart: bool = False) -> Iterator[Job]:
    """The job of writing a folder, where it stands; it is gone when nothing is raised.

    about: everything that the result depends on, as JSON: options, checksums of what is read,
    versions. restart: forget what is there.

    ValueError where an unfinished job is about something else, naming what; for files that were
    changed; while another process works on the same; and where the target holds files of others.
    """
    refuse_foreign(target.resolve())
    new: dict[str, Any] = {"version": VERSION, "writer": program(), "about": dict(about)}
    job = Job(job_folder(target), {**new, "parts": [], "activations": {}})
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.folder.mkdir(exist_ok=True)
    lock = os.open(job.folder, os.O_RDONLY)  # a lock ends with its process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{target} is being written by another process") from None
        if (job.folder / JOB).exists() and not restart:
            job._resume()
        else:
            job._write()
        job._clear()
        yield job
        (job.folder / JOB).unlink()  # first: a folder without it is nobody's
        shutil.rmtree(job.folder)
    finally:
        os.close(lock)
