"""How far a run is, by what its layers cost: a bar for people who watch, few lines for logs."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

TENTH = 0.1  # a line in a log for each
SECONDS = 30  # or when the last line is older
PATCHES, SOLVE = 200, 15  # as measured on EfficientNet-Lite0, on a CPU

Advance = Callable[[str], None]


def layer_cost(groups: int, rows: int, columns: int, inputs: int) -> float:
    """In proportion to the time that a layer takes: its Hessian N C^2, and N C for the patches of
    its N input rows; its solve C^3 for factors and R C^2 for loops.
    """
    hessian = inputs * (columns + PATCHES)
    return float(groups * columns * (hessian + SOLVE * (rows + columns) * columns))


@contextmanager
def progress_bar(costs: Mapping[str, float], shown: bool | Advance) -> Iterator[Advance]:
    """A function to call with the name of each layer that is done; costs: of all, by name.

    shown: whether anything is; or the function of a bar that shows more than this run.

    A bar of tqdm where stderr is a terminal, or in a notebook. Elsewhere, and without tqdm, a line
    on stderr for each tenth of the work, and when the last one is SECONDS old.
    """
    if callable(shown):
        yield shown
    elif not shown:
        yield lambda name: None
    elif (bar := _bar() if sys.stderr.isatty() or _in_notebook() else None) is not None:
        total = sum(costs.values())
        # the average speed so far, not the latest: layers differ in what the model does between
        with bar(
            total=1.0, desc="quantize", smoothing=0, postfix=f"0/{len(costs)} layers",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        ) as shown_bar:  # fmt: skip
            done = 0

            def advance(name: str) -> None:
                nonlocal done
                done += 1
                shown_bar.set_postfix_str(f"{done}/{len(costs)} layers", refresh=False)
                shown_bar.update(costs[name] / total)

            yield advance
    else:
        yield _Lines(costs)


class _Lines:
    """One line now and then."""

    def __init__(
        self,
        costs: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs, self._clock = costs, clock
        self._total = sum(costs.values())
        self._started = self._last = clock()
        self._layers, self._cost, self._said = 0, 0.0, 0.0

    def __call__(self, name: str) -> None:
        self._layers += 1
        self._cost += self._costs[name]
        now, share = self._clock(), self._cost / self._total
        finished = self._layers == len(self._costs)
        if share - self._said < TENTH and now - self._last < SECONDS and not finished:
            return
        spent = now - self._started
        left = "" if finished else f", about {_span(spent * (1 - share) / share)} left"
        print(
            f"quantize: {share:4.0%}, {self._layers}/{len(self._costs)} layers in {_span(spent)}"
            f"{left}",
            file=sys.stderr,
            flush=True,
        )
        self._last, self._said = now, share


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def _bar() -> Any:
    """tqdm's class, for a terminal or a notebook; None without it."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm
