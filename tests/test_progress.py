"""Progress: a bar where somebody watches, a line now and then in a log."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sapq_triton import QuantSpec, progress, quantize
from sapq_triton.progress import _Lines, _span, layer_cost, progress_bar

ROOT = Path(__file__).parents[1]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(
    costs: dict[str, float], seconds: Callable[[str], float], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What a log shows of layers that take so long."""
    clock = Clock()
    advance = _Lines(costs, clock)
    for name in costs:
        clock.now += seconds(name)
        advance(name)
    return capsys.readouterr().err.splitlines()


def test_a_line_per_tenth_in_a_fast_run(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {str(number): 1.0 for number in range(200)}
    lines = lines_of(costs, lambda name: 0.01, capsys)
    assert len(lines) == 10
    assert lines[0] == "quantize:  10%, 20/200 layers in 0:00, about 0:02 left"
    assert lines[-1] == "quantize: 100%, 200/200 layers in 0:02"


def test_a_line_each_half_minute_in_a_slow_run(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {str(number): 1.0 for number in range(100)}
    lines = lines_of(costs, lambda name: 20.0, capsys)
    assert len(lines) == 50  # every second layer
    assert lines[0] == "quantize:   2%, 2/100 layers in 0:40, about 32:40 left"


def test_the_rest_is_judged_by_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {"small": 1.0, "large": 9.0, "last": 2.0}
    lines = lines_of(costs, lambda name: 60 * costs[name], capsys)
    assert [line.partition("about ")[2] for line in lines] == ["11:00 left", "2:00 left", ""]


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (3599.7, "1:00:00"), (36061, "10:01:01")]
)
def test_spans_of_time(seconds: float, text: str) -> None:
    assert _span(seconds) == text


def test_hessians_factors_and_loops_count() -> None:
    assert layer_cost(1, 10, 20, 0) == 15 * (10 * 20**2 + 20**3)
    assert layer_cost(32, 1, 9, 50) == 32 * 9 * 50 * (9 + 200) + 32 * 15 * (1 * 9**2 + 9**3)


class Shared(nn.Module):
    """Two layers on one input, and one on what both put out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.cat([self.left(x), self.right(x)], 1))
        return result


def test_layers_that_share_a_hessian_have_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []

    def bar(costs: dict[str, float], shown: bool) -> object:
        seen.append(dict(costs))
        return progress_bar(costs, shown)

    monkeypatch.setattr(sys.modules["sapq_triton.quantize"], "progress_bar", bar)
    quantize(Shared(), list(torch.randn(21, 6).split(7)), QuantSpec(3), progress=False)
    assert seen == [{
        "left": layer_cost(1, 5, 6, 21),
        "right": layer_cost(1, 4, 6, 0),
        "last": layer_cost(1, 3, 9, 21),
    }]  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_no_carriage_return_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    quantize(net(), [torch.randn(9, 6)], QuantSpec(3))
    lines = capfd.readouterr().err
    assert "\r" not in lines and "2/2 layers" in lines
    assert [re.sub(r"[^/]*/", "", line)[:8] for line in lines.splitlines()] == ["2 layers"] * 2
    quantize(net(), [torch.randn(9, 6)], QuantSpec(3), progress=False)
    assert capfd.readouterr().err == ""


WATCHED = """
import torch
from torch import nn
from sapq_triton import QuantSpec, quantize
quantize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), [torch.randn(9, 6)], QuantSpec(3))
"""


def test_a_bar_in_a_terminal() -> None:
    """A real one: stderr is the end of a pseudo-terminal."""
    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WATCHED], stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0, seen
    text = seen.decode()
    assert "\r" in text and "quantize: 100%|" in text and "2/2 layers" in text
    assert "about" not in text


def test_lines_in_a_terminal_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar({"a": 1.0, "b": 3.0}, True) as advance:
        advance("a")
    assert capsys.readouterr().err.startswith("quantize:  25%, 1/2 layers in 0:00")


def test_the_bar_moves_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_bar", lambda: lambda **options: tqdm.tqdm(
        **options, mininterval=0, ncols=80, file=screen))  # fmt: skip
    with progress_bar({"a": 1.0, "b": 3.0}, True) as advance:
        advance("a")
        advance("b")
    shown = [re.findall(r"(\d+)%|(\d/\d) layers", part) for part in screen.getvalue().split("\r")]
    assert [("".join(x[0] for x in s), "".join(x[1] for x in s)) for s in shown if s] == [
        ("0", "0/2"), ("25", "1/2"), ("100", "2/2"), ("100", "2/2"),
    ]  # fmt: skip


def test_a_notebook_is_told_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        def __init__(self, config: dict[str, object]) -> None:
            self.config = config

    class IPython:
        def __init__(self, config: dict[str, object]) -> None:
            self.get_ipython = lambda: Shell(config)

    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress._in_notebook()
    for config, there in (({"IPKernelApp": {}}, True), ({"TerminalIPythonApp": {}}, False)):
        monkeypatch.setitem(sys.modules, "IPython", IPython(config))
        assert progress._in_notebook() is there
