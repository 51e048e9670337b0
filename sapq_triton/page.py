"""What pages are made of: style, script, tables, numbers as people read them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from .charts import shown

STYLE = """
:root { color-scheme: light dark;
  --paper: #f7f7f5; --card: #fff; --ink: #1b222c; --soft: #5d6876; --line: #e0e3e7;
  --a: #0b7189; --b: #c9702b; --note: #fdf1d7; --note-ink: #7a4d00; --row: #f2f5f7 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #11151a; --card: #191f26; --ink: #e4e8ed; --soft: #96a2b0; --line: #2d3641;
  --a: #4fc4da; --b: #eda15f; --note: #3a2e14; --note-ink: #f0c674; --row: #1f262e } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; margin: 0; letter-spacing: -.01em }
h2 { font-size: 19px; font-weight: 650; margin: 44px 0 4px }
p { margin: 4px 0 12px; max-width: 78ch } .soft, p.about { color: var(--soft) }
p.about { font-size: 14px } bdi { overflow-wrap: anywhere }
td bdi { overflow-wrap: break-word }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 12px 0 }
.wide { overflow-x: auto }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 26px 0 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px 13px }
.tile .name { font-size: 13px; color: var(--soft) }
.tile .value { font-size: 24px; font-weight: 650; letter-spacing: -.01em; white-space: nowrap }
.tile .more { font-size: 12.5px; color: var(--soft); line-height: 1.35 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13.5px; margin: 0 0 8px }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%;
  margin-right: 7px }
.legend .a { background: var(--a) } .legend .b { border: 2px solid var(--b) }
svg { display: block; width: 100%; height: auto; font-size: 12px; font-family: inherit }
.chart svg { min-width: 760px } .small svg { max-width: 420px }
svg text { fill: var(--ink) } svg .tick { fill: var(--soft); font-size: 11px }
svg .label { font-size: 12px; fill: var(--soft) }
svg .end { text-anchor: end } svg .mid { text-anchor: middle }
svg path { fill: none } svg .axis { stroke: var(--soft); stroke-width: 1 }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .faint { stroke-opacity: .5 }
svg .frame { stroke: var(--line) } svg path.a { fill: var(--a) }
svg .dots { stroke: var(--a); stroke-linecap: round }
svg circle.a { fill: var(--a) }
svg circle.b { fill: var(--card); stroke: var(--b) }
svg circle.a { stroke: var(--a) }
svg .between { stroke: var(--soft); stroke-opacity: .45; stroke-width: 1.2 }
svg .hit { fill: transparent } svg a:hover .hit { fill: var(--row) }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px;
  vertical-align: bottom; line-height: 1.25; border-bottom: 1px solid var(--line) }
th, td { padding: 5px 10px 5px 0 } th:last-child, td:last-child { padding-right: 0 }
td { border-top: 1px solid var(--line); vertical-align: top }
thead + tbody tr:first-child td { border-top: 0 }
.n { text-align: right; white-space: nowrap } th.n { white-space: normal }
td.name { min-width: 14em; max-width: 26em }
.s { white-space: nowrap }
td.note { border-top: 0; padding: 0 0 7px 24px } td.note span { display: inline-block;
  background: var(--note); color: var(--note-ink); border-radius: 5px; padding: 1px 8px;
  margin: 0 6px 3px 0; font-size: 12.5px; overflow-wrap: anywhere; max-width: 70em }
.sortable tbody:hover td { background: var(--row) }
th button { all: unset; cursor: pointer } th button:hover { color: var(--ink) }
th button:focus-visible { outline: 2px solid var(--a); outline-offset: 2px }
th[aria-sort] { color: var(--ink) } th[aria-sort="ascending"] button::after { content: " ▲" }
th[aria-sort="descending"] button::after { content: " ▼" }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px }
a:hover { text-decoration-color: currentColor }
details { border-top: 1px solid var(--line) } details:first-of-type { border-top: 0 }
summary { cursor: pointer; padding: 7px 0; display: flex; gap: 12px; align-items: baseline;
  list-style: none }
summary::-webkit-details-marker { display: none }
summary::before { content: "▸"; color: var(--soft) }
details[open] > summary::before { content: "▾" }
summary .grow { flex: 1; min-width: 0; font-weight: 550 } summary .soft { font-size: 13.5px;
  font-variant-numeric: tabular-nums; text-align: right }
.layer { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr));
  gap: 18px 28px; padding: 8px 0 20px; scroll-margin-top: 60px }
h3 { font-size: 13.5px; font-weight: 600; margin: 0 0 6px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0;
  font-size: 13.5px; font-variant-numeric: tabular-nums } dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 0 24px }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 16px;
  align-items: center; font-size: 13.5px; font-variant-numeric: tabular-nums }
