"""Several real processes over gloo come to the bits of one, and know when one of them is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sapq_triton import QuantSpec, quantize, quantize_folder
from sapq_triton.formats.job import JOB, job_folder
from sapq_triton.hessian import HessianSum
from sapq_triton.ranks import Ranks, deal
from tests.test_replay import MODELS
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. " * 40

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


def ranked(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tests/ranked.py", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True,
        # whether there is a GPU is asked before processes are forked: without starting CUDA
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
             "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )  # fmt: skip


def compare(out: Path, counts: tuple[int, ...], names: list[str], device: str = "cpu") -> None:
    for processes in (0, *counts):
        done = ranked("models", processes, out, device, *names)
        assert done.returncode == 0, done.stderr
    alone = json.loads((out / "0-0.json").read_text())
    assert {name.partition(",")[0] for name in alone} == set(names)
    for processes in counts:
        for rank in range(processes):
            found = json.loads((out / f"{processes}-{rank}.json").read_text())
            for name in alone:
                assert found[name] == alone[name], f"{name}, rank {rank} of {processes}"


def test_two_and_three_processes_come_to_the_bits_of_one(tmp_path: Path) -> None:
    compare(tmp_path, (2, 3), ["convolutions", "ways", "parting-first", "experts", "wide"])


@pytest.mark.slow
def test_every_model_by_one_to_four_processes(tmp_path: Path) -> None:
    compare(tmp_path, (1, 2, 3, 4), [*MODELS, "wide"])


@pytest.mark.gpu
def test_processes_on_a_gpu_come_to_the_bits_of_one(tmp_path: Path) -> None:
    """Over nccl where each of two has a GPU of its own."""
    compare(tmp_path, (1, 2), ["convolutions", "parting-first", "experts", "wide"], "cuda")


def test_work_is_dealt_out_by_its_cost() -> None:
    assert deal([1, 8, 3, 3, 2], 2) == [0, 0, 1, 1, 1]
    assert deal(iter([5.0, 5.0, 5.0]), 2) == [0, 1, 0]
    assert deal([2, 1], 4) == [0, 1] and deal([4, 4], 1) == [0, 0] and deal([], 3) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    save_llama(tmp_path / "source", dtype=torch.float32, num_hidden_layers=4)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("report.")}


@pytest.mark.parametrize("dying", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_ends_the_others_and_the_job_goes_on(
    source: Path, tmp_path: Path, dying: int
) -> None:
    arguments = source, tmp_path / "text.txt", tmp_path / "out"
    done = ranked("folder", 2, *arguments, dying)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["statuses"][dying] == -9 and found["statuses"][1 - dying] == 1
    assert "RuntimeError" in done.stderr or "DistBackendError" in done.stderr
    assert found["seconds"] < 30
    job = job_folder(tmp_path / "out")
    assert len(json.loads((job / JOB).read_text())["parts"]) == 2

    done = ranked("folder", 3, *arguments, -1)  # by another number of processes
    assert done.returncode == 0 and json.loads(done.stdout)["statuses"] == [0, 0, 0], done.stderr
    quantize_folder(
        source, tmp_path / "alone", tmp_path / "text.txt", samples=40, sequence_length=24,
        group_size=32, format="sapq", deterministic=True, progress=False,
    )  # fmt: skip
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not job.exists()


def test_what_is_wrong_for_the_first_process_is_for_all(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    job = job_folder(tmp_path / "out")
    job.mkdir()
    (job / JOB).write_text('{"version": 7}')
    done = ranked("folder", 2, source, tmp_path / "text.txt", tmp_path / "out", -1)
    assert json.loads(done.stdout.splitlines()[-1])["statuses"] == [1, 1]
    assert done.stderr.count("has version 7; this program reads 1") >= 2


def test_torchrun(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
            "sapq_triton", "quantize", source, "--calibration", tmp_path / "text.txt", "--out",
            tmp_path / "out", "--samples", "20", "--sequence-length", "24", "--group-size", "32",
            "--device", "cpu", "--preset", "fast", "--timeout", "1",
        ],
        cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gptq, 0.2 MB of 0.7 MB") == 1  # one of them tells
    assert json.loads((tmp_path / "out" / "report.json").read_text())["options"]["processes"] == 2


def test_rows_of_large_solves_are_shared() -> None:
    ranks = Ranks()
    assert ranks.shared_rows(torch.eye(1024)[None], torch.ones(1, 1024, 1024)) is None  # alone
    ranks.size = 2
    rows = ranks.shared_rows(torch.eye(512)[None], torch.ones(1, 300, 512))
    assert rows is not None and rows.shared
    assert ranks.shared_rows(torch.eye(64)[None], torch.ones(1, 300, 64)) is None


def test_without_a_group() -> None:
    with pytest.raises(ValueError, match=r"needs torch.distributed.init_process_group .* torchrun"):
        quantize(nn.Linear(4, 4), [torch.randn(8, 4)], QuantSpec(4), distributed=True)


def test_one_process_sums_by_batch() -> None:
    sums = {key: HessianSum(1, 3) for key in (2, 0, 1)}
    for part in sums.values():
        part.add(torch.randn(5, 3))
    total = Ranks().sum(sums, HessianSum(1, 3))
    expected: Any = sums[0].total + sums[1].total + sums[2].total
    assert total.rows == 15 and torch.equal(total.total, expected)
    assert Ranks().sum({}, HessianSum(1, 3)).rows == 0
    alone = HessianSum(1, 3)
    assert Ranks().sum({4: alone}, HessianSum(1, 3)) is alone
