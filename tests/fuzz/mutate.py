"""Mutations of files: what disks, networks and other programs do to them, and what malice does.

Each takes the bytes of a file and a seeded `random.Random`, and returns other bytes. Those that
know a form (JSON, safetensors, .npy, .zip, protobuf, PNG) keep it, checksums included, so that the
change gets past the first check of a reader.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

INTEGERS = (
    -1, 0, 1, 2, 3, 7, 8, 9, 63, 65, 127, 128, 255, 256, 65536, -128, -(2**31), 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, -(2**63),
)  # fmt: skip
NAMES = (
    "", ".", "..", "../model.safetensors", "/etc/hostname", "a/b", "a\0b", "\ud800", "é" * 40,
    "x" * 5000, "model.safetensors", "config.json", "Linear", "first", "second", "(", "re:(", "+:[",
    "gptq", "gptq_v2", "sapq", "int32", "float16", "nf4", "weight", "__metadata__", "constructor",
)  # fmt: skip
DEEP = "@deep@"  # stands for more brackets than a recursive parser has stack


def bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def run(data: bytes, rng: Random) -> bytes:
    """A run of the same byte, or of noise."""
    at, size = _run(data, rng)
    value = rng.choice((b"\0", b"\xff", b" ", b"{", rng.randbytes(1), None))
    return data[:at] + (rng.randbytes(size) if value is None else value * size) + data[at + size :]


def truncated(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def dropped(data: bytes, rng: Random) -> bytes:
    at, size = _run(data, rng)
    return data[:at] + data[at + size :]


def duplicated(data: bytes, rng: Random) -> bytes:
    at, size = _run(data, rng)
    return data[: at + size] + data[at : at + size] * rng.choice((1, 1, 5)) + data[at + size :]


def spliced(data: bytes, rng: Random) -> bytes:
    """A run over another place."""
    at, size = _run(data, rng)
    to = rng.randrange(len(data) + 1)
    return data[:to] + data[at : at + size] + data[to + size :]


def number(data: bytes, rng: Random) -> bytes:
    """An integer that is the last of its kind, or beyond it."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, len(data) - size))
    value = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    return data[:at] + value + data[at + size :]


def _run(data: bytes, rng: Random) -> tuple[int, int]:
    at = rng.randrange(len(data) + 1)
    return at, min(rng.choice((1, 2, 4, 8, 32, 256)), len(data) - at)


BYTES: tuple[Mutate, ...] = (bits, run, truncated, dropped, duplicated, spliced, number)


def any_bytes(data: bytes, rng: Random) -> bytes:
    return rng.choice(BYTES)(data, rng)


# --- JSON -----------------------------------------------------------------------------------------


def json_text(data: bytes, rng: Random) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:
        return any_bytes(data, rng)
    return dump(json_value(content, rng))


def dump(content: object) -> bytes:
    text = json.dumps(content)  # escapes what is no UTF-8
    deep = "[" * 100_000 + "]" * 100_000
    return text.replace(f'"{DEEP}"', deep).encode()


def json_value(content: Any, rng: Random) -> Any:
    """One to three changes somewhere in it; `content` itself is changed."""
    holder = [content]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = rng.choice(places)
        other, other_key = rng.choice(places)
        change = rng.randrange(8)
        if change < 4:
            parent[key] = strange(rng, parent[key])
        elif change == 4 and parent is not holder:
            del parent[key]
        elif change == 5 and isinstance(parent, dict):
            parent[rng.choice(NAMES)] = parent.pop(key)
        elif change == 6:
            parent[key] = json.loads(json.dumps(other[other_key]))
        else:
            parent[key] = rng.choice(([parent[key]], {"": parent[key]}))
    return holder[0]


def strange(rng: Random, old: Any) -> Any:
    if isinstance(old, int) and rng.random() < 0.5:
        return old + rng.choice((-1, 1, old, 2**31))
    if isinstance(old, str) and rng.random() < 0.5:
        return rng.choice((old[1:], old + "/", "../" + old, old.upper(), old * 2))
    return rng.choice((
        None, True, False, 0.5, -1.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], DEEP,
        10**30, 10**4000, rng.choice(INTEGERS), rng.choice(INTEGERS), rng.choice(NAMES),
    ))  # fmt: skip


def _places(parent: Any) -> Any:
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    for key in keys:
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])


# --- safetensors ----------------------------------------------------------------------------------

DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "F64": 8, "U64": 8, "F4": 1, "X9": 4, "": 0, "f32": 4,
}  # fmt: skip


