"""Budgets over layers: bits, bytes, tables; what comes out fits `quantize`."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sapq_triton import ErrorCurves, LayerCurve, QuantSpec, allocate, error_curves, quantize

WIDTHS = (2, 3, 4, 8)


def curve(shape: tuple[int, int, int], errors: tuple[float, ...], **grid: Any) -> LayerCurve:
    specs = tuple(QuantSpec(bits, **grid) for bits in WIDTHS)
    return LayerCurve(shape, specs, {"mine": errors, "flat": (1.0,) * 4})


CURVES = ErrorCurves(
    {
        "small": curve((1, 4, 6), (9.0, 3.0, 1.0, 0.1)),
        "wide": curve((1, 10, 20), (4.0, 2.0, 0.9, 0.01), group_size=5, symmetric=True),
        "grouped": curve((8, 1, 9), (2.0, 2.5, 0.2, 0.0)),  # three bits err more than two
    },
    scores=("mine", "flat"),
)
NAMES = list(CURVES.layers)


def each(table: dict[int, float]) -> dict[str, dict[int, float]]:
    """The same costs for all layers."""
    return {name: table for name in NAMES}


def best(costs: dict[str, dict[int, float]], budget: float) -> tuple[float, float]:
    """Least error, and the least cost of those, over all combinations of widths."""
    found = []
    for widths in itertools.product(*(costs[name] for name in NAMES)):
        error = sum(
            CURVES.layers[name].errors["mine"][WIDTHS.index(width)]
            for name, width in zip(NAMES, widths, strict=True)
        )
        cost = sum(costs[name][width] for name, width in zip(NAMES, widths, strict=True))
        if cost <= budget:
            found.append((error, cost))
    return min(found)


def per_width(unit: str) -> dict[str, dict[int, float]]:
    return {
        name: {
            spec.bits: layer.bytes(spec) if unit == "bytes" else spec.bits * layer.weights
            for spec in layer.specs
        }
        for name, layer in CURVES.layers.items()
    }


@pytest.mark.parametrize("mean", [2, 2.3, 3.99, 4.0, 5.5, 8])
def test_mean_bits_against_all_combinations(mean: float) -> None:
    found = allocate(CURVES, mean_bits=mean)
    weights = sum(layer.weights for layer in CURVES.layers.values())
    assert (found.error, found.cost) == best(per_width("bits"), mean * weights)
    assert found.cost <= found.budget
    assert found.mean_bits == found.cost / weights <= mean
    assert list(found.specs) == NAMES
    for name, spec in found.specs.items():
        assert spec in CURVES.layers[name].specs


@pytest.mark.parametrize("budget", [194, 250.5, 300, 1e6])
def test_bytes_against_all_combinations(budget: float) -> None:
    found = allocate(CURVES, bytes=budget)
    assert (found.error, found.cost) == best(per_width("bytes"), budget)
    assert found.bytes == found.cost <= budget


def test_table_against_all_combinations() -> None:
    table = {"small": {2: 0.1, 4: 0.25}, "wide": {8: 1.5, 4: 1.25, 2: 1.0}, "grouped": {3: 0.0}}
    for budget in (1.1, 1.3, 1.4, 1.55, 1.75, 9):
        found = allocate(CURVES, cost=table, budget=budget)
        assert (found.error, found.cost) == best(table, budget)
        assert found.specs["grouped"].bits == 3
        assert found.cost <= found.budget == budget


def test_numbers_of_numpy_are_numbers() -> None:
    table = {2: 0.25, 4: 0.5, 8: 1.0}
    measured = {width: np.float32(value) for width, value in table.items()}
    exact = allocate(CURVES, cost=each(table), budget=2)
    assert allocate(CURVES, cost=each(measured), budget=np.int64(2)) == exact
    assert allocate(CURVES, mean_bits=np.int64(4)).specs == allocate(CURVES, mean_bits=4).specs
    assert allocate(CURVES, mean_bits=np.float32(3.3)) == allocate(CURVES, mean_bits=3.3)
    assert allocate(CURVES, bytes=np.float32(300)) == allocate(CURVES, bytes=300)


def test_equal_errors_take_the_cheapest() -> None:
    found = allocate(CURVES, mean_bits=8, score="flat")
    assert {spec.bits for spec in found.specs.values()} == {2}
    assert found.error == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_bits": 1.9}, r"mean_bits 1\.9 is too small: 2 is the least possible"),
        ({"bytes": 10}, r"bytes 10 is too small: 181 is the least possible"),
        (
            {"cost": each({2: 0.5}), "budget": 1},
            r"budget 1 is too small: 1\.5 is the least possible",
        ),
        ({}, "one of mean_bits, bytes and cost must be given, got none"),
        ({"mean_bits": 4, "bytes": 9}, "one of mean_bits, bytes and cost must be given"),
        ({"mean_bits": 4, "budget": 9}, "cost and budget must be given together"),
        ({"cost": each({2: 0.5})}, "cost and budget must be given together"),
        ({"mean_bits": "4"}, "mean_bits must be a positive number, got '4'"),
        ({"bytes": math.nan}, "bytes must be a finite number, not negative, got nan"),
        ({"cost": {"small": {2: 1}}, "budget": 9}, r"odd ones are \['grouped', 'wide'\]"),
        (
            {"cost": each({16: 1}), "budget": 9},
            r"some of the widths \[2, 3, 4, 8\]",
        ),
        ({"cost": each({}), "budget": 9}, r"some of the widths \[2, 3, 4, 8\]"),
        (
            {"cost": each({2: -1.0}), "budget": 9},
            r"cost\['small'\]\[2\] must be a finite number, not negative, got -1\.0",
        ),
        ({"mean_bits": 4, "score": "other"}, r"score must be one of \('mine', 'flat'\)"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(CURVES, **arguments)


def test_bad_curves() -> None:
    with pytest.raises(ValueError, match="hold no layer"):
        allocate(ErrorCurves({}, ("mine",)), mean_bits=4)
    broken = {"one": curve((1, 2, 2), (1.0, math.inf, 0.0, 0.0))}
    with pytest.raises(ValueError, match=r"errors of 'one' must be finite, got \[1\.0, inf"):
        allocate(ErrorCurves(broken, ("mine",)), mean_bits=4)


def test_overrides_match_their_layers_alone() -> None:
    """Names may hold what a pattern gives a meaning; bytes and bits are those of the report."""
    model = nn.Sequential()
    for name in ("a[0]", "a0", "b*", "bb", "c?", "cc", "d[!e]", "df"):
        model.add_module(name, nn.Linear(6, 6))
    batches = [torch.randn(9, 6) for _ in range(4)]
    spec = QuantSpec(4, group_size=3)
    curves = error_curves(model, batches, spec, score="relative")
    wanted = {name: 2 + place % 5 for place, name in enumerate(curves.layers)}  # 2 to 6 bits
    costs = {name: {bits: 1.0} for name, bits in wanted.items()}
    found = allocate(curves, cost=costs, budget=99)
    report = quantize(model, batches, spec, overrides=found.overrides, progress=False)
    assert {layer.name: layer.spec.bits for layer in report.layers} == wanted
    assert {layer.name: layer.spec for layer in report.layers} == found.specs
    assert sum(layer.bytes for layer in report.layers) == found.bytes
    weights = sum(layer.codes.numel() for layer in report.layers)
    bits = sum(layer.codes.numel() * layer.spec.bits for layer in report.layers)
    assert bits / weights == found.mean_bits
    assert str(found).startswith("a[0]  2 bits\na0    3 bits\n")


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_the_report(symmetric: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 8))
    batches = [torch.randn(3, 4, 6, 6) for _ in range(2)]
    spec = QuantSpec(3, group_size=32, symmetric=symmetric)
    curves = error_curves(model, batches, spec, bits=[3], score="relative")
    found = allocate(curves, bytes=1e9)
    report = quantize(model, batches, spec, progress=False)
    assert found.bytes == sum(layer.bytes for layer in report.layers)
    assert found.specs["0"] == replace(spec, group_size=-1)  # 32 does not divide 18 columns
    assert curves.layers["0"].notes == report["0"].notes
