"""A job that is interrupted, by whatever, goes on; one that is not the same is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sapq_triton import quantize_folder
from sapq_triton.cli import main
from sapq_triton.formats.job import JOB, Activations, job_folder, open_job
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. " * 40
SMALL: dict[str, Any] = dict(
    samples=12, sequence_length=24, group_size=32, format="sapq", preset="fast"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_llama(folder, dtype=torch.float32, num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def run(source: Path, out: str = "out", **options: Any) -> dict[str, bytes]:
    """The bytes of the files of the result, but for the report, which has times in it."""
    folder = source.parent / out
    quantize_folder(source, folder, source.parent / "text.txt", **{**SMALL, **options})
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("report.")}


class Accident(Exception):
    """Raised on purpose."""


@pytest.fixture
def interrupted(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run until so many parts are written; the folder of the job."""
    from sapq_triton import blockwise

    def interrupt(after: int, **options: Any) -> Path:
        written: list[Path] = []

        def save_part(part: Any, folder: Path, *rest: Any) -> None:
            if len(written) == after:
                raise Accident
            real(part, folder, *rest)
            written.append(folder)

        real = blockwise.save_part
        monkeypatch.setattr(blockwise, "save_part", save_part)
        with pytest.raises(Accident):
            run(source, **options)
        monkeypatch.setattr(blockwise, "save_part", real)
        assert not (source.parent / "out").exists()
        return job_folder(source.parent / "out")

    return interrupt


@pytest.mark.parametrize(("after", "spill"), [(0, False), (1, False), (1, True), (3, False)])
def test_an_interrupted_job_goes_on(
    source: Path,
    interrupted: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    spill: bool,
) -> None:
    from sapq_triton import blockwise

    expected = run(source, "whole", spill=spill, preset="best")
    job = interrupted(after, spill=spill, preset="best")
    assert len(json.loads((job / JOB).read_text())["parts"]) == after
    calls: list[Any] = []
    real = blockwise.quantize
    monkeypatch.setattr(blockwise, "quantize", lambda *a, **o: calls.append(a) or real(*a, **o))
    assert run(source, spill=spill, preset="best") == expected
    assert len(calls) == 3 - after  # nothing is done twice
    assert not job.exists()


def killed(source: Path, kills: int) -> dict[str, Any]:
    out = source.parent / "outs"
    out.mkdir()
    command = ["tests/killed.py", source, source.parent / "text.txt", out, str(kills), "1"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_killed_job_comes_to_the_same_bytes(source: Path) -> None:
    assert killed(source, 2)["kills"] == 2


@pytest.mark.slow
def test_thirty_kills(source: Path) -> None:
    found = killed(source, 30)
    print(found)
    assert found["kills"] == 30 and sum(found["after parts"][1:]) >= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(bits=3),
            "options bits was 4, is 3. Go on with what it was begun with, or begin anew",
        ),
        (dict(seed=5, spill=True), "options seed was 0, is 5; options spill was False, is True"),
        (dict(preset="best"), "options preset was fast, is best"),
        (dict(skip=["*.q_proj"]), "options skip was [], is ['*.q_proj']"),
    ],
)
def test_other_options_are_refused(
    source: Path, interrupted: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    job = interrupted(1)
    before = (job / JOB).read_bytes()
    with pytest.raises(ValueError, match="is an unfinished job, and not this one") as error:
        run(source, **options)
    assert message in str(error.value)
    assert (job / JOB).read_bytes() == before
    assert run(source)  # as it was begun


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="bad"), "preset must be one of ('best', 'fast'), got 'bad'"),
        (dict(order="bogus"), "order must be one of"),
        (dict(device="meta"), "device must be one that this PyTorch computes on"),
        (dict(device="banana"), "got 'banana': Expected one of"),
        (dict(device="xpu:99"), "got 'xpu:99': "),
        (dict(skip="lm_head"), "skip must be an iterable of patterns, got 'lm_head'; pass ['lm_"),
    ],
)
def test_bad_options_leave_no_job(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        run(source, **options)
    assert message in str(error.value)
    assert not job_folder(source.parent / "out").exists()


def test_other_inputs_are_refused(source: Path, interrupted: Callable[..., Path]) -> None:
    interrupted(1)
    text = source.parent / "text.txt"
    text.write_text(TEXT.upper())
    with pytest.raises(ValueError, match=r"not this one: calibration was \w{12}…, is \w{12}…"):
        run(source)
    text.write_text(TEXT)
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"inputs model.safetensors was \w{12}…, is \w{12}…"):
        run(source)
    (source / "extra.json").write_text("{}")
    with pytest.raises(ValueError, match=r"inputs extra.json was None, is \w{12}…"):
        run(source)


