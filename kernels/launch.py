"""Launch parameters of the kernels: a table per device family, never a clock.

launch.json: family -> kernel -> block sizes, num_warps, num_stages. What a family leaves out, it
takes from "default". `python -m benchmarks.tune` measures candidates on the GPU at hand and writes
its family. Nothing is chosen at run time, so the same inputs give the same sums on a device.
"""

import json
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_suffix(".json")
DEFAULT = "default"

Table = dict[str, dict[str, dict[str, int]]]


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


def parameters(kernel: str, device: torch.device, variant: str = "") -> dict[str, int]:
    """Block sizes and options of a launch, as keywords; "kernel variant" where the table has it."""
    for name in (f"{kernel} {variant}", kernel):
        for entries in (table().get(family(device), {}), table()[DEFAULT]):
            if name in entries:
                return entries[name]
    raise ValueError(f"{PATH.name} has no entry for {kernel!r}, not even under {DEFAULT!r}")
