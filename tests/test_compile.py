"""Every kernel compiles for every target, within its budget of registers and instructions."""

import json
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from benchmarks import static

ROOT = Path(__file__).parents[1]
TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
# two runs at a time, about as long as each other
SHARES = (("sm_80", "gfx942"), ("sm_90", "sm_100"))
# SASS instructions of solve_columns on sm_90; with triton 3.7.1: 65, 55, 66 and 68
STEP = {"groups": 70, "one group": 60, "groups ieee": 70, "ragged": 75}

needs_tools = pytest.mark.skipif(
    not all((static.NVIDIA_TOOLS / tool).exists() for tool in TOOLS),
    reason=f"this triton package does not carry {', '.join(TOOLS)}",
)

Numbers = list[dict[str, Any]]


def environment(cache: Path) -> dict[str, str]:
    """Without the interpreter, and with a cache of its own: everything is compiled here."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"TRITON_CACHE_DIR": str(cache)}


def static_numbers(folder: Path, *options: str) -> Numbers:
    runs = []
    for share in SHARES:
        file = folder / f"{share[0]}.json"
        command = [sys.executable, "-m", "benchmarks.static", "--json", str(file), *options]
        run = subprocess.Popen(
            [*command, "--targets", *share],
            cwd=ROOT,
            env=environment(folder / share[0]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        runs.append((run, file))
    outputs = [run.communicate()[0] for run, _ in runs]
    for (run, _), output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
    return [cost for _, file in runs for cost in json.loads(file.read_text())]


def assert_no_spills(numbers: Numbers) -> None:
    assert [cost for cost in numbers if cost["spills"] != 0] == []
    assert all(cost["registers"] > 0 and cost["instructions"] > 0 for cost in numbers)


def assert_short_steps(numbers: Numbers, variants: Set[str]) -> None:
    steps = {
        cost["variant"]: cost["step"]
        for cost in numbers
        if (cost["kernel"], cost["target"]) == ("solve_columns", "sm_90")
    }
    assert steps.keys() == variants
    assert all(0 < step <= STEP[variant] for variant, step in steps.items()), steps


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """Ragged tiles take as long to compile as everything else together: left to the slow test."""
    return static_numbers(tmp_path_factory.mktemp("static"), "--skip", "ragged")


@needs_tools
def test_every_kernel_compiles_for_every_target(numbers: Numbers) -> None:
    kernels = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if f"def _{path.stem}_kernel(" in path.read_text()
    }
    assert len(kernels) >= 7
    found = {(cost["kernel"], cost["target"]) for cost in numbers}
    assert found == {(kernel, target) for kernel in kernels for target in static.TARGETS}


@needs_tools
def test_no_kernel_spills(numbers: Numbers) -> None:
    assert_no_spills(numbers)


@needs_tools
def test_a_column_step_is_short(numbers: Numbers) -> None:
    assert_short_steps(numbers, STEP.keys() - {"ragged"})


@needs_tools
@pytest.mark.slow
def test_ragged_tiles_too(tmp_path: Path) -> None:
    numbers = static_numbers(tmp_path, "--kernels", "solve_columns")
    assert {cost["target"] for cost in numbers} == set(static.TARGETS)
    assert_no_spills(numbers)
    assert_short_steps(numbers, STEP.keys())


def test_spills_make_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for spills in (0, 8):
        cost = static.Cost("solve_columns", "even", "sm_90", 255, spills, 0, 1000)
        monkeypatch.setattr(static, "measurements", lambda *_, cost=cost: iter([cost]))
        assert static.main([]) == (1 if spills else 0)
        assert ("spills registers" in capsys.readouterr().err) == (spills > 0)


def test_a_step_is_the_outer_loop_without_the_inner_ones() -> None:
    listing = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IMAD R2, R1, R1, RZ ;
.L_x_1:
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FADD R3, R3, R3 ;
        /*0050*/                   MUFU.RCP R5, R21 ;
        /*0060*/                   FADD R3, R3, R3 ;
        /*0070*/                   MUFU.RCP R6, R22 ;
        /*0080*/               @P1 EXIT ;
        /*0090*/                   BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   MUFU.RCP R7, R23 ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
"""
    code = static.nvidia_instructions(listing)
    assert sum(not line.endswith(":") for line in code) == 13
    assert static.column_step(code, 2) == 3.5  # 0x10 and 0x40 to 0x90: seven, for two columns


@pytest.mark.parametrize(
    "script, interpret, message",
    [
        pytest.param("", "1", "TRITON_INTERPRET is set", id="interpreter"),
        pytest.param("del static.CASES['downdate']; ", "0", "differ: downdate", id="no-case"),
    ],
)
def test_refuses_to_leave_a_kernel_out(
    script: str, interpret: str, message: str, tmp_path: Path
) -> None:
    command = f"from benchmarks import static; {script}static.main([])"
    run = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env=environment(tmp_path) | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert message in run.stderr
