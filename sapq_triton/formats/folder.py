"""Folders of safetensors: replaced as a whole or not at all, read with every tensor accounted for.

Nothing here knows what the tensors mean. Tensors are read from safetensors only: unpickling a file
can run whatever it says.
"""

import ctypes
import errno
import fcntl
import hashlib
import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "sapq.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_CONFIG = "quantize_config.json"  # that older programs wrote for GPTQ
GENERATION = "generation_config.json"
MANIFEST_VERSION = 1
RENAME_EXCHANGE = 2  # linux/fs.h


def optional(name: str) -> Any:
    """A package of the extra `hf`, imported when it is needed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{missing.name} is not installed: pip install 'sapq-triton[hf]'", name=missing.name
        ) from missing


def program() -> str:
    """Name and version, for files; a checkout that is not installed has none."""
    try:
        return f"sapq-triton:{version('sapq-triton')}"
    except PackageNotFoundError:
        return "sapq-triton"


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` if nothing is raised.

    Until then `folder` stays as it is; afterwards everything is on the disk. Only a folder that is
    empty, or holds nothing but what its own manifest lists, is replaced: ValueError for others, and
    while another process writes to the same place. What a killed process leaves behind is a hidden
    `.<name>.partial` beside the target, which the next one removes.
    """
    folder = folder.resolve()
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # a lock ends with its process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written by another process") from None
        try:
            _empty(partial)
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
            _swap(partial, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # half a new folder, or the old one
    finally:
        os.close(lock)


def refuse_foreign(folder: Path) -> None:
    """ValueError where replacing `folder` would lose files that no save wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    present = {path.name for path in folder.iterdir()}
    foreign = sorted(present - set(read_manifest(folder).get("files", {})) - {MANIFEST})
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:3])}{' and more' if foreign[3:] else ''}, which "
            "would be lost: choose a new folder, or one that an earlier save wrote"
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Put `new` at `target`, in one step; a folder that was there is at `new` afterwards."""
    if not target.exists():
        os.rename(new, target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    here = ctypes.c_int(-100)  # AT_FDCWD
    paths = os.fsencode(new), os.fsencode(target)
    if libc.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(target))
    # a file system that cannot exchange: two steps, the first of which is taken back on failure
    old = target.with_name(f".{target.name}.old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Of the bytes as safetensors stores them."""
    return hashlib.sha256(raw(tensor).numpy().data).hexdigest()


def raw(tensor: Tensor) -> Tensor:
    """The bytes, uint8 [n], on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    # one element is contiguous whatever its strides, which `view` does not take
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """ValueError for what is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `save` noted about a folder; empty for a folder of someone else's."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    manifest = read_json(path)
    version, checksum = manifest.get("version"), manifest.pop("sha256", None)
    if version != MANIFEST_VERSION:
        raise ValueError(f"{path} has version {version!r}; this program reads {MANIFEST_VERSION}")
    if checksum != _manifest_sha256(manifest):
        raise ValueError(f"{path} has changed since it was saved (sha256)")
    kinds: dict[str, Any] = {"files": str | None, "tensors": str, "layers": dict}
    for key, kind in kinds.items():
        listed = manifest.get(key)
        if not isinstance(listed, dict) or not all(isinstance(x, kind) for x in listed.values()):
            raise ValueError(f"{path} must list its {key}, got {listed!r}")
    for file in manifest["files"]:
        if not is_plain(file):
            raise ValueError(f"{path} must list files of this folder, got {file!r}")
    for name, layer in manifest["layers"].items():
        error = layer.get("relative_error", 0.0)
        if isinstance(error, bool) or not isinstance(error, int | float):
            raise ValueError(f"{path}: the error of {name!r} must be a number, got {error!r}")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """With a checksum of its own."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    write_json(folder / MANIFEST, {**content, "sha256": _manifest_sha256(content)})


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says, whatever its order."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def is_plain(name: str) -> bool:
    """Whether this is the name of a file in a folder, and no way out of it."""
    return Path(name).name == name and "\0" not in name and name not in ("", "..")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """As model.safetensors, or in shards with an index, as huggingface_hub splits them.

    ValueError for a dtype that safetensors does not hold.
    """
    hub, safetensors = optional("huggingface_hub"), optional("safetensors.torch")
    for name, tensor in tensors.items():
        try:
            safetensors.save({name: torch.tensor([], dtype=tensor.dtype)})
        except KeyError:
            raise ValueError(
                f"{name!r} is {tensor.dtype}, which safetensors do not hold: convert it, or "
                "register it with persistent=False"
            ) from None
    split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, _owned({name: tensors[name] for name in names}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """OSError where the disk is full, for which safetensors has an error of its own."""
    try:
        optional("safetensors.torch").save_file(dict(tensors), path, metadata={"format": "pt"})
    except optional("safetensors").SafetensorError as error:
        if not re.search(r"I/O ?error", str(error), re.IGNORECASE):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each all of a memory of its own: what safetensors can write."""
    owned: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        whole = memory.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or memory.data_ptr() in taken:
            tensor = tensor.clone()
        owned[name] = tensor
        taken.add(tensor.untyped_storage().data_ptr())
    return owned


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder, read one by one. ValueError for files that are damaged.

    files: of each tensor. shapes, dtypes: as the headers of the files have them.
    """

    folder: Path
    files: Mapping[str, str] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)
    _opened: Mapping[str, Any] = field(repr=False)  # files by name

    @classmethod
    def of(cls, folder: Path) -> "Tensors":
        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        promised = _weight_map(folder)
        opened = {}
        for file in dict.fromkeys(promised.values()) if promised else [WEIGHTS]:
            opened[file] = _open(folder / file)
            for name in opened[file].keys():  # noqa: SIM118  (not a dict)
                if promised and promised.get(name) != file:
                    raise ValueError(f"{folder / file}: {INDEX} does not list {name!r} there")
                part = opened[file].get_slice(name)
                files[name], shapes[name] = file, tuple(part.get_shape())
                dtypes[name] = part.get_dtype()
        for name, file in promised.items():
            if name not in files:
                raise ValueError(f"{folder / file}: tensor {name!r} of {INDEX} is missing")
        return cls(folder, files, shapes, dtypes, opened)

    def where(self, name: str) -> str:
        """For messages: the file and the tensor."""
        return f"{self.folder / self.files.get(name, WEIGHTS)}: tensor {name!r}"

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum((self.folder / file).stat().st_size for file in set(self.files.values()))

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of tensors; names that are not in the folder count nothing."""
        bits = {name: re.search(r"\d+", self.dtypes[name]) for name in names if name in self}
        return sum(
            math.prod(self.shapes[name]) * (int(found[0]) // 8 if found else 1)  # BOOL
            for name, found in bits.items()
        )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def take(self, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype] = ()) -> Tensor:
        """On the CPU. ValueError for another shape, or a dtype that is not one of `dtypes`."""
        if name not in self:
            raise ValueError(f"{self.where(name)} is missing")
        if self.shapes[name] != shape:
            raise ValueError(
                f"{self.where(name)} must be {list(shape)}, got {list(self.shapes[name])}"
            )
        mapped: Tensor = self._opened[self.files[name]].get_tensor(name)
        tensor = mapped.clone()  # what is in memory must not follow the file
        legal = list(dtypes)
        if legal and tensor.dtype not in legal:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in legal)
            raise ValueError(f"{self.where(name)} must be {names}, got {tensor.dtype}")
        return tensor

    def check(self, manifest: Mapping[str, Any]) -> None:
        """ValueError where a file is not the one that the manifest of its folder describes.

        A file without a checksum is only listed: it may be changed, or gone.
        """
        sums = {file for file, digest in manifest.get("files", {}).items() if digest is not None}
        read = {*self.files.values(), CONFIG, INDEX, OLD_CONFIG, GENERATION}
        for file in sorted(read - sums) if manifest else ():
            if (self.folder / file).exists():
                raise ValueError(f"{self.folder / file} has no checksum in {MANIFEST}")
        for file, digest in manifest.get("files", {}).items():
            path = self.folder / file
            if digest is None:
                continue
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if sha256(path) == digest:
                continue
            changed = [
                name
                for name, digest in manifest["tensors"].items()
                if self.files.get(name) == file
                and tensor_sha256(self.take(name, self.shapes[name])) != digest
            ]
            which = f": tensor {', '.join(map(repr, changed[:3]))}" if changed else ""
            raise ValueError(f"{path} has changed since it was saved (sha256){which}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor to file, of an index; empty where there is none."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            others = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {others[0]} is not read, as unpickling can run code" if others else ""
            raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{hint}")
        return {}
    promised = read_json(folder / INDEX).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name, file in promised.items():
        if not isinstance(file, str) or not is_plain(file):
            raise ValueError(
                f"{folder / INDEX}: {name!r} must lie in a file of this folder, got {file!r}"
            )
    return promised


def _open(path: Path) -> Any:
    """The header is checked against the size of the file here."""
    safetensors = optional("safetensors")
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
