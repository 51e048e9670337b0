"""Batches that run anew for every layer: the bits of lockstep, the memory of one batch."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import QuantSpec, Report, quantize
from tests.test_quantize import ConvNet, Encoder, Routed, images, padded, sentences
from tests.test_targets import Parting, features
from tests.tiny import Gated, mixture

SPEC = QuantSpec(bits=3)


def both(model: nn.Module, batches: list[Any], **options: Any) -> tuple[Report, Report]:
    """Reports of lockstep and of replay, after all that they leave is found to be equal."""
    other = copy.deepcopy(model)
    expected = quantize(model, batches, SPEC, progress=False, **options)
    report = quantize(other, batches, SPEC, progress=False, replay=True, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    for layer in report.layers:
        same = expected[layer.name]
        assert torch.equal(layer.codes, same.codes), layer.name
        assert (layer.notes, layer.rows, layer.error) == (same.notes, same.rows, same.error)
    assert report.corrected == expected.corrected
    return expected, report


def parting(sizes: list[int], missing: bool) -> tuple[nn.Module, list[Any]]:
    return Parting(sizes, missing), features(11, 9, 3)


def routed() -> tuple[nn.Module, list[Any]]:
    return Routed(), [(torch.randn(9, 6), 0), (torch.randn(8, 6), 1), (torch.randn(7, 6), 0)]


class PartingExpert(Gated):
    """Two layers have one input, until the layer before the block is quantized."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first, self.was = [first], first.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        same = torch.equal(self.first[0].weight, self.was)
        result: Tensor = self.down(self.gate(x) * self.up(x if same else x.neg()))
        return result


def parting_experts() -> tuple[nn.Module, list[Any]]:
    model, batches = mixture()
    first, block = model[0], model[1]
    assert isinstance(first, nn.Linear)
    block.experts = nn.ModuleList(PartingExpert(first) for _ in range(6))
    return model, batches


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "convolutions": lambda: (ConvNet(bias=True), list(images(dtype=torch.float32).split(5))),
    "encoder": lambda: (Encoder(), [padded(sentences(x)) for x in ([5, 9], [3, 7], [6], [8])]),
    "ways": routed,
    "parting-first": lambda: parting([11], False),
    "parting-last": lambda: parting([3], False),
    "experts": mixture,
    "parting-experts": parting_experts,
    "missing": lambda: parting([11, 9, 3], True),
}


@pytest.mark.parametrize("preset", ["best", "fast"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_lockstep(name: str, preset: str) -> None:
    model, batches = MODELS[name]()
    both(model, batches, preset=preset)


def test_activations_of_one_batch_are_alive() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    seen: dict[int, list[weakref.ref[Tensor]]] = {}
    most = 0

    def forward(module: nn.Module, batch: tuple[int, Tensor]) -> None:
        nonlocal most
        number, x = batch
        for child in module.children():
            x = child(x)
            seen.setdefault(number, []).append(weakref.ref(x))
        gc.collect()
        alive = {n for n, refs in seen.items() if any(ref() is not None for ref in refs)}
        most = max(most, len(alive))

    batches = list(enumerate(torch.randn(5, 7, 6)))
    quantize(model, batches, SPEC, forward=forward, replay=True, preset="fast", progress=False)
    assert most == 1
