"""Launch parameters of the kernels: a table per device family, never a clock.

launch.json: family -> kernel -> block sizes, num_warps, num_stages. What a family leaves out, it
takes from "default". `python -m benchmarks.tune` measures candidates on the GPU at hand and writes
its family. Nothing is chosen at run time, so the same inputs give the same sums on a device.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_suffix(".json")
DEFAULT = "default"

Entry = dict[str, int]
Table = dict[str, dict[str, Entry]]

_tried: dict[str, Entry] = {}  # before every family


@cache
def table() -> Table:
    return json.loads(PATH.read_text())


@cache
def family(device: torch.device) -> str:
    """sm_90, gfx942, ...; "default" on a CPU"""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextmanager
def override(name: str, entry: Entry) -> Iterator[None]:
    """Within the block `name` ("kernel" or "kernel variant") is launched so, on every device."""
    before = dict(_tried)
    _tried[name] = entry
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def parameters(kernel: str, device: torch.device, variant: str = "") -> Entry:
    """Block sizes and options of a launch, as keywords; "kernel variant" where the table has it.

    ValueError for a kernel without an entry.
    """
    for name in (f"{kernel} {variant}", kernel):
        for entries in (_tried, table().get(family(device), {}), table()[DEFAULT]):
            if name in entries:
                return entries[name]
    raise ValueError(f"{PATH.name} has no entry for {kernel!r}, not even under {DEFAULT!r}")
