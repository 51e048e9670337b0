"""Charts as SVG, drawn from numbers. They take their colours from the style sheet of the page.

Every text is escaped here. Of the classes `a` and `b` are the two series.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NAMED_LAYERS = 48  # of an axis that still has room for their names
NAMELESS = "(the model itself)"  # a layer that is not inside another module
LONGEST_NAME = 30  # characters; the end of a name tells more than its beginning
WIDTH = 1080


class Place(NamedTuple):
    """One position of a chart by layers: a value of each of two series, None where there is none.

    link: the fragment that a click goes to. hint: shown when pointed at.
    """

    name: str
    a: float | None
    b: float | None
    link: str
    hint: str


def printable(text: str) -> str:
    """Control characters, line breaks and halves of surrogates as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """Any text, for HTML."""
    return escape(printable(text))


def power(exponent: int) -> str:
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def by_layer(places: Sequence[Place], what: str) -> str:
    """Two series over layers, on a logarithmic axis: dots, with a line between those of a layer.

    what: the label of the vertical axis. Values of 0 or less have no logarithm: they lie below the
    axis, in a lane of their own.
    """
    logs = [math.log10(v) for place in places for v in (place.a, place.b) if v and _usable(v)]
    low = math.floor(min(logs, default=-1))
    high = max(math.ceil(max(logs, default=0)), low + 1)
    lane = 22 if any(v is not None and v <= 0 for p in places for v in (p.a, p.b)) else 0
    named = len(places) <= NAMED_LAYERS
    names = [_shortened(place.name) for place in places] if named else []
    longest = 6.6 * max(map(len, names), default=0)  # in units of the drawing
    left, top, right = 56, 34, WIDTH - 14
    level = longest * len(places) < right - left  # the names of few layers fit side by side
    if not level:
        left = max(left, round(longest / 2))  # they slant by 60 degrees
    bottom = top + 250
    step = (right - left) / max(1, len(places))
    below = 44 if not named else 28 if level else 22 + round(0.8 * longest)

    def y(value: float) -> float:
        if value <= 0:
            return bottom + lane - 8
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    parts = [f'<text class="label" x="0" y="14">{shown(what)}</text>']
    parts += _log_axis(low, high, left, right, y)
    if lane:
        parts.append(f'<text class="tick end" x="{left - 8}" y="{bottom + lane - 4}">0</text>')
    radius = max(1.2, min(4.5, step * 0.34))
    for number, place in enumerate(places):
        x = left + (number + 0.5) * step
        marks = [f'<rect class="hit" x="{x - step / 2:.1f}" y="{top}" width="{step:.2f}" '
                 f'height="{bottom - top + lane}"/>']  # fmt: skip
        ends = [y(v) for v in (place.a, place.b) if v is not None and math.isfinite(v)]
        if len(ends) == 2:
            marks.append(f'<path class="between" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        for series, value in (("b", place.b), ("a", place.a)):
            if value is not None and math.isfinite(value):
                marks.append(
                    f'<circle class="{series}" cx="{x:.1f}" cy="{y(value):.1f}" r="{radius:.1f}" '
                    f'stroke-width="{min(1.6, radius / 2):.1f}"/>'
                )
        parts.append(
            f'<a href="#{escape(place.link)}"><title>{shown(place.hint)}</title>'
            f"{''.join(marks)}</a>"
        )
    floor = bottom + lane
    parts.append(f'<path class="axis" d="M{left} {floor}H{right}"/>')
    for number, name in enumerate(names):
        x, at = left + (number + 0.5) * step, floor + 12
        where = f'mid" transform="translate({x:.1f} {at + 6})"'
        if not level:
            where = f'end" transform="translate({x + 3:.1f} {at}) rotate(-60)"'
        parts.append(f'<text class="tick {where}>{shown(name)}</text>')
    if not named:
        every = _round_step(len(places) / 12)
        for number in (0, *range(every - 1, len(places), every)):
            x = left + (number + 0.5) * step
            parts.append(f'<text class="tick mid" x="{x:.1f}" y="{floor + 18}">{number + 1}</text>')
        middle = (left + right) / 2
        parts.append(
            f'<text class="label mid" x="{middle}" y="{floor + 38}">'
            "layer, in the order of execution</text>"
        )
    return _svg(WIDTH, floor + below, what, parts)


def _log_axis(low: int, high: int, left: int, right: int, y: Callable[[float], float]) -> list[str]:
    """Lines and labels of decades; where there are few, of their parts as well."""
    parts = []
    for exponent in range(low, high + 1):
        for factor in range(1, 10) if exponent < high and high - low <= 3 else (1,):
            at = y(factor * 10.0**exponent)
            kind = "grid" if factor == 1 else "grid faint"
            parts.append(f'<path class="{kind}" d="M{left} {at:.1f}H{right}"/>')
            label = power(exponent) if factor == 1 else ""
            if factor in (2, 5) and high - low == 1:
                label = f"{factor}·{power(exponent)}"
            if label:
                parts.append(
                    f'<text class="tick end" x="{left - 8}" y="{at + 4:.1f}">{label}</text>'
                )
    return parts


SMALL_WIDTH, SMALL_HEIGHT = 380, 214


def histogram(counts: Sequence[int], low: float, high: float, what: str) -> str:
    """Counts in equal bins of log10 from low to high."""
    left, right, top, bottom = 44, SMALL_WIDTH - 10, 24, SMALL_HEIGHT - 42
    width = (right - left) / max(1, len(counts))
    most = max(counts, default=0) or 1
    parts = ['<text class="label" x="0" y="12">columns</text>']
    for mark in dict.fromkeys((0, most // 2, most)):
        at = bottom - mark / most * (bottom - top)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{at + 4:.1f}">{mark}</text>')
    bars = "".join(
        f"M{left + i * width:.1f} {bottom}v{-count / most * (bottom - top):.1f}"
        f"h{width * 0.86:.1f}V{bottom}z"
        for i, count in enumerate(counts)
        if count
    )
    parts.append(f'<path class="a" d="{bars}"/><path class="axis" d="M{left} {bottom}H{right}"/>')
    for value, text in _log_ticks(low, high):
        x = left + (value - low) / (high - low) * (right - left)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17}">{text}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label mid" x="{middle}" y="{SMALL_HEIGHT - 6}">{shown(what)}</text>'
    )
    return _svg(SMALL_WIDTH, SMALL_HEIGHT, f"histogram: {what}", parts)


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Whole powers of ten; where the range holds fewer than two, two- or three-digit numbers."""
    every = max(1, math.ceil((high - low) / 6))
    found = [float(e) for e in range(math.ceil(low), math.floor(high) + 1) if e % every == 0]
    if len(found) >= 2:
        return [(e, power(int(e))) for e in found]
    inner = [low + (high - low) * part for part in (0.1, 0.5, 0.9)]
    return [(value, f"{10**value:.2g}" if -3 <= value < 4 else _scientific(10**value))
            for value in inner]  # fmt: skip


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·{power(int(exponent))}"


def order_map(order: Sequence[int], columns: int) -> str:
    """Which column was quantized when: a dot for each, the first one on top.

    order: columns in the order of their quantization, evenly thinned.
    """
    left, right, top, bottom = 44, SMALL_WIDTH - 10, 24, SMALL_HEIGHT - 42
    across, down = max(1, columns - 1), max(1, len(order) - 1)
    dots = "".join(
        f"M{left + 4 + column / across * (right - left - 8):.0f} "
        f"{top + 4 + step / down * (bottom - top - 8):.0f}h0"
        for step, column in enumerate(order)
    )
    size = 5 if len(order) <= 64 else 3 if len(order) <= 256 else 2.4
    middle = (left + right) / 2
    parts = [
        '<text class="label" x="0" y="12">quantized</text>',
        f'<text class="tick end" x="{left - 6}" y="{top + 10}">first</text>',
        f'<text class="tick end" x="{left - 6}" y="{bottom}">last</text>',
        f'<path class="frame" d="M{left} {top}H{right}V{bottom}H{left}z"/>',
        f'<path class="dots" stroke-width="{size}" d="{dots}"/>',
        f'<text class="tick" x="{left}" y="{bottom + 17}">0</text>',
        f'<text class="tick end" x="{right}" y="{bottom + 17}">{columns - 1}</text>',
        f'<text class="label mid" x="{middle}" y="{SMALL_HEIGHT - 6}">column of the weight</text>',
    ]
    return _svg(SMALL_WIDTH, SMALL_HEIGHT, "order of the columns", parts)


def _svg(width: float, height: float, what: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{shown(what)}">'
        f"{''.join(parts)}</svg>"
    )


def _usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _shortened(name: str) -> str:
    text = printable(name) or NAMELESS
    return text if len(text) <= LONGEST_NAME else f"…{text[-LONGEST_NAME + 1 :]}"


def _round_step(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, ... that is not smaller."""
    step = 10 ** math.floor(math.log10(max(1.0, least)))
    return next(step * factor for factor in (1, 2, 5, 10) if step * factor >= least)