.bars .track { background: var(--row); border-radius: 4px; height: 14px }
.bars .fill { background: var(--a); border-radius: 4px; height: 14px; min-width: 2px }
footer { margin-top: 44px; color: var(--soft); font-size: 13px }
@media (max-width: 640px) { main { padding: 22px 14px 40px } h1 { font-size: 24px }
  .card { padding: 14px } .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px }
  .tile .value { font-size: 21px } .two { display: block }
  .bars { grid-template-columns: 1fr max-content } .bars .track { grid-column: 1 / -1;
  grid-row: auto; order: 1; display: none } summary { flex-wrap: wrap; gap: 2px 10px }
  summary .grow { flex-basis: 80% } }
@media print { body { background: #fff } .card, .tile { break-inside: avoid } }
"""

# rows are sorted by data-v where a cell has it; each is a tbody, as notes belong to their row
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falls = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const key = body => {
        const cell = body.rows[0].cells[column];
        return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
      };
      const compare = (x, y) => typeof x === "number" && typeof y === "number"
        ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
      const bodies = [...table.tBodies].sort((x, y) => compare(key(x), key(y)));
      table.append(...(falls ? bodies.reverse() : bodies));
    });
  });
}
"""


def document(title: str, body: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: name, value, and a line below it."""
    made = [
        f'<div class="tile"><div class="name">{shown(name)}</div>'
        f'<div class="value">{shown(value)}</div><div class="more">{shown(more)}</div></div>'
        for name, value, more in entries
    ]
    return f'<div class="tiles">{"".join(made)}</div>'


def legend(a: str, b: str) -> str:
    return (
        f'<div class="legend"><span><i class="a"></i>{shown(a)}</span>'
        f'<span><i class="b"></i>{shown(b)}</span></div>'
    )


class Cell(NamedTuple):
    """text: what is shown. number: what it is sorted by, and that it is set as a number; NaN sorts
    last. link: the fragment that it leads to. anchor: the one that it is."""

    text: str
    number: float | None = None
    link: str = ""
    anchor: str = ""

    def html(self, name: bool) -> str:
        text = shown(self.text)
        if self.number is None:  # a line may break after the dots of a name
            text = f"<bdi>{text.replace('.', '.<wbr>')}</bdi>"
        if self.link:
            text = f'<a href="#{escape(self.link)}">{text}</a>'
        if self.number is None:
            return f'<td class="{"name" if name else "s"}">{text}</td>'
        value = "Infinity" if math.isnan(self.number) else repr(self.number)
        anchor = f' id="{escape(self.anchor)}"' if self.anchor else ""
        return f'<td class="n"{anchor} data-v="{value}">{text}</td>'


def table(
    heads: Sequence[str], rows: Iterable[tuple[Sequence[Cell], Sequence[str]]], name: int = 0
) -> str:
    """Sortable. rows: cells, and notes that are shown below them; name: the column of names."""
    made, numeric = [], set()
    for cells, notes in rows:
        numeric |= {i for i, cell in enumerate(cells) if cell.number is not None}
        row = "".join(cell.html(i == name) for i, cell in enumerate(cells))
        below = ""
        if notes:
            spans = "".join(f"<span>{shown(note)}</span>" for note in notes)
            below = f'<tr><td class="note" colspan="{len(heads)}">{spans}</td></tr>'
        made.append(f"<tbody><tr>{row}</tr>{below}</tbody>")
    top = "".join(
        f'<th scope="col"{" class=n" if i in numeric else ""}>{shown(head)}</th>'
        for i, head in enumerate(heads)
    )
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{top}</tr></thead>\n'
        + "\n".join(made)
        + "</table></div>"
    )


def definitions(entries: Mapping[str, str]) -> str:
    inside = "".join(f"<dt>{shown(k)}</dt><dd>{shown(v)}</dd>" for k, v in entries.items())
    return f"<dl>{inside}</dl>"


def bars(entries: Mapping[str, float], text: Mapping[str, str]) -> str:
    """A horizontal bar for each, the longest one over the whole width."""
    most = max(entries.values(), default=0.0) or 1.0
    inside = "".join(
        f"<div>{shown(name)}</div>"
        f'<div class="track"><div class="fill" style="width: {100 * value / most:.1f}%">'
        "</div></div>"
        f'<div class="n">{shown(text[name])}</div>'
        for name, value in entries.items()
    )
    return f'<div class="bars">{inside}</div>'


def quantity(value: float) -> str:
    """An error: three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 10 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
