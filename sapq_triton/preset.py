"""What `quantize` does when its options are left open."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .spec import Order, Starts

PresetName = Literal["best", "fast"]


@dataclass(frozen=True)
class Preset:
    """Options of `solve` and `quantize`; None is chosen for each layer on rows held out."""

    order: Order
    block: int
    starts: Starts
    sweeps: int
    candidates: int
    rounds: int
    damp: float | None
    drift_correction: float | None


PRESETS: dict[PresetName, Preset] = {
    "best": Preset(
        "sensitivity", block=128, starts=8, sweeps=2, candidates=8, rounds=3, damp=None,
        drift_correction=None,
    ),
    "fast": Preset(
        "activation", block=128, starts=1, sweeps=0, candidates=1, rounds=0, damp=0.01,
        drift_correction=0.0,
    ),
}  # fmt: skip


def choose(name: PresetName, **options: Any) -> dict[str, Any]:
    """The options of a preset, but for those that are not None here."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {get_args(PresetName)}, got {name!r}")
    given = {option: value for option, value in options.items() if value is not None}
    return asdict(PRESETS[name]) | given
