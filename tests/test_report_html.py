"""Pages of reports: one file, well formed, with the figures of the report and nothing from outside.

How they look is tested in `test_browser`.
"""

import itertools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sapq_triton import Report, compare
from sapq_triton.charts import NAMELESS, Place, by_layer, histogram, order_map, printable
from sapq_triton.page import Cell, quantity, ratio, size, span, table
from sapq_triton.report_html import report_page
from tests.reports import EMPTY, of_layers, real_report

VOID = {"meta", "br", "wbr", "img", "input", "link", "hr"}
WEIRD = [
    "<script>alert(1)</script>",
    "a&b\"'>",
    "höhe.重み",
    "x" * 5000,
    "\u202eevil\n\0",
    "",
]  # the last one: the model is the layer


class Page(HTMLParser):
    """Elements with attributes and text; refuses what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # of an element, text
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rows_of(text: str) -> list[list[tuple[str, str | None]]]:
    """Of the table of layers: text and sort value of each cell, of the first row of each tbody."""
    bodies = re.findall(r"<tbody><tr>(.*?)</tr>", text, re.DOTALL)
    rows: list[list[tuple[str, str | None]]] = []
    for body in bodies:
        rows.append([])
        for head, inside in re.findall(r"<td([^>]*)>(.*?)</td>", body, re.DOTALL):
            value = re.search(r'data-v="(.*?)"', head)
            rows[-1].append((re.sub(r"<[^>]*>", "", inside), value[1] if value else None))
    return rows


PAGES = {
    "real": report_page(real_report()),
    "empty": report_page(EMPTY),
    "one": report_page(of_layers(1)),
    "200": report_page(of_layers(200)),
    "weird": report_page(of_layers(len(WEIRD), WEIRD)),
    "compared": compare(of_layers(3), real_report()).page(),
    "weirdly compared": compare(
        of_layers(6, WEIRD), of_layers(6, WEIRD[::-1]), (WEIRD[0], WEIRD[1])
    ).page(),
    "nothing compared": compare(EMPTY, EMPTY).page(),
}


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_one_well_formed_file(text: str) -> None:
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(page.of("h1")) == len(page.of("script")) == text.count("</h1>") == 1
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    for link in page.of("a"):
        target = link["href"] or ""
        assert target[0] == "#" and target[1:] in identifiers
    assert text.encode("utf-8")


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_nothing_comes_from_outside(text: str) -> None:
    for reference in ("http", "src=", "@import", "url(", "//", "<link", "<iframe", "srcset"):
        assert reference not in text.lower(), reference
    names = {tag for tag, _ in Page(text).elements}
    assert not names & {"img", "link", "iframe", "object", "embed", "base", "form", "video"}
    assert not any(name.startswith("on") for _, a in Page(text).elements for name in a)


def test_names_are_text() -> None:
    for key in ("weird", "weirdly compared"):
        page = Page(PAGES[key])
        assert page.text.count("<script>alert(1)</script>") >= 3
        for name in WEIRD:
            assert printable(name) in page.text
        assert NAMELESS in page.text
        assert "\u202e" not in page.text and "\0" not in PAGES[key]
    assert printable("é 重\ud800\u202e\t") == "é 重\\ud800\\u202e\\t"


def test_the_table_holds_the_figures_of_the_report() -> None:
    for report, key in ((real_report(), "real"), (of_layers(200), "200")):
        rows = rows_of(PAGES[key])[: len(report.layers)]
        assert len(rows) == len(report.layers)
        for number, (row, x) in enumerate(zip(rows, report.layers, strict=True)):
            texts, values = zip(*row, strict=True)
            assert texts[1] == x.name and texts[2] == x.kind
            assert texts[3] == "×".join(map(str, x.shape))
            found = [float(value) for i, value in enumerate(values) if i not in (1, 2)]
            assert found == [
                number + 1, x.weights, x.spec.bits, x.spec.columns_per_group(x.matrix[2]),
                x.relative_error, x.nearest_relative_error, x.nearest_ratio, x.damp,
                x.drift_correction, x.rows, x.dead_columns, x.fallbacks, x.bytes,
                x.seconds_hessian, x.seconds_solve,
            ]  # fmt: skip
            assert float(texts[6]) == pytest.approx(x.relative_error, rel=5e-3)
            assert float(texts[7]) == pytest.approx(x.nearest_relative_error, rel=5e-3)


def test_headlines_notes_and_the_rest() -> None:
    report = real_report()
    text = Page(PAGES["real"]).text
    for value in (
        quantity(report.relative_error), f"× {ratio(report.nearest_ratio)}", size(report.bytes),
        f"{report.mean_bits:.3g}", span(report.seconds), size(report.memory["process"]),
        "9 columns never fired", "as asked", "Quantization of Sequential", "3 / 4 bits",
        "overrides.6.group_size27", "batches4", "dampchosen for each layer", "skip8",
        "BatchNorm statistics and biases", f"sapq-triton {report.environment['sapq-triton']}",
    ):  # fmt: skip
        assert value in text, value
    for stage, seconds in report.stages.items():
        assert stage in text and span(seconds) in text
    assert len(Page(PAGES["real"]).of("details")) == 3 + 1
    noted = replace(report, layers=(replace(report.layers[2], notes=("one <b>", "two")),))
    assert re.findall(r'<td class="note".*?<span>(.*?)</span><span>(.*?)</span>',
                      report_page(noted)) == [("one &lt;b&gt;", "two")]  # fmt: skip


def test_an_empty_report() -> None:
    text = Page(PAGES["empty"]).text
    assert "layers quantized" in text and "Error by layer" not in text


def circles(svg: str, series: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle class="{series}" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def gridlines(svg: str) -> dict[str, float]:
    """Labels of the vertical axis to their height."""
    labels = re.findall(r'<text class="tick end" x="\d+" y="([\d.]+)">(.*?)</text>', svg)
    return {label: float(y) - 4 for y, label in labels}


def test_dots_lie_where_the_axis_says() -> None:
    values = [(1e-4, 1e-2), (1e-3, 5e-3), (2e-2, 1e-1)]
    svg = by_layer([Place(f"l{i}", a, b, f"l-{i}", "") for i, (a, b) in enumerate(values)], "error")
    grid = gridlines(svg)
    assert list(grid) == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]
    decade = grid["10⁻⁴"] - grid["10⁻³"]
    for series, which in (("a", 0), ("b", 1)):
        heights = [grid["10⁻⁴"] - decade * (math.log10(v[which]) + 4) for v in values]
        dots = circles(svg, series)
        assert [y for _, y in dots] == pytest.approx(heights, abs=0.2)
    (first, _), (second, _), (third, _) = circles(svg, "a")
    assert second - first == pytest.approx(third - second, abs=0.2)


def test_values_without_a_logarithm() -> None:
    places = [Place("zero", 0.0, 1e-3, "", ""), Place("bad", math.nan, math.inf, "", ""),
              Place("none", None, 1e-2, "", "")]  # fmt: skip
    svg = by_layer(places, "error")
    (dot,) = circles(svg, "a")
    assert dot[1] > gridlines(svg)["10⁻³"] and len(circles(svg, "b")) == 2
    assert "nan" not in svg and "inf" not in svg
    alone = by_layer([Place("zero", 0.0, 0.0, "", "")], "error")
    assert len(circles(alone, "a")) == 1


@pytest.mark.parametrize("count", [1, 2, 5, 14, 48, 49, 200, 1000])
def test_labels_of_layers_do_not_overlap(count: int) -> None:
    svg = by_layer([Place(f"layer.{i}", 1e-3, 1e-2, "", "") for i in range(count)], "error")
    assert len(circles(svg, "a")) == count
    if count > 48:
        ticks = [float(x) for x in re.findall(r'<text class="tick mid" x="([\d.]+)"', svg)]
        assert min(b - a for a, b in itertools.pairwise(ticks)) > 30
    else:
        assert all(f"layer.{i}<" in svg for i in range(count))
        angles = re.findall(r"translate\(([\d.]+) \d+\)( rotate\(-60\))?", svg)
        gap = (float(angles[-1][0]) - float(angles[0][0])) / max(1, count - 1)
        assert gap > (11 if angles[0][1] else 6 * 9) or count == 1
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0])
    assert all(float(y) < height for y in re.findall(r' y="([\d.]+)"', svg))


def test_bars_of_a_histogram() -> None:
    svg = histogram([0, 4, 2, 1], -3.0, 1.0, "cost")
    heights = [-float(v) for v in re.findall(r"v(-[\d.]+)h", svg)]
    grid = gridlines(svg)
    whole, half = grid["0"] - grid["4"], grid["0"] - grid["2"]
    assert heights == pytest.approx([whole, half, half / 2], abs=0.11)
    assert "10⁻²" in svg and ">4<" in svg and ">2<" in svg
    narrow = histogram([1], -0.2, 0.3, "cost")
    assert ">0.71<" in narrow and "10" not in re.sub(r'".*?"', "", narrow)


def test_dots_of_an_order() -> None:
    svg = order_map((2, 0, 1), 3)
    dots = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h0", svg)]
    (x2, y2), (x0, y0), (x1, y1) = dots
    assert x0 < x1 < x2 and y2 < y0 < y1  # the first one on top
    assert order_map((0,), 1).count("h0") == 1


@pytest.mark.parametrize(
    "function, value, text",
    [
        (quantity, 0.00123, "1.23e-3"), (quantity, 0.0804, "8.04e-2"), (quantity, 0.5, "0.5"),
        (quantity, 12.34, "12.3"), (quantity, 54321.0, "5.43e4"), (quantity, 0.0, "0"),
        (quantity, math.inf, "inf"), (ratio, None, "–"), (ratio, 0.1491, "0.149"),
        (ratio, 12.34, "12.3"), (size, 999.0, "999 B"), (size, 999.9, "1 kB"),
        (size, 2.36e6, "2.36 MB"), (size, 3.2e10, "32 GB"), (span, 1.234, "1.23 s"),
        (span, 59.94, "59.9 s"), (span, 90.0, "1.5 min"), (span, 7200.0, "2.0 h"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(function: object, value: float, text: str) -> None:
    assert callable(function) and function(value) == text


def test_a_value_that_is_missing_sorts_last() -> None:
    html = table(("a",), [((Cell("–", math.nan),), ()), ((Cell("2", 2.0),), ())])
    assert re.findall(r'data-v="(.*?)"', html) == ["Infinity", "2.0"]


def test_the_same_report_gives_the_same_page() -> None:
    again: Report = Report.from_json(real_report().to_json())
    assert report_page(again) == PAGES["real"]
