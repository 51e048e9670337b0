"""The comparison with other implementations: fair ground, and nothing timed that is wrong."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import ORDERS, Problem
from sapq_triton import QuantSpec, solve
from sapq_triton.spec import Order

ABSENT = [package for package in peers.PEERS if find_spec(package) is None]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("compressed_tensors", *peers.PEERS):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BUDGET", 0.0)


@pytest.mark.parametrize("group_size", [-1, 48])
@pytest.mark.parametrize("order", ORDERS)
def test_published_chooses_our_codes(order: Order, group_size: int) -> None:
    x = torch.randn(2000, 144, dtype=torch.float64) * torch.rand(144).add(0.5)
    weight, hessian = torch.randn(40, 144), x.T @ x / 1000
    spec = QuantSpec(peers.BITS, group_size)
    result = solve(weight, hessian, spec, order=order, damp=peers.DAMP)
    grid = (result.scale.double(), result.zero_point.double())
    assert torch.equal(
        peers.published(Problem(weight.double(), hessian, *grid, spec), order), result.codes
    )


@pytest.mark.parametrize("group_size", [-1, 64])
def test_published_is_as_good_as_ours_on_a_hard_problem(
    group_size: int, device: torch.device
) -> None:
    made = Problem.of(64, 320, group_size, device)
    quality = peers.check(made, {"ours": peers.ours, "published": peers.published})
    assert set(quality) == {(name, order) for name in ("ours", "published") for order in ORDERS} | {
        ("ours", "sensitivity")
    }
    errors = [quality["ours", order].error for order in ("natural", "activation", "sensitivity")]
    assert errors == sorted(errors, reverse=True)
    for order in ORDERS:
        assert quality["published", order].agreement > 0.98


def test_what_is_missing_is_named(no_peers: None, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "peers.json"
    options = ["--quick", "--commit", "0123abc", "--json", str(target), "--group-size", "-1"]
    assert peers.main(options) == 0
    report = json.loads(target.read_text())
    assert report["environment"]["commit"] == "0123abc"
    assert list(report["environment"]["packages"]) == list(peers.PEERS)
    printed = capsys.readouterr().out
    for package, state in report["environment"]["packages"].items():
        assert state.startswith("left out: ") and f"{package} {state}" in printed
    assert [(row["solver"], row["order"]) for row in report["rows"]] == [
        ("ours", "natural"), ("ours", "activation"), ("ours", "sensitivity"),
        ("published", "natural"), ("published", "activation"),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["error"] > 0
        assert set(row["ratios"]) == {"natural", "activation", "sensitivity"}
        assert row["solver"] != "ours" or row["ratios"][row["order"]] == 1


def first_column_flipped(codes: Tensor) -> Tensor:
    codes[:, 0] ^= 1
    return codes


FAULTS: list[Any] = [  # solver, what becomes of it, what is said
    pytest.param(
        "published",
        lambda call, made, order: first_column_flipped(call(made, order)),
        "published in order natural has a layer error",
        id="codes",
    ),
    pytest.param(
        "published",
        lambda call, made, order: call(made, "natural"),
        "published in order activation has a layer error",
        id="order",
    ),
    pytest.param(
        "published",
        lambda call, made, order: made.weight,
        "not close",
        id="off-the-grid",
    ),
    pytest.param(
        "published",
        lambda call, made, order: (20 - made.zero_point) * made.scale.expand_as(made.weight),
        "beyond the range",
        id="range",
    ),
    pytest.param(
        "ours",
        lambda call, made, order: first_column_flipped(call(made, order)),
        "published in order natural has a layer error",
        id="ours",
    ),
]


@pytest.mark.parametrize("name, fault, message", FAULTS)
def test_wrong_results_are_not_timed(
    no_peers: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Callable[..., Tensor],
    message: str,
) -> None:
    call = getattr(peers, name)
    monkeypatch.setattr(peers, name, lambda made, order: fault(call, made, order))
    monkeypatch.setattr(peers, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=message):
        peers.main(["--quick", "--device", "cpu", "--commit", "0123abc"])


def test_order_sensitivity_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Problem.of(*peers.QUICK_SHAPES[0], -1, torch.device("cpu"))
    textbook = peers.textbook
    monkeypatch.setattr(peers, "textbook", lambda *of: first_column_flipped(textbook(*of)))
    with pytest.raises(AssertionError, match="order sensitivity has"):
        peers.check_sensitivity(made)


@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
@pytest.mark.filterwarnings("default")  # of the peers
def test_peers_are_as_good_as_ours(device: torch.device, tmp_path: Path) -> None:
    target = tmp_path / "peers.json"
    assert peers.main(["--quick", "--json", str(target), "--device", device.type]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert {"llm-compressor", "GPTQModel"} < {row["solver"] for row in rows}
    assert {row["group_size"] for row in rows} == {-1, 128}
    assert min(row["agreement"] for row in rows) > 0.98
