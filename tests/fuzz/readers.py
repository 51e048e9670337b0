"""Readers of files, good files for each, and what must hold where they accept a changed one."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, load, quantize, save
from sapq_triton.cli import main
from sapq_triton.compare import compare
from sapq_triton.formats.folder import write_manifest
from sapq_triton.language import read_text
from sapq_triton.packed import BUFFERS, PackedWeight
from sapq_triton.report_files import read_report, report_files
from sapq_triton.report_html import report_page
from tests.tiny import llama, pack_randomly

Changed = dict[str, bytes | None]


@dataclass(frozen=True)
class Reader:
    """make: writes good files into a folder. read: reads them there, where `changed` are not as
    they were, and returns whether it took them: AssertionError for what it should not have taken.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path, Changed], bool]
    mebibytes: int = 48  # that one case may add to the most that was ever in use


class Small(nn.Module):
    """Two packed layers, the second a convolution where asked, and tensors that are nobody's."""

    def __init__(self, other: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Conv2d(4, 4, 2, groups=2) if other is nn.Conv2d else nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(4)
        self.half()


def _packed_small(spec: QuantSpec, other: type[nn.Module] = nn.Linear) -> Small:
    torch.manual_seed(1)
    net = Small(other)
    pack_randomly(net.first, spec)
    pack_randomly(net.second, QuantSpec(spec.bits, -1, spec.symmetric, scale_dtype="float16"))
    return net


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and x.shape == other[name].shape
        and bytes(x.reshape(-1).view(torch.uint8).numpy())
        == bytes(other[name].reshape(-1).view(torch.uint8).numpy())
        for name, x in one.items()
    )  # fmt: skip


def _inspect(path: Path) -> bool:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", str(path)])
    lines = err.getvalue().count("\n")
    assert (code, lines) in ((0, 0), (2, 1)), (code, err.getvalue())
    return code == 0


def _folder(
    name: str,
    format: str,
    spec: QuantSpec,
    *,
    manifest: bool,
    signed: bool = False,
    shards: bool = False,
    other: type[nn.Module] = nn.Linear,
) -> Reader:
    """Folders of packed layers; without `manifest` like another program's. signed: a changed
    manifest has the checksum of what it says, and what it says may have another meaning.
    """
    saved = _packed_small(spec, other)
    expected = _state(saved)
    weights = [saved.first.weight, saved.second.weight]

    def make(folder: Path) -> None:
        size: Any = 1000 if shards else "5GB"
        save(saved, folder / "net", format, max_shard_size=size)
        for path in (folder / "net").iterdir():
            path.rename(folder / path.name)
        (folder / "net").rmdir()
        if not manifest:
            (folder / "sapq.json").unlink()

    def read(folder: Path, changed: Changed) -> bool:
        torch.manual_seed(0)
        if signed:
            _sign(folder)
        model = Small(other)
        before = _state(model)
        shown = _inspect(folder)
        try:
            load(folder, model)
        except (ValueError, OSError):
            assert _same(before, _state(model)), "refused, and the model has changed"
            raise
        assert shown, "loaded, but not shown"
        ours = manifest and not signed and changed.get("sapq.json", b"") is not None
        if ours:
            now = {name: content for name, content in changed.items() if name != "sapq.json"}
            assert not now, f"{[*now]} changed, and was loaded"
            assert _same(expected, _state(model)), "loaded another model than was saved"
            for one, loaded in zip(weights, (model.first, model.second), strict=True):
                assert torch.equal(one, loaded.weight), "the same codes, and another weight"
        _check_packed(model, expected)
        return True

    return Reader(name, make, read)


def _sign(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / "sapq.json").read_text())
        if isinstance(content, dict):
            write_manifest(folder, content)


