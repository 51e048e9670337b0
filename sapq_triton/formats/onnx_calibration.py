"""Calibration inputs of an ONNX model: arrays, files of arrays, folders of images."""

import math
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import helper

from .onnx_graph import Array, Graph, opset_of

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
RGB = 3
TENSOR_TYPES = {*onnx.TensorProto.DataType.values()} - {onnx.TensorProto.UNDEFINED}
LONGEST = 64  # how often the short side of an image may go into the long one


def calibration_batches(
    model: onnx.ModelProto,
    images: Any,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 255.0,
    size: int | None = None,
    batch: int = 16,
) -> list[dict[str, Array]]:
    """Inputs of the graph by name, in batches of the size that it takes, or of `batch`.

    images: an array [N, ...], an iterable of such batches or of dicts of them by input name, the
    path of an .npy or .npz file (one array, or one per input by name), or of a folder of images.
    Floats are taken as they are. uint8 values are pixels: (pixel - mean) / std, where mean and std
    are in units of pixels, one or one per channel; 0 and 255 map them to 0 ... 1. Images are
    resized to the shorter side `size` and cropped to that square (by default the size that the
    graph asks for), as RGB, with channels where the graph has them.

    ValueError for what does not fit the inputs, or is empty.
    """
    inputs = _inputs(model)
    batches = _read(images, inputs, size)
    if not batches:
        raise ValueError("no calibration inputs")
    made = []
    for one in batches:
        if set(one) != set(inputs):
            raise ValueError(f"the graph takes {list(inputs)}, calibration has {list(one)}")
        ready = {name: _prepare(name, inputs[name], one[name], mean, std) for name in inputs}
        count = len(next(iter(ready.values())))
        if any(len(part) != count for part in ready.values()):
            raise ValueError(f"inputs of different lengths: {[len(p) for p in ready.values()]}")
        fixed = next((shape[0] for _, shape in inputs.values() if shape and shape[0]), None)
        step = fixed or batch
        if fixed and count % fixed:
            raise ValueError(f"the graph takes batches of {fixed}, which do not divide {count}")
        if count == 0 or step < 1:
            raise ValueError(f"{count} calibration inputs in batches of {step}")
        made += [
            {name: np.ascontiguousarray(part[start : start + step]) for name, part in ready.items()}
            for start in range(0, count, step)
        ]
    return made


Input = tuple[np.dtype, list[int | None]]  # dtype and shape, None where it may be anything


def _inputs(model: onnx.ModelProto) -> dict[str, Input]:
    names = Graph(model, opset_of(model)).inputs
    found = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type not in TENSOR_TYPES:
            raise ValueError(f"input {value.name!r} is no tensor of a type that ONNX has")
        shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        found[value.name] = (helper.tensor_dtype_to_np_dtype(kind.elem_type), shape)
    return {name: found[name] for name in names}


def _read(images: Any, inputs: Mapping[str, Input], size: int | None) -> list[dict[str, Array]]:
    """Whatever it is, as batches by name of input."""

    def by_name(value: Any) -> dict[str, Array]:
        if isinstance(value, Mapping):
            return {name: np.asarray(part) for name, part in value.items()}
        if len(inputs) != 1:
            raise ValueError(f"the graph has several inputs: name them, {list(inputs)}")
        return {next(iter(inputs)): np.asarray(value)}

    if isinstance(images, str | Path):
        path = Path(images)
        if path.is_dir():
            return [by_name(_read_folder(path, inputs, size))]
        return [by_name(_read_arrays(path, inputs))]
    if hasattr(images, "__array__"):
        return [by_name(images)]
    if isinstance(images, Mapping):
        return [by_name(images)]
    if isinstance(images, Iterable):
        return [by_name(one) for one in images]
    raise ValueError(f"images must be arrays, or a path to some, got {type(images).__name__}")


