"""What `quantize` does when its options are left open."""

from dataclasses import dataclass
from typing import Literal, get_args

from .spec import Order

PresetName = Literal["best", "fast"]


@dataclass(frozen=True)
class Preset:
    """Options of `solve`, and `drift_correction` of `quantize`."""

    order: Order
    block: int
    sweeps: int
    candidates: int
    rounds: int
    drift_correction: float


PRESETS: dict[PresetName, Preset] = {
    "best": Preset("sensitivity", 128, 2, candidates=6, rounds=2, drift_correction=1.0),
    "fast": Preset("activation", 128, 0, candidates=1, rounds=0, drift_correction=0.0),
}


def preset(name: PresetName) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {get_args(PresetName)}, got {name!r}")
    return PRESETS[name]
