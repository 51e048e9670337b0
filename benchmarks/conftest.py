"""Benchmarks run on a GPU where there is one; without it, in small sizes on the reference path."""

from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.gpu), "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small sizes gain nothing from threads, and wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    if not HAS_GPU:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
