"""Dataclasses as what JSON can hold, and back, every value checked against its annotation."""

import math
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SPECIAL = {
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}  # JSON has no such numbers
LEFT_OUT = {"plain": False}  # metadata of a field that stays behind, and comes back as None


def encode(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists, NaN and infinities as strings, scalars of
    NumPy as the numbers that they are.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if is_dataclass(value):
        return {
            field.name: encode(getattr(value, field.name))
            for field in fields(value)
            if field.metadata.get("plain", True)
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(kind: Any, value: object, where: str) -> Any:
    """What `encode` was given, of type `kind`. ValueError that says what is wrong, and where."""
    origin, inside = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if origin in (Union, UnionType):
        for option in inside:
            try:
                return decode(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in inside:
            return value
    elif origin is tuple and isinstance(value, list):
        kinds = [inside[0]] * len(value) if inside[-1] is Ellipsis else inside
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(decode(k, item, f"{where}[{i}]") for i, (k, item) in pairs)
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: decode(inside[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    elif kind is float and isinstance(value, str) and value in SPECIAL:
        return SPECIAL[value]
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is int and type(value) is int:
        if -(2**63) <= value < 2**63:  # beyond it, a quotient may be beyond a float
            return value
    elif kind is object or (kind in (str, bool, NoneType) and type(value) is kind):
        return value
    raise ValueError(f"{where} must be {_named(kind)}, got {_short(value)}")


def _decode_fields(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    stored = {field.name: field.metadata.get("plain", True) for field in fields(kind)}
    wanted = {name for name, there in stored.items() if there}
    if missing := sorted(wanted - value.keys()):
        raise ValueError(f"{prefix}{missing[0]} is missing")
    if unknown := sorted(value.keys() - wanted):
        raise ValueError(f"{prefix}{unknown[0]} is not known here")
    found = {
        name: decode(hints[name], value[name], f"{prefix}{name}") if there else None
        for name, there in stored.items()
    }
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _named(kind: Any) -> str:
    """For messages."""
    plain = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {inside}"
    if origin is tuple:
        exact = "" if inside[-1] is Ellipsis else f" of {len(inside)}"
        return f"a list{exact}"
    if origin in (Union, UnionType):
        return " or ".join(map(_named, inside))
    return "null" if kind is NoneType else "an object"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
