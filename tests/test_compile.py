"""Every kernel compiles for every target, within its budget of registers and instructions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import static
from benchmarks.cycles import Code
from sapq_triton.kernels import launch

ROOT = Path(__file__).parents[1]
TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
STEP = 75  # SASS instructions of solve_columns on sm_90, but for ragged tiles and codebooks

needs_tools = pytest.mark.skipif(
    not all((static.NVIDIA_TOOLS / tool).exists() for tool in TOOLS),
    reason=f"this triton package does not carry {', '.join(TOOLS)}",
)

Numbers = list[dict[str, Any]]


def environment(cache: Path) -> dict[str, str]:
    """Without the interpreter, and with a cache of its own: everything is compiled here."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"TRITON_CACHE_DIR": str(cache)}


def static_numbers(folder: Path, shares: tuple[tuple[str, ...], ...], *options: str) -> Numbers:
    """All shares of targets at a time, each in a process; every exit status must be 0."""
    runs = []
    for share in shares:
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
    return [cost for _, file in runs for cost in json.loads(file.read_text())["costs"]]


def assert_complete(numbers: Numbers, targets: tuple[str, ...]) -> None:
    kernels = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if f"def _{path.stem}_kernel(" in path.read_text()
    }
    assert len(kernels) >= 7
    found = {(cost["kernel"], cost["target"]) for cost in numbers}
    assert found == {(kernel, target) for kernel in kernels for target in targets}
    assert all(cost["spills"] == 0 for cost in numbers)
    assert all(cost["registers"] > 0 and cost["programs"] > 0 for cost in numbers)
    assert all(cost["instructions"] > 100 for cost in numbers)  # else compiled away


def assert_short_steps(numbers: Numbers) -> None:
    steps = {
        cost["variant"]: cost["step"]
        for cost in numbers
        if (cost["kernel"], cost["target"]) == ("solve_columns", "sm_90")
    }
    assert steps.keys() == static.CASES["solve_columns"].keys()
    longer = ("ragged", "ragged pruned", "codebook")
    assert all(step > 0 for step in steps.values()), steps
    assert all(step <= STEP for name, step in steps.items() if name not in longer), steps


@needs_tools
def test_the_check_of_every_change(tmp_path: Path) -> None:
    """Compiles, spills nothing, and no column step has grown over the committed one."""
    numbers = static_numbers(tmp_path, tuple((target,) for target in static.SHORT), "--short")
    assert_complete(numbers, static.SHORT)
    assert_short_steps(numbers)
    for cost in numbers:
        estimated = cost["kernel"] == "solve_columns"
        assert bool(cost["estimate"]) is estimated and (cost["step"] is not None) is estimated
        assert all(value > 0 for value in cost["estimate"].values())


@needs_tools
@pytest.mark.slow
def test_every_target_and_every_configuration(tmp_path: Path) -> None:
    numbers = static_numbers(tmp_path, (("sm_80", "gfx942"), ("sm_90", "sm_100")))
    assert_complete(numbers, tuple(static.DEVICES))
    known = json.loads(static.RESULTS.read_text())
    assert {static.key(cost) for cost in numbers} == {static.key(c) for c in known["costs"]}
    assert static.longer([static.Cost(**cost) for cost in numbers], static.RESULTS) == []


def cost(**changed: Any) -> static.Cost:
    usual = static.Cost("solve_columns", "groups", "sm_90", "default", 255, 0, 0, 1, 1000, 60.0)
    return replace(usual, **changed)


def committed(folder: Path, *costs: static.Cost, triton: str = static.triton.__version__) -> Path:
    known = json.loads(static.text(costs))
    file = folder / "static.json"
    file.write_text(json.dumps(known | {"triton": triton}))
    return file


def test_committed_figures_are_of_all_configurations() -> None:
    known = json.loads(static.RESULTS.read_text())
    assert "not measured" in known["about"]
    found = {(cost["target"], cost["configuration"]) for cost in known["costs"]}
    own = {(family, family) for family in launch.table().keys() & static.DEVICES.keys()}
    assert found == own | {(target, launch.DEFAULT) for target in static.DEVICES}
    assert all(cost["spills"] == 0 for cost in known["costs"])


