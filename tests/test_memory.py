"""What a solve holds at once, and what it does where memory runs out: for real, in a process that
may take no more."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_memory
from benchmarks.shapes import problem
from sapq_triton import QuantSpec, SolveResult, solve
from sapq_triton.hessian import PANEL, HessianSum
from sapq_triton.memory import LEAST, Rows, ran_out
from sapq_triton.solver import _solve_on_cpu
from sapq_triton.spec import Order

C, R = 1024, 8  # matrices of C x C, and next to nothing else
SQUARE, PANELS, WEIGHT = 4 * C * C, 4 * PANEL * C, 4 * R * C


# --- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order, options, squares",
    [
        ("natural", {}, 1),
        ("activation", {}, 1),
        ("min-pivot", {}, 1),
        ("sensitivity-static", {}, 1),
        ("sensitivity", {}, 1),
        ("sensitivity", {"candidates": 3}, 1),
        ("sensitivity", {"candidates": 3, "rounds": 1}, 2),
        ("activation", {"rounds": 1}, 2),
    ],
)
def test_copies_of_the_hessian(order: Order, options: dict[str, int], squares: int) -> None:
    """As the docstring of `solve` has it; on a GPU the inverse takes one more."""
    weight, hessian = problem(R, C)
    used = peak_memory(
        lambda: solve(weight, hessian, QuantSpec(4), order=order, **options), weight.device
    )
    assert used <= squares * SQUARE + 3 * PANELS + 8 * WEIGHT


def test_dead_columns_take_one_more() -> None:
    weight, hessian = problem(R, C)
    hessian[3], hessian[:, 3] = 0, 0
    used = peak_memory(
        lambda: solve(weight, hessian, QuantSpec(4), order="activation"), weight.device
    )
    assert used <= 2 * SQUARE + 3 * PANELS + 8 * WEIGHT


def test_sums_take_no_more_than_themselves() -> None:
    x = torch.randn(R, C)

    def taken(drift: bool, read: bool) -> int:
        def run() -> object:
            total = HessianSum(1, C, drift=drift)
            for _ in range(2):
                total.add(x)
                if drift:
                    total.add_drift(x, 1.1 * x)
            return total.hessian() if read else total.take()

        return peak_memory(run, x.device)

    small = 2 * PANELS + 8 * WEIGHT
    assert taken(False, read=False) <= SQUARE + small
    assert taken(True, read=False) <= 2 * SQUARE + small
    assert taken(False, read=True) <= 2 * SQUARE + small


@pytest.mark.parametrize("drift", [False, True])
def test_taken_sums_are_those_that_are_read(drift: bool) -> None:
    x = torch.randn(40, 3 * PANEL // 2)
    total = HessianSum(1, x.shape[1], drift=drift)
    total.add(x)
    if drift:
        total.add_drift(x, x.square())
    hessian, changes, mean = total.hessian(), total.drift(), total.mean()
    taken = total.take()
    assert torch.equal(taken[0], hessian) and torch.equal(hessian, hessian.mT)
    assert (taken[1] is None) if changes is None else torch.equal(taken[1], changes)
    assert torch.equal(total.mean(), mean)
    with pytest.raises(AttributeError):
        total.hessian()


# --- too little -----------------------------------------------------------------------------------


def test_ran_out_knows_real_errors() -> None:
    errors: list[BaseException] = []
    for ask in (lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**55, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        errors.append(caught.value)
    assert all(map(ran_out, errors))
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas`"))
    assert not ran_out(RuntimeError("out of resource: shared memory"))
    assert not ran_out(ValueError("out of memory"))


def test_parts_of_rows_are_halved_until_they_fit() -> None:
    rows, seen = Rows(), []

    def work(part: slice) -> tuple[Tensor, Tensor]:
        size = part.stop - part.start
        if size > 150:
            torch.empty(2**55, dtype=torch.uint8)
        seen.append(part)
        each = torch.arange(part.start, part.stop)
        return each[:, None].repeat(2, 1, 3), each.repeat(2, 3, 1).mT

    for total in (1000, 500):
        first, second = rows.map(total, work)
        assert torch.equal(first[1, :, 0], torch.arange(total)) and first.is_contiguous()
        assert torch.equal(second[1, :, 2], torch.arange(total)) and second.mT.is_contiguous()
    assert {part.stop - part.start for part in seen} == {128, 1000 % 128, 500 % 128}
    assert rows.failed == [1000, 512, 256]
    assert rows.notes == ("out of memory with 1000, 512, 256 rows at a time, not with 128",)
    assert Rows().notes == ()


def test_other_errors_and_the_least_part_are_not_tried_again() -> None:
    calls = []

    def fails(part: slice) -> tuple[Tensor]:
        calls.append(part.stop - part.start)
        raise error

    for error, expected in (
        (ValueError("out of memory"), [999]),
        (RuntimeError("no"), [999]),
        (MemoryError(), [999, 512, 256, 128, LEAST]),
    ):
        calls.clear()
        with pytest.raises(type(error)):
            Rows().map(999, fails)
        assert calls == expected


LOOP = {"order": "activation", "candidates": 2, "rounds": 1}
# rows, columns, what a solve may take in MiB, options. What the solver holds of all rows fits, what
# it makes of them on the way does not
CASES: dict[str, tuple[int, int, float, dict[str, Any]]] = {
    "activation": (8001, 96, 12, {**LOOP, "group_size": 32}),
    "static, 2:4": (4001, 96, 6, {"order": "sensitivity-static", "batch": 2, "sparsity": "2:4"}),
    "sensitivity": (
        8001,
        96,
        13,
        {"order": "sensitivity", "block": 16, "candidates": 2, "rounds": 1},
    ),
    "obq": (201, 96, 4, {"order": "obq"}),
    "too little": (4001, 96, 0.1, {"order": "activation"}),  # less than its codes
    "a share": (4001, 96, 2, {"order": "natural", "sparsity": 0.5}),
}

SCRIPT = """
import copy, json, os, resource, sys, torch
from sapq_triton import QuantSpec, quantize, solve