def test_another_number_of_threads_is_refused(
    source: Path, interrupted: Callable[..., Path]
) -> None:
    """Sums of matrix products may then be taken in another order."""
    interrupted(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=f"environment threads was {threads}, is"):
            run(source)
    finally:
        torch.set_num_threads(threads)


def test_restart_begins_anew(source: Path, interrupted: Callable[..., Path]) -> None:
    expected = run(source, "whole", bits=3)
    job = interrupted(2)
    assert main([
        "quantize", str(source), "--calibration", str(source.parent / "text.txt"), "--out",
        str(source.parent / "out"), "--samples", "12", "--sequence-length", "24", "--group-size",
        "32", "--format", "sapq", "--preset", "fast", "--bits", "3", "--device", "cpu",
    ]) == 2  # fmt: skip
    assert run(source, bits=3, restart=True) == expected
    assert not job.exists()


@pytest.mark.parametrize(
    "file",
    [
        "part-00001/sapq.json",
        "part-00001/model.safetensors",
        "activations-00002/00001-quantized.safetensors",
        JOB,
    ],
)
@pytest.mark.parametrize("damage", ["changed", "missing", "truncated"])
def test_damage_is_found(
    source: Path, interrupted: Callable[..., Path], file: str, damage: str
) -> None:
    path = interrupted(2) / file
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-9])
    else:
        path.unlink()
    if file == JOB and damage == "missing":
        assert run(source)  # a folder that is nobody's
        return
    with pytest.raises(ValueError, match=path.name):
        run(source)
    assert not (source.parent / "out").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_job(tmp_path / "out", {"a": 1}),
        pytest.raises(ValueError, match="is being written by another process"),
        open_job(tmp_path / "out", {"a": 1}),
    ):
        pass
    assert not job_folder(tmp_path / "out").exists()


def test_a_target_of_others_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis.txt, which would be lost"):
        open_job(tmp_path / "out", {}).__enter__()
    assert not job_folder(tmp_path / "out").exists()


def test_a_job_of_another_version_is_refused(tmp_path: Path) -> None:
    job = job_folder(tmp_path / "out")
    job.mkdir()
    (job / JOB).write_text('{"version": 7}')
    with pytest.raises(ValueError, match="has version 7; this program reads 1"):
        open_job(tmp_path / "out", {}).__enter__()
    assert (job / JOB).exists()


def test_what_a_killed_process_left_unfinished_is_gone(
    source: Path, interrupted: Callable[..., Path]
) -> None:
    job = interrupted(1)
    about = json.loads((job / JOB).read_text())["about"]
    for left in ("activations-00002", "part-00001", ".part-00001.partial"):
        (job / left).mkdir()
        (job / left / "00000-original.safetensors").write_bytes(b"half")
    with open_job(source.parent / "out", about):
        assert {path.name for path in job.iterdir()} == {JOB, "part-00000", "activations-00001"}


@pytest.mark.parametrize("in_memory", [False, True])
def test_activations_come_back_as_they_were(tmp_path: Path, in_memory: bool) -> None:
    here = Activations(tmp_path / "a", in_memory)
    x, y = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(4, 3).mT
    here.write(0, "quantized", x)
    assert torch.equal(here.read(0, "original"), x) and not here.has(0, "original")
    here.write(0, "original", y)
    x, y = x.clone(), y.clone()
    for each in (here, Activations(tmp_path / "a", not in_memory)):
        here.flush()
        read = each.read(0, "original")
        assert torch.equal(read, y) and torch.equal(each.read(0, "quantized"), x)
        read.zero_()  # what is read is the reader's own
        assert torch.equal(each.read(0, "original"), y)
    with pytest.raises(RuntimeError, match="activations of batch 7 are missing"):
        here.read(7, "quantized")