def _check_packed(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    codes = {f"{n}.{b}" for n in ("first", "second") for b in (*BUFFERS, "weight")}
    assert {*found} - codes == {*expected} - codes
    for name in {*found} - codes:
        assert found[name].shape == expected[name].shape, name
        assert found[name].dtype == expected[name].dtype, name
    for layer in layers.values():
        assert int(layer.codes().max()) <= layer.spec.qmax
        assert int(layer.zero_points().max()) <= layer.spec.qmax
        assert layer.scale.isfinite().all()
        assert layer.scale.dtype == getattr(torch, layer.spec.scale_dtype)
        assert layer.dequantize().shape == (layer.weight.shape)


# --- ONNX -----------------------------------------------------------------------------------------


def small_cnn() -> Any:
    """Conv, BatchNorm, Relu, a pool and a Gemm, of opset 17; 3 x 4 x 4 in, 2 out."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((4, 3, 3, 3)), "b": rng.standard_normal(4),
        "gamma": rng.standard_normal(4), "beta": rng.standard_normal(4),
        "mean": rng.standard_normal(4), "var": rng.random(4) + 0.5,
        "fc": rng.standard_normal((2, 4)), "fc_b": rng.standard_normal(2),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node(
            "BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], "norm"
        ),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc", "fc_b"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "cnn",
        [helper.make_tensor_value_info("x", 1, ("batch", 3, 4, 4))],
        [helper.make_tensor_value_info("y", 1, ("batch", 2))],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _quantized(path: Path, out: Path, images: Any = None, **options: Any) -> Any:
    from sapq_triton.formats.onnx import quantize_onnx

    if images is None:
        images = np.random.default_rng(1).standard_normal((4, 3, 4, 4)).astype(np.float32)
    return quantize_onnx(
        path, images, QuantSpec(4, symmetric=True), out, preset="fast", progress=False, **options
    )


def _onnx(name: str, opset: int, **options: Any) -> Reader:
    """Files that `quantize_onnx` takes."""

    def make(folder: Path) -> None:
        import onnx

        model = small_cnn()
        model.opset_import[0].version = opset
        onnx.save(model, folder / "model.onnx")

    def read(folder: Path, changed: Changed) -> bool:
        from sapq_triton.formats.onnx import inspect_onnx

        out = folder / "out.onnx"
        out.unlink(missing_ok=True)
        try:
            report = _quantized(folder / "model.onnx", out, **options)
        except (ValueError, OSError):
            assert not out.exists()
            raise
        finally:
            assert not [*folder.glob(".*.partial")]
        for layer in report.layers:
            assert int(layer.codes.max()) <= layer.spec.qmax
            assert layer.scale.isfinite().all()
        inspect_onnx(out)
        return True

    return Reader(name, make, read, 512)  # a model of few bytes may compute with large paddings


def _onnx_inspect(name: str, **options: Any) -> Reader:
    """Files that `quantize_onnx` wrote."""
    expected: dict[str, Any] = {}

    def integers(path: Path) -> dict[str, Any]:
        """What reaches each weighted node, to the bit, whatever the names in between."""
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(path).graph
        known = {t.name: t for t in graph.initializer}
        found = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in known:
                parts = [numpy_helper.to_array(known[part]) for part in node.input]
                axis = [a.i for a in node.attribute if a.name == "axis"]
                found[node.output[0]] = [*((x.shape, x.tobytes()) for x in parts), axis]
        return found

    def make(folder: Path) -> None:
        import onnx

        onnx.save(small_cnn(), folder / "plain")
        _quantized(folder / "plain", folder / "model.onnx", **options)
        (folder / "plain").unlink()
        expected.update(integers(folder / "model.onnx"))

    def read(folder: Path, changed: Changed) -> bool:
        from sapq_triton.formats.onnx import inspect_onnx

        shown = _inspect(folder / "model.onnx")
        found = inspect_onnx(folder / "model.onnx")
        assert shown
        now = integers(folder / "model.onnx")
        for item in found:
            (*parts, axis), (*old, old_axis) = now[item.name], expected[item.name]
            assert (parts[:2], axis) == (old[:2], old_axis), "accepted other integers or scales"
            assert not parts[2:] or not any(parts[2][1]), "accepted a zero point"
            assert 2 <= item.weight.bits <= 8
            assert abs(item.weight.values.astype(int)).max() < 2**item.weight.bits
        return True

    return Reader(name, make, read)


def _calibration(name: str, write: Callable[[Path, np.ndarray], None], file: str) -> Reader:
    pixels = np.random.default_rng(2).integers(0, 256, (3, 3, 4, 4)).astype(np.uint8)
    model: list[Any] = []  # made when it is needed

    def make(folder: Path) -> None:
        write(folder, pixels)

    def read(folder: Path, changed: Changed) -> bool:
        from sapq_triton.formats.onnx_calibration import calibration_batches

        model or model.append(small_cnn())
        batches = calibration_batches(model[0], folder / file, batch=2)
        assert batches
        for batch in batches:
            assert [*batch] == ["x"] and batch["x"].dtype == np.float32
            assert batch["x"].shape[1:] == (3, 4, 4) and 1 <= len(batch["x"]) <= 2
            assert np.isfinite(batch["x"]).all()
        return True

    return Reader(name, make, read)


def _write_npy(folder: Path, pixels: np.ndarray) -> None:
    np.save(folder / "images.npy", pixels.astype(np.float32))


def _write_npz(folder: Path, pixels: np.ndarray) -> None:
    np.savez(folder / "images.npz", x=pixels)


def _write_images(folder: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    for number, suffix in enumerate(("png", "jpg", "bmp", "webp")):
        image = Image.fromarray(pixels[number % 3].transpose(1, 2, 0).repeat(3, 0).repeat(3, 1))
        image.save(folder / f"{number}.{suffix}")


def _report(name: str) -> Reader:
    """What a run did, as JSON, and the pages made of it: alone, and beside a good one."""

    def make(folder: Path) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
        report = quantize(model, [torch.randn(9, 8)] * 2, QuantSpec(4, 4), progress=False)
        # nothing of this run or machine: the same cases everywhere
        timed = (replace(x, seconds_hessian=0.25, seconds_solve=0.5) for x in report.layers)
        report = replace(
            report, layers=tuple(timed), seconds=2.0, stages={"solves": 1.5},
            memory={"process": 2**29}, environment={"device": "cpu"},
        )  # fmt: skip
        (folder / "report.json").write_text(report_files(report)["report.json"])
        shutil.copyfile(folder / "report.json", folder / "other")

    def read(folder: Path, changed: Changed) -> bool:
        report = read_report(folder / "report.json")
        assert str(report) and report_page(report)
        both = compare(report, read_report(folder / "other"), ("A", "B"))
        assert str(both) and both.page()
        return True

    return Reader(name, make, read)


def _text(name: str) -> Reader:
    def make(folder: Path) -> None:
        (folder / "text.txt").write_text("Ein Text, in UTF-8: äöü – und noch mehr.\n" * 3)

    def read(folder: Path, changed: Changed) -> bool:
        return bool(read_text(folder / "text.txt").strip())

    return Reader(name, make, read)


def _config(name: str) -> Reader:
    """A folder of which transformers builds the model: config.json of another program."""
    spec = QuantSpec(4, -1, True, scale_dtype="float16")

    def make(folder: Path) -> None:
        torch.manual_seed(1)
        model = llama(num_hidden_layers=1, intermediate_size=64, vocab_size=32)
        for part in model.model.layers.modules():
            if isinstance(part, nn.Linear):
                pack_randomly(part, spec)
        save(model, folder / "net", "gptq")
        for path in (folder / "net").iterdir():
            path.rename(folder / path.name)
        (folder / "net").rmdir()
        (folder / "sapq.json").unlink()
        (folder / "quantize_config.json").unlink()
        (folder / "model.safetensors").rename(folder / "weights")
        json.loads((folder / "config.json").read_text())

    def read(folder: Path, changed: Changed) -> bool:
        if not (folder / "model.safetensors").exists():  # is not among the files that change
            shutil.copyfile(folder / "weights", folder / "model.safetensors")
        model = load(folder)
        assert any(isinstance(part, PackedWeight) for part in model.modules())
        return True

    return Reader(name, make, read)


HALF = QuantSpec(4, 32, True, scale_dtype="float16")
UNEVEN = QuantSpec(3, 16, False, scale_dtype="float16")

READERS: dict[str, Callable[[], Reader]] = {
    "sapq": lambda: _folder("sapq", "sapq", UNEVEN, manifest=True, other=nn.Conv2d),
    "sapq-shards": lambda: _folder("sapq-shards", "sapq", HALF, manifest=True, shards=True),
    "sapq-signed": lambda: _folder("sapq-signed", "sapq", UNEVEN, manifest=True, signed=True),
    "gptq-ours": lambda: _folder("gptq-ours", "gptq", UNEVEN, manifest=True),
    "gptq": lambda: _folder("gptq", "gptq", UNEVEN, manifest=False),
    "gptq_v2": lambda: _folder("gptq_v2", "gptq_v2", HALF, manifest=False, shards=True),
    "compressed": lambda: _folder("compressed", "compressed-tensors", UNEVEN, manifest=False),
    "compressed-ours": lambda: _folder(
        "compressed-ours", "compressed-tensors", HALF, manifest=True
    ),
    "config": lambda: _config("config"),
    "onnx": lambda: _onnx("onnx", 17),
    "onnx-old": lambda: _onnx("onnx-old", 9),
    "onnx-activations": lambda: _onnx("onnx-activations", 17, activations="uint8"),
    "onnx-inspect": lambda: _onnx_inspect("onnx-inspect"),
    "npy": lambda: _calibration("npy", _write_npy, "images.npy"),
    "npz": lambda: _calibration("npz", _write_npz, "images.npz"),
    "images": lambda: _calibration("images", _write_images, ""),
    "report": lambda: _report("report"),
    "text": lambda: _text("text"),
}