def safetensors(data: bytes, rng: Random) -> bytes:
    """A change of the header alone, or of the tensors, with a header that fits them."""
    try:
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    except ValueError:
        return any_bytes(data, rng)
    if rng.random() < 0.5:
        text = dump(_header(header, rng))
        length = len(text) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**64
        return length.to_bytes(8, "little") + text + body
    about = header.pop("__metadata__", None)
    tensors = {
        name: [entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    _tensors(tensors, rng)
    made, parts, end = {} if about is None else {"__metadata__": about}, [], 0
    for name, (dtype, shape, part) in tensors.items():
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = dump(made)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _header(header: dict[str, Any], rng: Random) -> Any:
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, change = header[name], rng.randrange(6)
    if change == 0:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -1, 1, 8, 2**62))
    elif change == 1:
        entry["data_offsets"] = header[rng.choice([*header])].get("data_offsets", [0, 0])
    elif change == 2:
        entry["shape"] = rng.choice(([2**32, 2**32], [2**63, 2], [-1], [0], [], [1] * 100))
    elif change == 3:
        entry["dtype"] = rng.choice([*DTYPES])
    elif change == 4:
        header = {**{name: header.pop(name)}, **header}
    else:
        header = json_value(header, rng)
    return header


def _tensors(tensors: dict[str, list[Any]], rng: Random) -> None:
    name = rng.choice([*tensors])
    dtype, shape, part = tensors[name]
    width, change = DTYPES[dtype], rng.randrange(8)
    if change == 0:
        del tensors[name]
    elif change == 1:
        new = rng.choice((rng.choice(NAMES), rng.choice([*tensors]), name.replace(".", "..")))
        tensors[new] = tensors.pop(name)
    elif change == 2:  # the same bytes as another dtype
        alike = [other for other, size in DTYPES.items() if size == width]
        tensors[name][0] = rng.choice(alike)
    elif change == 3:
        tensors[name][1] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [len(part) // width]))
    elif change == 4:  # fewer or more
        count = max(0, len(part) // width + rng.choice((-1, 1, -4, 32)))
        tensors[name] = [dtype, [count], (part * 2 + bytes(1024))[: count * width]]
    elif change == 5:
        tensors[name][2] = any_bytes(part, rng)[: len(part)].ljust(len(part), b"\0")
    elif change == 6:  # NaN, Inf, the largest, in the bytes of any dtype
        at = rng.randrange(max(1, len(part) // width)) * width
        value = rng.choice((b"\xff" * 8, b"\0" * 6 + b"\x80\x7f", b"\0\x7c" * 4, b"\xff\x7b" * 4))
        tensors[name][2] = (part[:at] + value[-width:] + part[at + width :])[: len(part)]
    else:
        tensors[name] = tensors[rng.choice([*tensors])]


# --- NumPy ----------------------------------------------------------------------------------------


def npy(data: bytes, rng: Random) -> bytes:
    """The header of an array, which is a Python literal."""
    if data[:6] != b"\x93NUMPY" or rng.random() < 0.2:
        return any_bytes(data, rng)
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size].decode("latin1"), data[10 + size :]
    shape = header[header.index("(") : header.index(")") + 1]
    descr = header[header.index(":") + 3 : header.index(",") - 1]
    old, new = rng.choice((
        (shape, rng.choice((
            "(-1,)", "()", "(0,)", "(1000000000000,)", "(4294967296, 4294967296)", "(2, 3, 4, 4)",
            "(True,)", "('a',)", "(9223372036854775807, 3, 4, 4)", "(1.0,)", shape + "*9", "[5]",
        ))),
        (descr, rng.choice((
            "|O", ">f4", "<f8", "<f2", "|u1", "<i8", "<c8", "|V4", "<U1000", "|S0", "<M8[ns]", "x",
        ))),
        (f"'{descr}'", rng.choice(("[('a', '<f4')]", "None", "1", "[]", "('<f4', (2,))"))),
        ("False", rng.choice(("True", "None", "1", "x"))),
        (header, "(" * 3000 + header), (header, ""), ("}", ""), ("{", "{'more': 1, "),
        ("'shape'", "'shape '"),
    ))  # fmt: skip
    text = header.replace(old, new, 1).encode("latin1").ljust(size)
    start = data[:6] + bytes([rng.choice((1, 1, 1, 1, 2, 3, 9)), 0])
    width = 2 if start[6] == 1 else 4
    return start + (len(text) % 65536).to_bytes(width, "little") + text + body


def npz(data: bytes, rng: Random) -> bytes:
    """The members of a .zip, whose checksums are those of what they hold."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(info.filename, old.read(info)) for info in old.infolist()]
    except (zipfile.BadZipFile, zlib.error):
        return any_bytes(data, rng)
    place = rng.randrange(len(members))
    name, part = members[place]
    change, how = rng.randrange(6), zipfile.ZIP_STORED
    if change < 3:
        members[place] = name, npy(part, rng)
    elif change == 3:
        new = rng.choice((" ", "../x.npy", "/x.npy", "y.npy", "x", "x" * 300, members[0][0]))
        members[place] = new, part
    elif change == 4:
        members = rng.choice(([], members[1:], [*members, ("z.npy", b"")]))
    else:
        how = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", how) as archive:
        for name, part in dict(members).items():
            archive.writestr(name, part)
    return held.getvalue() if rng.random() < 0.8 else any_bytes(held.getvalue(), rng)


# --- protobuf -------------------------------------------------------------------------------------


def onnx_model(data: bytes, rng: Random) -> bytes:
    """One to three fields of an ONNX model, whatever their depth."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return any_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages = list(_messages(model))
        owner = rng.choice(messages)
        fields = [field for field, _ in owner.ListFields()]
        if fields and rng.random() < 0.9:
            _field(owner, rng.choice(fields), messages, rng)
        else:  # one that was not set
            _set(owner, rng.choice(owner.DESCRIPTOR.fields), messages, rng)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                yield from _messages(each)


def _field(owner: Any, field: Any, messages: list[Any], rng: Random) -> None:
    change = rng.randrange(4)
    values = getattr(owner, field.name)
    if not field.is_repeated or change == 0:
        _set(owner, field, messages, rng)
    elif change == 1:
        del values[rng.randrange(len(values))]
    elif change == 2:
        values.extend([values[rng.randrange(len(values))]])
    else:  # in another order
        kept = list(values)
        rng.shuffle(kept)
        if field.message_type is not None:
            kept = [type(x).FromString(x.SerializeToString()) for x in kept]
        del values[:]
        values.extend(kept)


def _set(owner: Any, field: Any, messages: list[Any], rng: Random) -> None:
    name = field.name
    if field.message_type is not None:
        alike = [x for x in messages if x.DESCRIPTOR is field.message_type]
        # as large a message within itself would double the model with every change
        other = rng.choice(alike) if alike and rng.random() < 0.7 else None
        if other is None or other.ByteSize() > 5000:
            owner.ClearField(name)
        elif field.is_repeated:
            getattr(owner, name).extend([type(other).FromString(other.SerializeToString())])
        else:
            getattr(owner, name).CopyFrom(type(other).FromString(other.SerializeToString()))
        return
    value = _scalar(owner, field, messages, rng)
    try:
        if not field.is_repeated:
            setattr(owner, name, value)
        elif len(values := getattr(owner, name)):
            values[rng.randrange(len(values))] = value
        else:
            values.append(value)
    except (ValueError, TypeError):  # beyond its type, or no member of an enumeration
        owner.ClearField(name)


def _scalar(owner: Any, field: Any, messages: list[Any], rng: Random) -> Any:
    if field.type == field.TYPE_BYTES:
        old = getattr(owner, field.name)
        held = rng.choice(old) if field.is_repeated and len(old) else old
        return any_bytes(held if isinstance(held, bytes) else b"", rng)
    if field.type == field.TYPE_STRING:
        known = [x.name for x in messages if "name" in x.DESCRIPTOR.fields_by_name]
        names = [name for name in NAMES if name.isprintable()]
        return rng.choice((rng.choice(known or ["x"]), rng.choice(names), "x", "y"))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30))
    if rng.random() < 0.5:
        return rng.randrange(30)
    return rng.choice(INTEGERS)


# --- images ---------------------------------------------------------------------------------------


def png(data: bytes, rng: Random) -> bytes:
    """A chunk of a PNG, with the checksum of what it then holds."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if data[:4] != b"\x89PNG" or not chunks or rng.random() < 0.2:
        return any_bytes(data, rng)
    place, change = rng.randrange(len(chunks)), rng.randrange(4)
    kind, held = chunks[place]
    if change == 0:
        chunks[place] = kind, any_bytes(held, rng)
    elif change == 1:
        sides = [rng.choice((0, 1, 3, 2000, 2**16, 2**31 - 1)) for _ in range(2)]
        chunks[0] = b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:]
    elif change == 2:
        chunks.insert(place, (rng.choice((b"tRNS", b"PLTE", b"iCCP", b"acTL", b"zTXt")), held))
    else:
        chunks[place] = rng.choice((b"IEND", b"IDAT", b"ABCD")), held
    return data[:8] + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))
        for kind, held in chunks
    )


KNOWN: dict[str, Mutate] = {
    ".json": json_text, ".safetensors": safetensors, ".npy": npy, ".npz": npz,
    ".onnx": onnx_model, ".png": png,
}  # fmt: skip


def mutated(files: dict[str, bytes], rng: Random) -> dict[str, bytes | None]:
    """Another content of one of the files, rarely of two; None: it is gone."""
    changed: dict[str, bytes | None] = {}
    for _ in range(rng.choice((1,) * 19 + (2,))):
        name = rng.choice([*files])
        suffix = name[name.rindex(".") :]
        if rng.random() < 0.01:
            changed[name] = None
        elif suffix in KNOWN and rng.random() < 0.6:
            changed[name] = KNOWN[suffix](files[name], rng)
        elif rng.random() < 0.02:
            changed[name] = files[rng.choice([*files])]
        else:
            changed[name] = any_bytes(files[name], rng)
    return changed
