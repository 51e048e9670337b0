"""The tuner on a CPU, kernels in Triton's interpreter: what it checks, chooses and writes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from sapq_triton import ops
from sapq_triton.kernels import launch

FAST, SLOW = (
    {"BLOCK_F": 16, "BLOCK_T": 16, "num_warps": 4},
    {"BLOCK_F": 32, "BLOCK_T": 16, "num_warps": 4},
)
FAMILY = "sm_99"

Calls = Mapping[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(tune.JOBS["downdate"], candidates=[SLOW, FAST])
    monkeypatch.setitem(tune.JOBS, "downdate", job)


def fastest(entry: launch.Entry, seconds: float = 0.5) -> Callable[..., dict[str, float]]:
    """Times under which this entry takes so many seconds and every other one."""

    def times(calls: Calls, device: torch.device) -> dict[str, float]:
        for call in calls.values():
            call()
        return {key: seconds if key == tune.written(entry) else 1.0 for key in calls}

    return times


def tuned(
    device: torch.device, times: Callable[..., dict[str, float]], *names: str
) -> launch.Table:
    return tune.tuned(
        launch.table(), FAMILY, device, names=names or ["downdate"], sizes=tune.TINY, times=times
    )


def test_the_best_is_written_and_read_back(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = launch.PATH.read_text()
    file = tmp_path / "launch.json"
    file.write_text(tune.text(tuned(device, fastest(FAST))))
    monkeypatch.setattr(launch, "PATH", file)
    monkeypatch.setattr(launch, "table", launch.table.__wrapped__)  # past its cache
    monkeypatch.setattr(launch, "family", lambda _: FAMILY)
    assert launch.parameters("downdate", device) == FAST
    assert launch.parameters("compensate", device) == launch.table()["default"]["compensate"]
    # one family more, and not another byte
    own = f',\n "{FAMILY}": {{\n  "downdate": {json.dumps(FAST)}\n }}\n}}\n'
    assert file.read_text() == before.removesuffix("\n}\n") + own


def test_a_family_keeps_its_other_entries_in_order(device: torch.device) -> None:
    table = launch.table() | {FAMILY: {"solve_rows": {"BLOCK_F": 1}, "compensate": {"BLOCK_F": 2}}}
    chosen = tune.tuned(
        table, FAMILY, device, names=["downdate"], sizes=tune.TINY, times=fastest(FAST)
    )
    assert list(chosen[FAMILY]) == ["compensate", "downdate", "solve_rows"]
    assert chosen[FAMILY]["downdate"] == FAST
    assert chosen | {FAMILY: table[FAMILY]} == table
    assert "downdate" not in table[FAMILY]


def test_little_gain_changes_nothing(device: torch.device) -> None:
    present = launch.parameters("downdate", device)
    assert tuned(device, fastest(FAST, 0.99))[FAMILY]["downdate"] == present
    assert tuned(device, fastest(FAST, 0.97))[FAMILY]["downdate"] == FAST


def test_each_call_launches_its_candidate(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = ops._downdate.downdate, []

    def downdate(*arguments: object) -> None:
        seen.append(tune.written(launch.parameters("downdate", device)))
        right(*arguments)

    def times(calls: Calls, device: torch.device) -> dict[str, float]:
        for key, call in calls.items():
            seen.clear()
            call()
            assert seen == [key]
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(ops._downdate, "downdate", downdate)
    tuned(device, times)
    assert seen


FAULTS = {
    "wrong": lambda right, a, *rest: (right(a, *rest), a.diagonal(dim1=1, dim2=2).add_(1e-3)),
    "does-not-run": lambda *_: torch.empty(-1),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_fails_its_check_is_never_timed(
    fault: Callable[..., object],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = ops._downdate.downdate

    def downdate(*arguments: object) -> None:
        if launch.parameters("downdate", device) == FAST:
            fault(right, *arguments)
        else:
            right(*arguments)

    monkeypatch.setattr(ops._downdate, "downdate", downdate)
    timed: set[str] = set()

    def times(calls: Calls, device: torch.device) -> dict[str, float]:
        timed.update(calls)
        return fastest(FAST)(calls, device)

    present = launch.parameters("downdate", device)
    assert tuned(device, times)[FAMILY]["downdate"] == present
    assert timed == {tune.written(SLOW), tune.written(present)}
    assert f"{tune.written(FAST)} left out, " in capsys.readouterr().out


def test_a_wrong_present_entry_is_an_error(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops._downdate, "downdate", lambda a, *_: a.zero_())
    with pytest.raises(ValueError, match=r"downdate: .* must pass its check, got AssertionError"):
        tuned(device, fastest(FAST))


def test_every_case_counts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as fast in one case, three times as slow in the other."""
    sizes = replace(tune.TINY, solves=((8, 40), (8, 56)))
    ratios = iter([0.5, 3.0])

    def times(calls: Calls, device: torch.device) -> dict[str, float]:
        return fastest(FAST, next(ratios))(calls, device)

    chosen = tune.tuned({"default": launch.table()["default"]}, FAMILY, device,
                        names=["downdate"], sizes=sizes, times=times)  # fmt: skip
    assert chosen[FAMILY]["downdate"] == launch.parameters("downdate", device)


