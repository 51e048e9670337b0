"""Two runs side by side: what they lost, layer by layer, and what was asked of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import charts, page
from .charts import NAMELESS, Place, printable, shown
from .page import Cell
from .report import LayerReport, Report
from .report_html import ERROR, flat

HEADS = (
    "#", "layer", "error of A", "error of B", "B / A", "bits A", "bits B", "size A", "size B",
    "solve A (s)", "solve B (s)",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """a, b: reports; names: what they are called. As text by `str`, as a page by `page`."""

    a: Report
    b: Report
    names: tuple[str, str] = ("A", "B")

    @property
    def pairs(self) -> list[tuple[LayerReport, LayerReport]]:
        """The layers of both, in the order of a."""
        other = {x.name: x for x in self.b.layers}
        return [(x, other[x.name]) for x in self.a.layers if x.name in other]

    @property
    def alone(self) -> tuple[list[str], list[str]]:
        """Names of layers that only one has quantized."""
        names_a, names_b = ({x.name: None for x in report.layers} for report in (self.a, self.b))
        return [n for n in names_a if n not in names_b], [n for n in names_b if n not in names_a]

    @property
    def differences(self) -> dict[str, tuple[str, str]]:
        """Options, versions, devices that are not the same, as text: name -> of a, of b."""
        of_a, of_b = (flat(r.options) | flat(r.environment) for r in (self.a, self.b))
        return {
            name: (of_a.get(name, "–"), of_b.get(name, "–"))
            for name in of_a | of_b
            if of_a.get(name) != of_b.get(name)
        }

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean of the error of b by that of a; None without a layer that has both."""
        ratios = [ratio for pair in self.pairs if (ratio := error_ratio(*pair))]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def __str__(self) -> str:
        width = max([len(x.name) for x, _ in self.pairs], default=5)
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}"]
        lines += [f"{n}: A {a}, B {b}" for n, (a, b) in self.differences.items()]
        lines.append(f"{'layer':{width}}  bits     error A   error B    B/A   solve s A        B")
        for x, y in self.pairs:
            ratio = error_ratio(x, y)
            lines.append(
                f"{x.name:{width}}  {x.spec.bits} {y.spec.bits}   {x.relative_error:9.3e} "
                f"{y.relative_error:9.3e} {'-' if ratio is None else f'{ratio:.2f}':>6}   "
                f"{x.seconds_solve:9.3f} {y.seconds_solve:8.3f}"
            )
        for which, names in zip("AB", self.alone, strict=True):
            lines += [f"{name}: only in {which}" for name in names]
        lines += [f"{name}: A {a}, B {b}" for name, a, b in _totals(self)]
        return "\n".join(map(printable, lines))

    def page(self) -> str:
        """One HTML file, as `report_page`."""
        return page.document("Two quantizations", _body(self))


def compare(a: Report, b: Report, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Two runs side by side; print it, or write its `page()` into a file."""
    return Comparison(a, b, names)


def error_ratio(a: LayerReport, b: LayerReport) -> float | None:
    """Relative error of b by that of a; None where a has none."""
    return b.relative_error / a.relative_error if a.relative_error > 0 else None


def _totals(both: Comparison) -> Iterator[tuple[str, str, str]]:
    of_a, of_b = both.a, both.b
    yield "layers quantized", str(len(of_a.layers)), str(len(of_b.layers))
    yield (
        "mean relative error", page.quantity(of_a.relative_error),
        page.quantity(of_b.relative_error),
    )  # fmt: skip
    yield (
        "error vs. nearest", f"× {page.ratio(of_a.nearest_ratio)}",
        f"× {page.ratio(of_b.nearest_ratio)}",
    )  # fmt: skip
    yield "bits of a weight", f"{of_a.mean_bits:.3g}", f"{of_b.mean_bits:.3g}"
    yield "packed size", page.size(of_a.bytes), page.size(of_b.bytes)
    yield "time", page.span(of_a.seconds), page.span(of_b.seconds)
    for name in dict.fromkeys([*of_a.memory, *of_b.memory]):
        peaks = [page.size(r.memory[name]) if name in r.memory else "–" for r in (of_a, of_b)]
        yield f"peak memory of the {name}", peaks[0], peaks[1]


def _body(both: Comparison) -> Iterator[str]:
    ratio = both.mean_ratio
    yield "<header><h1>Two quantizations</h1>"
    if ratio is not None:
        less = sum(y.relative_error < x.relative_error for x, y in both.pairs)
        yield (
            f"<p>Layers of B have × {page.ratio(ratio)} the error of those of A, in the geometric "
            f"mean; {less} of {len(both.pairs)} have less.</p>"
        )
    yield "</header>"
    rows = [((Cell(n), Cell(a), Cell(b)), ()) for n, a, b in _totals(both)]
    rows.insert(0, ((Cell("run"), Cell(both.names[0]), Cell(both.names[1])), ()))
    yield f'<div class="card">{page.table(("", "A", "B"), rows)}</div>'
    yield "<h2>What differs</h2>"
    rows = [((Cell(n), Cell(a), Cell(b)), ()) for n, (a, b) in both.differences.items()]
    inside = page.table(("option", "A", "B"), rows) if rows else "<p>No option.</p>"
    yield f'<div class="card">{inside}</div>'
    if both.pairs:
        yield "<h2>Error by layer</h2>"
        places = [_place(number, *pair) for number, pair in enumerate(both.pairs)]
        yield (
            "<p class=about>Each run measures on inputs of its own: those that its earlier layers "
            "have changed, and against what its drift correction aimed at.</p>"
        )
        chart = charts.by_layer(places, ERROR)
        key = page.legend("A", "B")
        yield f'<div class="card">{key}<div class="wide chart">{chart}</div></div>'
        yield f'<h2>Layers</h2><div class="card">{_table(both)}</div>'
    for which, names in zip("AB", both.alone, strict=True):
        if names:
            entries = "".join(f"<li><bdi>{shown(name or NAMELESS)}</bdi></li>" for name in names)
            yield f'<h2>Only in {which}</h2><div class="card"><ul>{entries}</ul></div>'


def _place(number: int, x: LayerReport, y: LayerReport) -> Place:
    errors = f"A {page.quantity(x.relative_error)}, B {page.quantity(y.relative_error)}"
    hint = f"{number + 1}. {x.name}\n{errors}"
    return Place(x.name, x.relative_error, y.relative_error, f"layer-{number + 1}", hint)


def _table(both: Comparison) -> str:
    rows = []
    for number, (x, y) in enumerate(both.pairs):
        ratio = error_ratio(x, y)
        cells = (
            Cell(str(number + 1), number + 1, anchor=f"layer-{number + 1}"),
            Cell(x.name or NAMELESS),
            Cell(page.quantity(x.relative_error), x.relative_error),
            Cell(page.quantity(y.relative_error), y.relative_error),
            Cell(page.ratio(ratio), math.nan if ratio is None else ratio),
            Cell(str(x.spec.bits), x.spec.bits),
            Cell(str(y.spec.bits), y.spec.bits),
            Cell(page.size(x.bytes), x.bytes),
            Cell(page.size(y.bytes), y.bytes),
            Cell(f"{x.seconds_solve:.3f}", x.seconds_solve),
            Cell(f"{y.seconds_solve:.3f}", y.seconds_solve),
        )
        notes = [f"A: {note}" for note in x.remarks if note not in y.remarks]
        notes += [f"B: {note}" for note in y.remarks if note not in x.remarks]
        rows.append((cells, notes))
    return page.table(HEADS, rows, name=1)
