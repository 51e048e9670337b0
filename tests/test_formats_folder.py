"""A folder is replaced as a whole or not at all, however a save ends."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sapq_triton import QuantSpec, load, quantize, read_report, save
from sapq_triton.formats import folder as folder_module
from sapq_triton.formats import writer
from sapq_triton.formats.folder import read_json
from sapq_triton.report_files import report_files
from tests.tiny import Net, assert_same_state, packed_net, state

ROOT = Path(__file__).parents[1]
SPEC = QuantSpec(4, 32, True, scale_dtype="float16")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")
STEPS = [
    ("write_tensors", writer),
    ("write_json", writer),
    ("sha256", writer),
    ("_read_back", writer),
    ("sync", folder_module),
    ("_swap", folder_module),
]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("step, module", STEPS)
def test_a_failing_save_leaves_everything_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    module: object,
    error: BaseException,
) -> None:
    save(packed_net(SPEC), tmp_path / "net")
    before = contents(tmp_path)
    monkeypatch.setattr(module, step, fail_with(error))
    for target in ("net", "new"):
        with pytest.raises(type(error)):
            save(packed_net(SPEC), tmp_path / target)
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_disk_that_fills_up_in_the_second_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    write, written = safetensors.torch.save_file, []

    def save_file(tensors: object, path: Path, metadata: object) -> None:
        write(tensors, path, metadata=metadata)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise FULL

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        save(packed_net(SPEC), tmp_path / "net", max_shard_size=4000)
    assert len(written) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", ["first.qweight", "first.scale", "head.bias", "steps"])
def test_what_reads_back_otherwise_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    save(packed_net(SPEC), tmp_path / "net")
    before = contents(tmp_path)
    write = folder_module.write_tensors

    def garbled(folder: Path, tensors: dict[str, torch.Tensor], size: int | str) -> None:
        changed = tensors[tensor].detach().clone()
        changed.reshape(-1)[-1] += 1
        write(folder, {**tensors, tensor: changed}, size)

    monkeypatch.setattr(writer, "write_tensors", garbled)
    with pytest.raises(RuntimeError, match=r"is not what was written"):
        save(packed_net(SPEC), tmp_path / "net")
    assert contents(tmp_path) == before


def test_tensors_that_are_missing_on_the_disk_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folder_module.write_tensors

    def forgetful(folder: Path, tensors: dict[str, torch.Tensor], size: int | str) -> None:
        write(folder, {name: x for name, x in tensors.items() if name != "steps"}, size)

    monkeypatch.setattr(writer, "write_tensors", forgetful)
    with pytest.raises(RuntimeError, match="read back"):
        save(packed_net(SPEC), tmp_path / "net", "gptq")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from sapq_triton import save
from sapq_triton.formats import writer
from sapq_triton.report_files import report_files
from tests.tiny import packed_net
from tests.test_formats_folder import SPEC

setattr(writer, {step!r}, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
save(packed_net(SPEC), {target!r})
"""


def test_a_killed_save_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    net = packed_net(SPEC)
    save(net, tmp_path / "net")
    before = contents(tmp_path / "net")
    code = KILLED.format(root=str(ROOT), step="_read_back", target=str(tmp_path / "net"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(tmp_path / "net") == before
    assert {path.name for path in tmp_path.iterdir()} == {"net", ".net.partial"}
    (tmp_path / ".net.partial" / "more").mkdir()
    other = packed_net(SPEC)
    save(other, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert_same_state(load(tmp_path / "net", Net()), state(other))


def test_two_saves_to_one_place(tmp_path: Path) -> None:
    with folder_module.replaced(tmp_path / "net") as partial:
        (partial / "a").write_text("first")
        with pytest.raises(ValueError, match="net is being written by another process"):
            save(packed_net(SPEC), tmp_path / "net")
        assert (partial / "a").read_text() == "first"
    assert contents(tmp_path) == {"net/a": b"first"}


@pytest.mark.parametrize("exchange", ["renameat2", "two renames"])
def test_a_save_replaces_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: str
) -> None:
    if exchange == "two renames":  # as where the file system cannot exchange
        monkeypatch.setattr(folder_module, "RENAME_EXCHANGE", 1 << 20)
    save(packed_net(SPEC), tmp_path / "net", "gptq", max_shard_size=4000)
    other = packed_net(SPEC)
    save(other, tmp_path / "net", "compressed-tensors")
    assert {path.name for path in (tmp_path / "net").iterdir()} == {
        "config.json", "model.safetensors", "sapq.json",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert_same_state(load(tmp_path / "net", Net()), state(other))


def test_the_first_of_two_renames_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "RENAME_EXCHANGE", 1 << 20)
    save(packed_net(SPEC), tmp_path / "net")
    before, rename = contents(tmp_path), os.rename

    def interrupted(source: Path, target: Path) -> None:
        if source.name == ".net.partial":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(packed_net(SPEC), tmp_path / "net")
    assert contents(tmp_path) == before


def test_files_of_others_are_not_lost(tmp_path: Path) -> None:
    save(packed_net(SPEC), tmp_path / "net")
    (tmp_path / "net" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"net holds thesis\.tex, which would be lost: choose a"):
        save(packed_net(SPEC), tmp_path / "net")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        save(packed_net(SPEC), tmp_path / "net" / "thesis.tex")
    assert contents(tmp_path) == before


def test_targets_that_are_empty_linked_or_deep(tmp_path: Path) -> None:
    net = packed_net(SPEC)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(net, tmp_path / "link")
    save(net, tmp_path / "a" / "b")
    assert (tmp_path / "link").is_symlink()
    for target in ("empty", "a/b"):
        assert_same_state(load(tmp_path / target, Net()), state(net))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    net = packed_net(SPEC)
    for name in ("a", "b"):
        save(net, tmp_path / name, "gptq")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() > {"first.g_idx", "head.weight"}


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors", "safetensors.torch"])
def test_without_the_extra_its_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sapq-triton\[hf\]'"):
        save(packed_net(SPEC), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_report_lies_beside_the_model(tmp_path: Path) -> None:
    model = Net(torch.float32)
    options = dict(skip=["head"], pack=True, progress=False)
    report = quantize(model, [torch.randn(9, 64)], QuantSpec(4, 32), **options)
    for _ in range(2):  # it does not stand in the way of the next one
        save(model, tmp_path / "net", report=report)
    assert (tmp_path / "net" / "report.html").read_text() == report_files(report)["report.html"]
    assert [x.name for x in read_report(tmp_path / "net").layers] == ["first", "second"]
    load(tmp_path / "net", Net(torch.float32))
    manifest = read_json(tmp_path / "net" / "sapq.json")
    assert manifest["files"]["report.html"] is None  # its times are those of one run
    (tmp_path / "net" / "report.html").write_text("of somebody who adds a remark")
    (tmp_path / "net" / "report.json").unlink()
    load(tmp_path / "net", Net(torch.float32))
    other = tmp_path / "report.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"report\.json would take the place of a file"):
        save(model, tmp_path / "new", report=report, files=[other])
    assert not (tmp_path / "new").exists()
