"""Calibration inputs from arrays, files and folders of images."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from sapq_triton.formats.onnx_calibration import calibration_batches

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8)).astype(np.uint8)
FLOATS = PIXELS.astype(np.float32)


def model(*shape: Any, names: tuple[str, ...] = ("x",), dtype: int = 1) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Sum", names, ["y"])],
        "test",
        [helper.make_tensor_value_info(name, dtype, shape) for name in names],
        [onnx.ValueInfoProto(name="y")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


ANY = model(None, 3, None, None)


def test_floats_are_taken_as_they_are() -> None:
    found = calibration_batches(ANY, FLOATS, batch=2)
    assert [len(one["x"]) for one in found] == [2, 2, 1]
    assert np.array_equal(np.concatenate([one["x"] for one in found]), FLOATS)


def test_pixels_are_normalized() -> None:
    (found,) = calibration_batches(ANY, PIXELS)
    np.testing.assert_array_equal(found["x"], FLOATS / np.float32(255))
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    (found,) = calibration_batches(ANY, PIXELS, mean=mean, std=std)
    expected = (FLOATS - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(found["x"], expected, rtol=1e-6)
    last = PIXELS.transpose(0, 2, 3, 1)
    (found,) = calibration_batches(model(None, None, None, 3), last, mean=mean, std=std)
    np.testing.assert_allclose(found["x"], expected.transpose(0, 2, 3, 1), rtol=1e-6)


def test_dtype_and_batch_of_the_graph() -> None:
    half = calibration_batches(model(1, 3, 6, 8, dtype=10), PIXELS)
    assert len(half) == 5 and half[0]["x"].dtype == np.float16
    with pytest.raises(ValueError, match="batches of 2, which do not divide 5"):
        calibration_batches(model(2, 3, 6, 8), FLOATS)


def test_batches_and_names() -> None:
    two = model(None, 3, None, None, names=("a", "b"))
    batches = [{"a": FLOATS[:2], "b": FLOATS[2:4]}, {"a": FLOATS[:1], "b": FLOATS[:1]}]
    found = calibration_batches(two, batches)
    assert [sorted(one) for one in found] == [["a", "b"]] * 2
    assert np.array_equal(found[0]["b"], FLOATS[2:4])
    with pytest.raises(ValueError, match=r"takes \['a', 'b'\], calibration has \['a'\]"):
        calibration_batches(two, [{"a": FLOATS}])
    with pytest.raises(ValueError, match="several inputs"):
        calibration_batches(two, FLOATS)
    with pytest.raises(ValueError, match="different lengths"):
        calibration_batches(two, {"a": FLOATS, "b": FLOATS[:1]})


def test_files_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", FLOATS)
    np.savez(tmp_path / "one.npz", anything=FLOATS)
    np.savez(tmp_path / "two.npz", a=FLOATS, b=FLOATS + 1)
    for name in ("one.npy", "one.npz"):
        (found,) = calibration_batches(ANY, tmp_path / name)
        assert np.array_equal(found["x"], FLOATS)
    two = model(None, 3, None, None, names=("a", "b"))
    (found,) = calibration_batches(two, tmp_path / "two.npz")
    assert np.array_equal(found["b"], FLOATS + 1)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("bad.npy", "objects.npy"):
        with pytest.raises(ValueError, match=r"holds no NumPy arrays"):
            calibration_batches(ANY, tmp_path / name)


def test_folder_of_images(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, 1:7] = 255  # what a crop to the square keeps
    pixels[0, 6] = 0
    for name in ("b.png", "a.png"):
        Image.fromarray(pixels if name == "a.png" else 255 - pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (found,) = calibration_batches(ANY, tmp_path, size=6)
    assert found["x"].shape == (2, 3, 6, 6)
    assert found["x"][0, :, 0, 5].tolist() == [0, 0, 0]  # height before width
    found["x"][0, :, 0, 5] = 1
    found["x"][1, :, 0, 5] -= 1
    assert (found["x"][0] == 1).all() and (found["x"][1] == 0).all()
    (last,) = calibration_batches(model(None, 6, 6, 3), tmp_path)
    (first,) = calibration_batches(ANY, tmp_path, size=6)
    assert np.array_equal(last["x"], first["x"].transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match="pass size"):
        calibration_batches(ANY, tmp_path)
    with pytest.raises(ValueError, match="no RGB image"):
        calibration_batches(model(None, 4), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        calibration_batches(ANY, tmp_path / "empty", size=6)


@pytest.mark.parametrize(
    "images, options, match",
    [
        ([], {}, "no calibration inputs"),
        (FLOATS[:0], {}, "0 calibration inputs"),
        (FLOATS[:, :2], {}, r"must be \[None, 3, None, None\], got \[5, 2, 6, 8\]"),
        (FLOATS[0], {}, "must be"),
        (PIXELS.astype(np.int64), {}, "must be float32, got int64"),
        (FLOATS * np.nan, {}, "NaN or Inf"),
        (PIXELS, {"std": 0}, "std must be positive, got 0"),
        (PIXELS, {"mean": (1, 2)}, "channels"),
        (FLOATS, {"batch": 0}, "batches of 0"),
        (7, {}, "got int"),
    ],
)
def test_what_does_not_fit_is_refused(images: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        calibration_batches(ANY, images, **options)


def refused(path: Path, message: str, graph: onnx.ModelProto = ANY) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_batches(graph, path)


def npy(shape: str, descr: str = "<f4", data: bytes = bytes(48), version: int = 1) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + (
        header.encode() + data
    )  # fmt: skip


@pytest.mark.parametrize(
    "content, message",
    [
        (npy("(1, 3, 2, 2000000000000)"), "is larger than the file"),
        (npy("(4294967296, 4294967296)"), "is larger than the file"),
        (npy("(-1, -3, 2, 2)"), "is larger than the file"),
        (npy("(1, 3, 2, 1)"), "24 bytes for an array .*, or more"),
        (npy("(1, 3, 2, 2)", data=bytes(40)), "is larger than the file|40 bytes for an array"),
        (npy("(1, 3, 2, 2)", "|O"), "an array of object; legal are numbers"),
        (npy("(1, 3, 2, 2)", "<U1"), "legal are numbers"),
        (npy("(1, 3, 2, 2)", version=3), "version .* is for arrays of records"),
        (npy("(1, 3, 2, 2) + ("), "holds no NumPy arrays"),  # a tokenize.TokenError
        (npy("('a', 1)"), "holds no NumPy arrays"),
        (b"", "holds no NumPy arrays"),
        (b"PK\3\4", "holds no NumPy arrays: File is not a zip file"),
    ],
)
def test_damaged_arrays(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    refused(tmp_path / "x.npy", message)


def test_arrays_of_either_order_and_other_processors(tmp_path: Path) -> None:
    for number, array in enumerate((np.asfortranarray(FLOATS), FLOATS.astype(">f4"), FLOATS)):
        np.save(tmp_path / f"{number}.npy", array)
        (found,) = calibration_batches(ANY, tmp_path / f"{number}.npy")
        assert np.array_equal(found["x"], FLOATS) and found["x"].flags.writeable


def test_archives_that_are_damaged_or_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=FLOATS)
    (found,) = calibration_batches(ANY, path)
    assert np.array_equal(found["x"], FLOATS)
    np.savez(path, x=FLOATS)
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    refused(path, "Bad CRC-32 for file 'x.npy'")
    path.write_bytes(content[:-4])
    refused(path, "holds no NumPy arrays")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", npy("(1000, 3, 1, 1)", data=bytes(12000)))
    refused(path, "'x.npy' is packed in a way that NumPy does not write")


def test_images_that_are_damaged_or_bombs(tmp_path: Path) -> None:
    path, graph = tmp_path / "x.png", model(None, 3, 4, 4)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    refused(tmp_path, r"x\.png is no image that can be read", graph)
    path.write_bytes(content[:40] + b"\1" + content[41:])  # SyntaxError in its library
    refused(tmp_path, r"x\.png is no image that can be read", graph)
    header = b"IHDR" + (12000).to_bytes(4, "big") * 2 + content[24:29]
    chunk = header + zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(content[:12] + chunk + content[33:])
    refused(tmp_path, "could be decompression bomb", graph)
    Image.fromarray(np.zeros((1, 65, 3), np.uint8)).save(path)  # 4 x 260 of it would be resized
    refused(tmp_path, r"x\.png: \(65, 1\) pixels; one side is more than 64 others", graph)


def test_inputs_of_no_type(tmp_path: Path) -> None:
    for number in (0, 99, -1):
        with pytest.raises(ValueError, match="input 'x' is no tensor of a type that ONNX has"):
            calibration_batches(model(None, 3, None, None, dtype=number), FLOATS)
