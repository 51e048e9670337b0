"""NaN and Inf are found where they come in, and named, before they spread."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_finite(tensor: Tensor, what: str, hint: str = "") -> None:
    """ValueError that names what holds NaN or Inf; hint: what to do about it."""
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or Inf{hint}")


def check_parts(module: Any, name: str, parts: Iterable[str], hint: str = "") -> None:
    """`check_finite` of parameters and buffers of a module; those that are None have none."""
    for part in parts:
        tensor = getattr(module, part, None)
        if isinstance(tensor, Tensor):
            check_finite(tensor, f"the {part} of {name!r}", hint)
