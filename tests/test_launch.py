"""The launch table: complete, nothing in it unused, each family over the default."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune
from sapq_triton.kernels import launch

ROOT = Path(__file__).parents[1]
FAMILIES = json.loads(launch.PATH.read_text())
DEFAULT = FAMILIES[launch.DEFAULT]
OPTIONS = {"num_warps", "num_stages"}
H100 = torch.device("cuda", 7)  # never touched: only its family is asked


class Watched(Mapping):
    """An entry that knows which of its keys were read."""

    def __init__(self, entry: launch.Entry) -> None:
        self.entry, self.read = entry, set()

    def __getitem__(self, key: str) -> int:
        self.read.add(key)
        return self.entry[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entry)

    def __len__(self) -> int:
        return len(self.entry)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "family", lambda device: "sm_90" if device == H100 else "default")


def run(name: str, device: torch.device) -> None:
    job = tune.JOBS[name]
    with tune.products(job.precision):
        for case in job.cases(tune.TINY, device):
            case.call("triton")


def test_every_kernel_has_an_entry_and_every_entry_a_kernel() -> None:
    kernels = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if f"def _{path.stem}_kernel(" in path.read_text()
    }
    assert len(kernels) >= 7
    assert {name.partition(" ")[0] for name in DEFAULT} == kernels
    assert DEFAULT.keys() == tune.JOBS.keys()


@pytest.mark.parametrize("name", DEFAULT)
def test_a_launcher_takes_all_of_its_entry(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this entry and no other: a key that nothing reads would be tuned in vain."""
    entries = {other: Watched(entry) for other, entry in DEFAULT.items()}
    monkeypatch.setattr(launch, "table", lambda: {launch.DEFAULT: entries})
    if not tune.used(name):
        pytest.skip("not launched on this device")
    run(name, device)
    assert {other for other, entry in entries.items() if entry.read} == {name}
    assert entries[name].read == DEFAULT[name].keys()


@pytest.mark.parametrize("name", [name for name in DEFAULT if " " not in name])
def test_a_kernel_without_an_entry_is_not_launched(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {other: e for other, e in DEFAULT.items() if other.partition(" ")[0] != name}
    monkeypatch.setattr(launch, "table", lambda: {launch.DEFAULT: left})
    with pytest.raises(ValueError, match=f"no entry for '{name}', not even under 'default'"):
        run(name, device)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_the_table(family: str) -> None:
    for name, entry in FAMILIES[family].items():
        assert name in DEFAULT
        assert all(type(value) is int and value > 0 for value in entry.values())
        assert entry.keys() | OPTIONS == DEFAULT[name].keys() | OPTIONS
        assert "num_warps" in entry
        powers = [value for key, value in entry.items() if key != "num_stages"]
        assert all(value & (value - 1) == 0 for value in powers), entry
        if name.startswith("solve_columns"):
            assert entry["TILE"] % entry["BLOCK_J"] == 0  # its loop has no mask


def test_the_table_is_written_as_tune_writes_it() -> None:
    assert tune.text(FAMILIES) == launch.PATH.read_text()


def test_a_family_comes_before_the_default(h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own, default, ieee = {"A": 1}, {"A": 2}, {"A": 3}
    table = {"default": {"k": default, "k ieee": ieee, "other": ieee}, "sm_90": {"k": own}}
    monkeypatch.setattr(launch, "table", lambda: table)
    cpu = torch.device("cpu")
    assert launch.parameters("k", H100) is own
    assert launch.parameters("k", cpu) is default
    assert launch.parameters("other", H100) is ieee
    # the exact name, even of the default, before the family's general one
    assert launch.parameters("k", H100, "ieee") is ieee
    assert launch.parameters("k", H100, "tf32x3") is own
    assert launch.parameters("k", cpu, "tf32x3") is default


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"launch.json has no entry for 'solve_all'"):
        launch.parameters("solve_all", torch.device("cpu"), "ieee")


def test_override_ends_with_its_block(h100: None) -> None:
    before, tried, inner = launch.parameters("downdate", H100), {"A": 1}, {"A": 2}
    with pytest.raises(RuntimeError), launch.override("downdate", tried):
        assert launch.parameters("downdate", H100) is tried
        assert launch.parameters("downdate", torch.device("cpu"), "x") is tried
        with launch.override("downdate", inner), launch.override("compensate", inner):
            assert launch.parameters("downdate", H100) is inner
        assert launch.parameters("downdate", H100) is tried
        assert launch.parameters("compensate", H100) is not inner
        raise RuntimeError
    assert launch.parameters("downdate", H100) is before


@pytest.mark.parametrize(
    "hip, expected",
    [pytest.param(None, "sm_90", id="cuda"), pytest.param("6.4", "gfx942", id="hip")],
)
def test_family_of_a_device(
    hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    family = launch.family.__wrapped__  # past its cache
    assert family(H100) == expected
    assert family(torch.device("cpu")) == "default"
