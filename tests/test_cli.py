"""The command line, from a folder of a small random Llama to files and back."""

import json
import resource
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sapq_triton import load, read_report
from sapq_triton.cli import main
from sapq_triton.language import draw_sequences
from sapq_triton.packed import PackedWeight
from tests.tiny import save_llama

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. " * 8
QUICK = ["--samples", "4", "--sequence-length", "32", "--group-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_llama(folder, tie_word_embeddings=True)
    (folder / "LICENSE.txt").write_text("of the model")
    (folder / "README.md").write_text("of the original")
    (folder / "tokenizer_old").mkdir()  # a folder is no companion
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def quantize(source: Path, text: Path, out: Path, *more: str) -> int:
    return main(
        ["quantize", str(source), "--calibration", str(text), "--out", str(out), *QUICK, *more]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors", "sapq"])
def test_from_a_folder_to_a_folder(
    source: Path, text: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(source, text, out, "--format", format) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed and "lm_head: left as it was" in printed
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        for folder in (out, source)
    ]
    assert f"{format}, {sizes[0]:.1f} MB of {sizes[1]:.1f} MB" in printed and sizes[0] < sizes[1]
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE.txt",
        "report.json",
        "report.html",
    }
    assert "README.md" not in names
    manifest = json.loads((out / "sapq.json").read_text())
    assert manifest["files"].keys() == names - {"sapq.json"}

    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    plain: Any = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    model: Any = load(out)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    linear = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    assert packed == [name for name in linear if name != "lm_head"]
    spec = model.get_submodule(packed[0]).spec
    assert (spec.bits, spec.group_size, spec.symmetric, spec.scale_dtype) == (
        4,
        32,
        True,
        "float16",
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.tensor([tokenizer(TEXT[:64])["input_ids"]])
    with torch.no_grad():
        ours, theirs = model(tokens).logits.float(), plain(tokens).logits.float()
    assert 0 < (ours - theirs).norm() < 0.3 * theirs.norm()

    assert main(["inspect", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(packed)
    errors = {line.split()[0]: float(line.split()[-1]) for line in lines[1:-1]}
    assert errors.keys() == set(packed) and all(0 < error < 0.1 for error in errors.values())
    assert f"{format}, 14 layers" in lines[-1]
    report = read_report(out)
    assert {x.name: float(f"{x.relative_error:.3e}") for x in report.layers} == errors
    assert report.options["model"] == "LlamaForCausalLM"
    assert (report.options["order"], report.options["samples"]) == ("sensitivity", 4)
    assert main(["report", str(out)]) == 0
    assert str(report) in capsys.readouterr().out

    if format != "sapq":
        (out / "sapq.json").unlink()  # as a folder of another program
        assert main(["inspect", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines[1:-1]} == set(packed)
        assert {line.split()[-1] for line in lines[1:-1]} == {"-"}


def test_the_same_seed_gives_the_same_files(source: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert quantize(source, text, tmp_path / name, "--seed", seed, "--samples", "2") == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_options_reach_the_model(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--bits", "3", "--asymmetric", "--order", "natural", "--dtype", "bfloat16",
               "--skip", "*.mlp.*", "--format", "compressed-tensors"]  # fmt: skip
    assert quantize(source, text, out, *options) == 0
    model: Any = load(out)
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is nn.Linear
    spec = layer.self_attn.q_proj.spec
    assert (spec.bits, spec.symmetric, spec.scale_dtype) == (3, False, "bfloat16")
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.up_proj" in ignore and "lm_head" in ignore


def test_what_bfloat16_does_to_gptq_is_said(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warned = "Scales are float16, and the model bfloat16"
    assert quantize(source, text, tmp_path / "a", "--dtype", "bfloat16", "--samples", "1") == 0
    assert warned in capsys.readouterr().out
    assert quantize(source, text, tmp_path / "b", "--samples", "1") == 0
    assert warned not in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, option, kind",
    [
        ("model", ["--activations", "uint8"], "ONNX files, *.onnx"),
        ("model", ["--mean", "0"], "ONNX files, *.onnx"),
        ("model.onnx", ["--device", "cpu"], "folders of language models"),
        ("model.onnx", ["--format", "gptq"], "folders of language models"),
        ("model.onnx", ["--timeout", "30"], "folders of language models"),
        ("model.onnx", ["--output-layer"], "folders of language models"),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused(
    capsys: pytest.CaptureFixture[str], model: str, option: list[str], kind: str
) -> None:
    assert main(["quantize", model, "--calibration", "text", "--out", "out", *option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"sapq-triton: {option[0]}: only for {kind}; the model is {model}"


def test_the_output_layer_on_request(text: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        save_llama(tmp_path / "llama", num_hidden_layers=1)
    assert quantize(tmp_path / "llama", text, tmp_path / "out", "--output-layer") == 0
    model: Any = load(tmp_path / "out")
    assert isinstance(model.lm_head, PackedWeight)
    assert quantize(tmp_path / "llama", text, tmp_path / "default") == 0
    model = load(tmp_path / "default")
    assert type(model.lm_head) is nn.Linear
    manifest = json.loads((tmp_path / "out" / "sapq.json").read_text())
    assert manifest["layers"]["lm_head"]["relative_error"] > 0  # calibrated, not only rounded


ERRORS = [
    ([], b"", "text.txt is empty"),
    ([], b" \n ", "text.txt is empty"),
    ([], b"caf\xe9", "text.txt is not UTF-8: byte 0xe9 at 3"),
    ([], b"abc", "text.txt has 3 tokens, which make 0 sequences of 32, and 4 were asked for: "
     "give a longer text, or shorter sequences"),
    ([], b"abc" * 32, "make 3 sequences of 32, and 4 were asked for: give a longer text, fewer "
     "samples (at most 3), or shorter sequences"),
    (["--samples", "0"], None, "samples and sequence length must be positive, got 0, 32"),
    (["--sequence-length", "129", "--samples", "1"], None, "but the model has 128 positions"),
    (["--bits", "5"], None, "5 bits; gptq holds (2, 3, 4, 8): use format 'compressed-tensors'"),
    (["--bits", "9"], None, "bits must be an integer from 2 to 8, got 9"),
    (["--group-size", "8"], None, "groups of 8 columns; gptq is read with"),
    (["--asymmetric"], None, "format 'gptq' cannot hold a zero point of 0, which an asymmetric "
     "group may turn out to have: use format 'gptq_v2'"),
    (["--skip", "nothing"], None, "pattern 'nothing' matches no layer"),
]  # fmt: skip


@pytest.mark.parametrize("options, content, message", ERRORS)
def test_errors_are_one_line(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        text.write_bytes(content)
    monkeypatch.setattr("sapq_triton.blockwise.quantize", lambda *_, **__: pytest.fail("solved"))
    assert quantize(source, text, tmp_path / "out", *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after the bars of transformers
    assert line.startswith("sapq-triton: ") and message in line
    assert not (tmp_path / "out").exists()


def test_folders_that_are_refused(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *arguments: object) -> None:
        assert main([*map(str, arguments)]) == 2
        assert message in capsys.readouterr().err

    rest = ["--calibration", text, "--out", tmp_path / "out", *QUICK]
    refused("is not a model folder: it has no config.json", "quantize", tmp_path, *rest)
    refused("No such file", "quantize", tmp_path / "model.onnx", *rest[:4])
    refused(
        "none.txt is not a file", "quantize", source, *rest[:1], tmp_path / "none.txt", *rest[2:]
    )
    refused(
        "which would be lost: choose a new folder", "quantize", source, *rest[:3], source, *QUICK
    )
    refused("is not quantized: neither sapq.json nor", "inspect", source)
    refused("none is not a folder", "inspect", tmp_path / "none")
    assert quantize(source, text, tmp_path / "out") == 0
    refused("is quantized already", "quantize", tmp_path / "out", *rest)


@pytest.mark.parametrize("options", [[], ["--spill"]])
def test_a_full_disk_is_one_line(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, before[1]))  # less than a block takes
    try:
        assert quantize(source, text, tmp_path / "out", "--preset", "fast", *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sapq-triton: ") and "safetensors cannot be written" in line
    assert "File too large" in line and not (tmp_path / "out").exists()
    assert quantize(source, text, tmp_path / "out", "--preset", "fast", *options) == 0


@pytest.mark.parametrize("device", ["banana", "xpu:99"])
def test_a_device_that_is_none_is_one_line(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    assert quantize(source, text, tmp_path / "out", "--device", device) == 2
    error = capsys.readouterr().err
    assert error.startswith("sapq-triton: device must be one") and error.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")  # of torchrun
    monkeypatch.setenv("LOCAL_RANK", "99")
    assert quantize(source, text, tmp_path / "out", "--device", "cuda") == 2
    assert "got 'cuda:99'" in capsys.readouterr().err


def test_damaged_weights_are_one_line(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert quantize(damaged, text, tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sapq-triton: {weights} is damaged: ")
    weights.unlink()
    assert quantize(damaged, text, tmp_path / "out") == 2
    assert "holds neither model.safetensors nor" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(tmp_path / "llama", vocab_size=64, num_hidden_layers=1)
    assert quantize(tmp_path / "llama", text, tmp_path / "out") == 2
    assert "the model has embeddings for 64: they do not belong together" in capsys.readouterr().err


def test_sequences_are_drawn_without_overlap() -> None:
    tokens = torch.arange(103)
    drawn = draw_sequences(tokens, 5, 10, 0, "text")
    assert drawn.shape == (5, 10)
    starts = drawn[:, 0].tolist()
    assert starts == sorted(set(starts)) and all(start % 10 == 0 for start in starts)
    assert torch.equal(drawn, torch.stack([tokens[start : start + 10] for start in starts]))
    assert torch.equal(draw_sequences(tokens, 10, 10, 3, "text").flatten(), tokens[:100])


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sapq-triton", "inspect", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sapq_triton", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "sapq-triton: nowhere is not a folder\n"
