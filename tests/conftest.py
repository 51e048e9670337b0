"""Tests run on a GPU where there is one, and in Triton's CPU interpreter where there is none."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: set before any import


torch.set_num_threads(1)  # the problems are small, and threads that wait for each other cost more
with torch.device("meta"):
    torch.empty(0)  # on first use PyTorch notes which functions allocate: not those of a test below

# what a bare GPU machine may lack, and the tests that are about nothing else
EXTRAS = {
    "hypothesis": ["test_properties.py"],
    "onnx": ["test_fuzz.py", "test_onnx*.py", "test_soak.py"],
    "safetensors": ["test_compressed_tensors.py", "test_formats*.py", "peers/test_gptqmodel.py"],
    "transformers": [
        "test_cli.py",
        "test_fuzz.py",
        "test_job.py",
        "test_soak.py",
        "test_stream.py",
    ],
}
MISSING = [package for package in EXTRAS if find_spec(package) is None]
collect_ignore_glob = [name for package in MISSING for name in EXTRAS[package]]


def pytest_report_header() -> list[str]:
    return [f"left out without {package}: {', '.join(EXTRAS[package])}" for package in MISSING]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh buffer holds NaN or the largest integer: every element must be written."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