def test_a_column_step_may_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = cost(target="gfx942", step=10.0), cost(kernel="downdate", step=None)
    file = committed(tmp_path, cost(), *others)
    assert static.longer([cost(step=66.0), *others], file) == []
    (wrong,) = static.longer([cost(step=66.1), *others], file)
    assert "longer than the committed 60.0" in wrong
    (wrong,) = static.longer([cost(configuration="sm_90")], file)
    assert "no committed column step" in wrong
    monkeypatch.setattr(static, "RESULTS", file)
    monkeypatch.setattr(static, "measurements", lambda *_: iter([cost(step=66.1)]))
    assert static.main([]) == 0
    assert static.main(["--short"]) == 1
    assert "longer than the committed 60.0" in capsys.readouterr().err
    file.unlink()
    assert static.main(["--short"]) == 1
    assert "no committed figures" in capsys.readouterr().err


@pytest.mark.parametrize("spills", [0, 8])
def test_steps_of_another_triton_are_not_compared(
    spills: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(static, "RESULTS", committed(tmp_path, cost(step=1.0), triton="2.9.1"))
    monkeypatch.setattr(static, "measurements", lambda *_: iter([cost(spills=spills)]))
    assert static.main(["--short"]) == (1 if spills else 0)
    printed = capsys.readouterr()
    assert "not compared: static.json was written with triton 2.9.1" in printed.out
    assert ("spills registers" in printed.err) == (spills > 0)


def test_each_target_launches_its_own_configuration(tmp_path: Path) -> None:
    """And in the full form what it overrides as well, the same launch once."""
    script = """
import json, sys
from benchmarks import static
table = {"default": static.launch.table()["default"]}
own = table["default"]["downdate"] | {"num_warps": 8}
same = table["default"]["compensate"]
static.launch.table = lambda: table | {"sm_90": {"downdate": own, "compensate": same}}
found = []
for name in ("downdate", "compensate"):
    module = static.importlib.import_module(f"sapq_triton.kernels.{name}")
    for target in ("sm_90", "gfx942"):
        for short in (False, True):
            for at, recorder in static.launches(module, static.CASES[name][""], target, short):
                precision = recorder.arguments["PRECISION"]
                found.append([name, target, short, at, recorder.options["num_warps"], precision])
print(json.dumps(found))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(run.stdout) == [
        ["downdate", "sm_90", False, "default", 4, "tf32x3"],
        ["downdate", "sm_90", False, "sm_90", 8, "tf32x3"],
        ["downdate", "sm_90", True, "sm_90", 8, "tf32x3"],
        ["downdate", "gfx942", False, "default", 4, "ieee"],
        ["downdate", "gfx942", True, "default", 4, "ieee"],
        ["compensate", "sm_90", False, "default", 4, "tf32x3"],
        ["compensate", "sm_90", True, "default", 4, "tf32x3"],
        ["compensate", "gfx942", False, "default", 4, "ieee"],
        ["compensate", "gfx942", True, "default", 4, "ieee"],
    ]


@pytest.mark.parametrize(
    "target, warps, registers, shared, programs",
    [
        pytest.param("sm_90", 8, 255, 0, 1, id="registers"),
        pytest.param("sm_90", 4, 128, 0, 4, id="registers-of-four-warps"),
        pytest.param("sm_90", 4, 129, 0, 3, id="eight-at-a-time"),
        pytest.param("sm_90", 4, 32, 75 * 1024, 3, id="shared"),
        pytest.param("sm_80", 4, 32, 75 * 1024, 2, id="shared-of-a100"),
        pytest.param("sm_90", 1, 16, 0, 32, id="programs"),
        pytest.param("sm_100", 4, 16, 0, 16, id="warps"),
        pytest.param("gfx942", 4, 16, 0, 8, id="waves"),
        pytest.param("gfx942", 4, 16, 32768, 2, id="local"),
    ],
)
def test_resident_programs(
    target: str, warps: int, registers: int, shared: int, programs: int
) -> None:
    assert static.DEVICES[target].resident(warps, registers, shared) == programs


def test_spills_make_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for spills in (0, 8):
        found = cost(spills=spills)
        monkeypatch.setattr(static, "measurements", lambda *_, found=found: iter([found]))
        assert static.main([]) == (1 if spills else 0)
        assert ("spills registers" in capsys.readouterr().err) == (spills > 0)


LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IMAD R2, R1, R1, RZ ;
.L_x_1:
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_4:
        /*0050*/                   FADD R4, R3, R3 ;
.L_x_5:
        /*0060*/                   FADD R4, R4, R3 ;
        /*0070*/               @P3 CALL.REL.NOINC `(.L_x_6) ;
        /*0080*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0090*/                   MUFU.RCP R5, R21 ;
        /*00a0*/                   FADD R3, R3, R5 ;
        /*00b0*/                   MUFU.RCP R6, R22 ;
        /*00c0*/               @P2 BRA `(.L_x_4) ;
        /*00d0*/               @P1 EXIT ;
        /*00e0*/                   BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
        /*0100*/                   MUFU.RCP R7, R23 ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
        /*0120*/                   NOP;
"""


def test_a_step_is_its_loop_without_the_inner_ones() -> None:
    code = Code.nvidia(LISTING)
    assert code.count() == 18
    columns = code.columns(2)
    opcodes = [
        [code.lines[index].split()[0] for index in part if not code.lines[index].endswith(":")]
        for part in (columns.step, *columns.near, *columns.far)
    ]
    assert opcodes == [
        ["FADD", "MUFU.RCP", "FADD", "MUFU.RCP", "@P2"],
        ["FADD", "@P3", "BRA"],  # for sm_80 a jump may be written as a call
        ["FFMA", "@P1"],
    ]
    with pytest.raises(RuntimeError, match="expected 3 divisions, one per column, found 2"):
        code.columns(3)


def test_a_loop_whose_end_lies_before_its_start() -> None:
    """As LLVM lays them out for AMD."""
    code = Code.amd(
        "k:\n\ts_branch .LBB0_2\n.LBB0_1:\n\ts_cbranch_scc1 .LBB0_4\n.LBB0_2:\n"
        "\tv_rcp_f32_e32 v1, v0 ; %x\n\ts_branch .LBB0_1\n.LBB0_4:\n\ts_endpgm\n.Lfunc_end0:"
    )
    assert code.count() == 5
    assert code.count(code.columns(1).step) == 3


@pytest.mark.parametrize(
    "lines, cycles",
    [
        pytest.param(["FFMA R1, R2, R3, R4", "FFMA R5, R6, R7, R8"], 5, id="independent"),
        pytest.param(["FFMA R1, R2, R3, R4", "FFMA R5, R1, R7, R8"], 8, id="dependent"),
        pytest.param(["MUFU.RCP R1, R2", "FADD R3, R1, R1"], 24, id="reciprocal"),
        pytest.param(["LDG.E R1, [R2.64]", "FADD R3, R1, R1"], 104, id="load"),
        pytest.param(["LDG.E.64 R2, [R4.64]", "FADD R5, R3, R3"], 104, id="pair"),
        pytest.param(["IMAD.WIDE R2, R9, R9, R6", "LDG.E R1, [R2.64]"], 104, id="address"),
        pytest.param(["FADD R1, R2, R3", "STG.E [R4.64], R1"], 5, id="store"),
        pytest.param(["BAR.SYNC 0x0", "FADD R1, R2, R3"], 25, id="barrier"),
        pytest.param(["FSETP.GT P1, R1, R2", "@P1 FADD R3, R3, R3"], 8, id="predicate"),
        pytest.param(["LDGSTS [R1], [R2.64]", "DEPBAR.LE SB0, 0x0"], 101, id="wait"),
        pytest.param(["LDGSTS [R1], [R2.64]", "LDGDEPBAR", "FADD R1, R1, R3"], 6, id="no-wait"),
        pytest.param(
            ["@!P1 BRA `(.L_x_1)", "CALL.REL.NOINC `($slow)", "MOV R1, R2", ".L_x_1:"], 9, id="call"
        ),
        pytest.param(["v_add_f32 v1, v2, v3", "v_add_f32 v4, v1, v1"], 8, id="amd"),
        pytest.param(
            ["global_load_dword v2, v[4:5], off", "s_waitcnt vmcnt(0)"], 101, id="amd-wait"
        ),
        pytest.param(
            ["global_load_dword v2, v[4:5], off", "global_store_dword v[6:7], v9, off",
             "s_waitcnt vmcnt(1)", "v_add_f32 v1, v2, v2", "s_nop 0"], 106, id="amd-wait-for-one"
        ),
        pytest.param(
            ["global_load_dword v2, v[4:5], off", "ds_read_b32 v1, v3", "s_waitcnt lgkmcnt(0)",
             "s_nop 0"], 100, id="amd-two-counters"
        ),
        pytest.param(["ds_read_b32 v1, v3", "s_waitcnt lgkmcnt(0)"], 65, id="amd-local"),
    ],
)  # fmt: skip
def test_cycles_of_straight_code(lines: list[str], cycles: int) -> None:
    code = Code(tuple(lines))
    assert code.cycles(range(len(lines)), memory=100) == cycles


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