torch.set_num_threads(1)
_, unlimited = resource.getrlimit(resource.RLIMIT_AS)

def within(mib, call):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(mib * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))

def run(R, C, mib, options):
    torch.manual_seed(0)
    batch, group_size = options.pop("batch", 1), options.pop("group_size", -1)
    spec = QuantSpec(4, group_size, sparsity=options.pop("sparsity", None))
    x = torch.randn(batch, 3 * C, C) @ (torch.eye(C) + torch.randn(C, C) / C**0.5 / 2)
    weight, hessian = torch.randn(batch, R, C), x.mT @ x / len(x)
    # once with as much as it wants, which also loads whatever is loaded on first use
    whole = solve(weight, hessian, spec, **options)
    try:
        result = within(mib, lambda: solve(weight, hessian, spec, **options))
    except (RuntimeError, MemoryError) as error:
        return {"error": str(error)}
    pairs = [(getattr(result, k), getattr(whole, k)) for k in ("codes", "scale", "zero_point")]
    pairs.append((result.report.row_error, whole.report.row_error))
    return {"same": [torch.equal(*pair) for pair in pairs], "notes": result.report.notes,
            "before": whole.report.notes}

def run_model():
    torch.manual_seed(0)
    models, x = [torch.nn.Linear(96, 8001, bias=False)], torch.randn(200, 96)
    models.append(copy.deepcopy(models[0]))
    options = dict(order="activation", rounds=1, drift_correction=0.0, progress=False)
    whole, report = (
        within(mib, lambda: quantize(model, [x], QuantSpec(4), **options))
        for mib, model in zip((2**20, 20), models)
    )
    same = torch.equal(models[0].weight, models[1].weight)
    return {"same": same, "notes": report.layers[0].notes, "before": whole.layers[0].notes}

cases = json.loads(sys.argv[1])
results = {name: run(*case) for name, case in cases.items()}
print(json.dumps({**results, "model": run_model()}))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What solves do in a process whose address space is limited."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        capture_output=True, text=True,
        # memory that is freed goes back at once, and counts no more
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", ["activation", "static, 2:4", "sensitivity", "obq"])
def test_solve_in_less_memory_is_the_same(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
    assert outcome.get("same") == [True] * 4, outcome
    assert outcome["before"] == []
    (note,) = outcome["notes"]
    assert re.fullmatch(r"out of memory with \d+(, \d+)* rows at a time, not with \d+", note)


def test_layers_tell_what_was_done(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["model"]
    assert outcome["same"] and outcome["before"] == []
    assert outcome["notes"][0].startswith("out of memory with "), outcome


@pytest.mark.parametrize("name", ["too little", "a share"])
def test_a_cpu_without_memory_says_so(name: str, outcomes: dict[str, Any]) -> None:
    """A share of zeros is of all rows together: they have no parts."""
    assert "memory" in outcomes[name]["error"], outcomes[name]


def test_last_resort_is_the_cpu() -> None:
    """Without a device to run out of memory: what is then done, and how it is told."""
    weight, hessian = problem(70, 32)
    expected = solve(weight, hessian, QuantSpec(4), candidates=2, rounds=1, backend="reference")
    tried = Rows()
    tried.failed += [140, 128]
    options: dict[str, Any] = dict(
        order="sensitivity", block=128, starts=1, sweeps=2, candidates=2, rounds=1, damp=0.01,
        precision="tf32x3", measure=True, sparsity=None,
    )  # fmt: skip
    result = _solve_on_cpu(weight, hessian, None, None, QuantSpec(4), options, tried)
    assert torch.equal(result.codes, expected.codes) and torch.equal(result.scale, expected.scale)
    note = "out of memory on cpu, with 140, 128 rows at a time: solved on the CPU"
    assert result.report.notes == (note,)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["activation", "sensitivity"])
def test_device_without_memory(order: Order) -> None:
    weight, hessian = problem(512, 2048, device=torch.device("cuda"))
    options: dict[str, Any] = dict(order=order, candidates=4, rounds=1)
    whole = solve(weight, hessian, QuantSpec(4), **options)

    def within(squares: float) -> SolveResult:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = torch.cuda.memory_reserved() + squares * 4 * 2048**2
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            return solve(weight, hessian, QuantSpec(4), **options)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    result = within(1.2)  # the factorization alone takes more
    on_cpu = solve(weight.cpu(), hessian.cpu(), QuantSpec(4), **options)
    assert result.codes.device == result.report.row_error.device == weight.device
    assert torch.equal(result.codes.cpu(), on_cpu.codes)
    assert result.report.notes[-1].endswith("solved on the CPU")
    for squares in (4, 5, 6, 8):  # how much a part takes is up to the libraries
        result = within(squares)
        if not any("on the CPU" in note for note in result.report.notes):
            assert torch.equal(result.scale, whole.scale) and torch.equal(result.codes, whole.codes)