@pytest.mark.slow
@pytest.mark.parametrize("name", tune.JOBS)
def test_every_candidate_is_right(name: str, device: torch.device) -> None:
    job = tune.JOBS[name]
    if name.endswith("16-bit"):  # the interpreter multiplies the bit patterns of bfloat16
        job = replace(job, cases=partial(tune.accumulate_hessian, torch.float16))
    with tune.products(job.precision):
        cases = list(job.cases(tune.TINY, device))
        assert [x for x in job.candidates if tune.failure(name, x, cases)] == []


def test_candidates_fit_their_kernels() -> None:
    for name, job in tune.JOBS.items():
        known = launch.table()["default"][name].keys() | {"num_stages"}
        assert all(entry.keys() <= known for entry in job.candidates), name
        assert len({tune.written(entry) for entry in job.candidates}) == len(job.candidates) <= 24
    for entry in tune.COLUMNS:
        assert entry["TILE"] % entry["BLOCK_J"] == 0 and entry["BLOCK_R"] >= 16


def test_real_times(device: torch.device) -> None:
    assert tuned(device, tune.IN_TURNS)[FAMILY]["downdate"]["num_warps"] == 4


def test_ieee_entries_multiply_so(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = ops._downdate.downdate, set()

    def downdate(inverse: torch.Tensor, rows: torch.Tensor, precision: str) -> None:
        seen.add(precision)
        right(inverse, rows, precision)

    monkeypatch.setattr(ops._downdate, "downdate", downdate)
    monkeypatch.setitem(tune.JOBS, "downdate", replace(tune.JOBS["downdate"], precision="ieee"))
    tuned(device, fastest(FAST))
    assert seen == {"ieee"}
    with tune.products("ieee"):
        assert ops.dot_precision("tf32x3") == "ieee"
        assert not tune.used("solve_columns") and tune.used("downdate")
    with tune.products(None):
        assert tune.used("solve_columns") is (torch.version.hip is None)


def test_the_default_is_no_device(device: torch.device) -> None:
    with pytest.raises(ValueError, match="family must be that of a GPU"):
        tune.tuned(launch.table(), "default", device)


@pytest.mark.parametrize("gpu, message", [(False, "no GPU here"), (True, "TRITON_INTERPRET")])
def test_without_a_gpu_it_says_so(
    gpu: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main(["--out", str(tmp_path / "launch.json")]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_command_line(
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def tuned(
        table: launch.Table, family: str, device: torch.device, **options: object
    ) -> launch.Table:
        asked.append((family, device.type, options))
        return table

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(launch, "family", lambda _: FAMILY)
    monkeypatch.setattr(tune, "tuned", tuned)
    file = tmp_path / "launch.json"
    assert tune.main(["--out", str(file), "--kernels", "downdate", "--dry-run"]) == 0
    assert capsys.readouterr().out == launch.PATH.read_text() and not file.exists()
    assert tune.main(["--out", str(file)]) == 0
    assert file.read_text() == launch.PATH.read_text()
    assert asked == [
        (FAMILY, "cuda", {"names": ["downdate"]}),
        (FAMILY, "cuda", {"names": list(tune.JOBS)}),
    ]