def _read_arrays(path: Path, inputs: Mapping[str, Input]) -> Any:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(2) != b"PK":
                file.seek(0)
                return _read_array(file, size)
            with zipfile.ZipFile(file) as archive:
                arrays = {
                    info.filename.removesuffix(".npy"): _read_member(archive, info)
                    for info in _members(archive, size)
                }
        # damaged files raise whatever zipfile, zlib, tokenize and NumPy think of
        except Exception as error:
            raise ValueError(f"{path} holds no NumPy arrays: {error}") from error
    if len(arrays) == 1 == len(inputs):  # whatever its name
        return next(iter(arrays.values()))
    return arrays


def _members(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """ValueError for what unpacks to more than NumPy's own files can: at most 1032 times."""
    members = archive.infolist()
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename!r} is packed in a way that NumPy does not write")
    if sum(info.compress_size for info in members) > size:
        raise ValueError("its members overlap")
    return members


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as file:
        return _read_array(file, info.file_size)


def _read_array(file: IO[bytes], size: int) -> Array:
    """Nothing is allocated that a file of `size` bytes cannot hold. ValueError for pickles."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3.0 has names that ASCII cannot write
        raise ValueError(f"version {version} of .npy is for arrays of records")
    read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}; legal are numbers")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"an array {list(shape)} of {dtype} is larger than the file")
    count = math.prod(shape) * dtype.itemsize
    content = file.read(count)
    if len(content) != count or file.read(1):  # the latter also checks the checksum of a .zip
        raise ValueError(f"{len(content)} bytes for an array {list(shape)} of {dtype}, or more")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _read_folder(folder: Path, inputs: Mapping[str, Input], size: int | None) -> Array:
    """uint8 [N, ...] of all images of a folder, in the order of their names."""
    from PIL import Image  # an extra

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no images; known are {', '.join(SUFFIXES)}")
    shape = next(iter(inputs.values()))[1]
    if len(shape) != 4 or RGB not in (shape[1], shape[3]):
        raise ValueError(f"the input of the graph is no RGB image: {shape}")
    first = shape[1] == RGB
    height, width = shape[2:] if first else shape[1:3]
    height, width = size or height, size or width
    if not height or not width:
        raise ValueError("the graph takes images of any size: pass size")
    pixels = []
    for path in paths:
        image = _open_image(path)
        ratio = max(height / image.height, width / image.width)
        sides = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels.append(np.asarray(image.crop((left, top, left + width, top + height))))
    stacked = np.stack(pixels)
    return stacked.transpose(0, 3, 1, 2) if first else stacked


def _open_image(path: Path) -> Any:
    """RGB. ValueError for a file that cannot be decoded, or would be a mosaic when resized."""
    from PIL import Image  # an extra

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = file.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, IndexError, struct.error, ...
        raise ValueError(f"{path} is no image that can be read: {error}") from error
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{path}: {image.size} pixels; one side is more than {LONGEST} others")
    return image


def _prepare(name: str, wanted: Input, value: Array, mean: Any, std: Any) -> Array:
    dtype, shape = wanted
    if value.ndim != len(shape) or any(
        w is not None and w != side for w, side in zip(shape[1:], value.shape[1:], strict=True)
    ):
        raise ValueError(f"input {name!r} must be {shape}, got {list(value.shape)}")
    if value.dtype == np.uint8 and dtype.kind == "f":
        center, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if not (spread > 0).all():
            raise ValueError(f"std must be positive, got {std}")
        sizes = {center.size, spread.size} - {1}
        axis = next((a for a in (1, -1) if {value.shape[a]} >= sizes), None)
        if axis is None:
            raise ValueError(f"mean and std are for {sizes} channels, the input is {value.shape}")
        view = [1] * value.ndim
        view[axis] = -1
        value = (value.astype(np.float32) - center.reshape(view)) / spread.reshape(view)
    elif value.dtype.kind != dtype.kind:
        raise ValueError(f"input {name!r} must be {dtype}, got {value.dtype}")
    with np.errstate(over="ignore"):  # of float64 beyond float32
        value = value.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"input {name!r} holds NaN or Inf in {dtype}")
    return value
