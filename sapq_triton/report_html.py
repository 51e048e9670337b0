"""A report as one HTML file that needs nothing else: no network, and no script.

With JavaScript its table can be sorted. Light or dark is up to the reader's system.
"""

import math
from collections.abc import Iterator, Mapping

from . import charts, page
from .charts import NAMELESS, Place, shown
from .page import Cell
from .report import LayerReport, Report

ERROR = "relative error of the layer, tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ)"
CHOSEN = "chosen for each layer"


def report_page(report: Report) -> str:
    model = str(report.options.get("model", ""))
    title = f"Quantization of {model}" if model else "Quantization"
    return page.document(title, _body(title, report))


def _body(title: str, report: Report) -> Iterator[str]:
    yield f"<header><h1>{shown(title)}</h1><p class=about>{shown(_subtitle(report))}</p></header>"
    yield page.tiles(_headline(report))
    if report.layers:
        yield "<h2>Error by layer</h2>"
        yield (
            "<p class=about>On the calibration rows, against the same weight rounded to nearest on "
            "the grid that the same spec finds. Lower is better; a click leads to the layer.</p>"
        )
        chart = charts.by_layer([_place(i, x) for i, x in enumerate(report.layers)], ERROR)
        key = page.legend(f"order: {_orders(report)}", "rounded to nearest")
        yield f'<div class="card">{key}<div class="wide chart">{chart}</div></div>'
        yield "<h2>Layers</h2>"
        noted = sum(bool(x.remarks) for x in report.layers)
        yield f"<p class=about>In the order of execution; {noted} with notes.</p>"
        yield f'<div class="card">{_table(report)}</div>'
        yield "<h2>Columns</h2>"
        yield (
            "<p class=about>What rounding each column of a layer costs, and when it was quantized: "
            "those that come first leave the others to make up for them.</p>"
        )
        yield '<div class="card">'
        yield from (_details(i, x) for i, x in enumerate(report.layers))
        yield "</div>"
    if report.skipped:
        yield "<h2>Left as it was</h2>"
        cells = [((Cell(k), Cell(v)), ()) for k, v in report.skipped.items()]
        yield f'<div class="card">{page.table(("name", "reason"), cells)}</div>'
    if report.corrected:
        yield "<h2>Corrected</h2><p class=about>BatchNorm statistics and biases.</p>"
        rows = [((Cell(k), Cell(page.quantity(v), v)), ()) for k, v in report.corrected.items()]
        inside = page.table(("name", "largest shift"), rows)
        yield (
            f'<div class="card"><details><summary><span class="grow">{len(rows)} shifted</span>'
            f"</summary>{inside}</details></div>"
        )
    yield "<h2>Time and memory</h2>"
    yield f'<div class="card">{_stages(report)}</div>'
    yield '<div class="two">'
    for name, entries in (("Environment", report.environment), ("Options", report.options)):
        if entries:
            inside = page.definitions(flat(entries))
            yield f'<section><h2>{name}</h2><div class="card">{inside}</div></section>'
    yield "</div>"
    version = report.environment.get("sapq-triton", "")
    yield f"<footer>{shown(f'sapq-triton {version}'.strip())}</footer>"


def _subtitle(report: Report) -> str:
    parts = []
    if report.layers:
        widths = sorted({x.spec.bits for x in report.layers})
        parts.append(f"{' / '.join(map(str, widths))} bits")
        parts.append(f"order: {_orders(report)}")
    if preset := report.options.get("preset"):
        parts.append(f"preset {preset}")
    if name := report.environment.get("device name"):
        parts.append(name)
    return " · ".join(parts)


def _orders(report: Report) -> str:
    return ", ".join(dict.fromkeys(x.order for x in report.layers))


def _headline(report: Report) -> Iterator[tuple[str, str, str]]:
    layers = report.layers
    weights = sum(x.weights for x in layers)
    left = len(report.skipped)
    yield "layers quantized", str(len(layers)), f"{left} left as they were" if left else "all"
    if layers:
        nearest = sum(x.nearest_relative_error for x in layers) / len(layers)
        told = f"mean of layers; rounded to nearest {page.quantity(nearest)}"
        yield "relative error", page.quantity(report.relative_error), told
        less = sum(x.error < x.nearest_error for x in layers)
        told = f"geometric mean; {less} of {len(layers)} layers below 1"
        yield "error vs. nearest", f"× {page.ratio(report.nearest_ratio)}", told
        yield (
            "bits of a weight", f"{report.mean_bits:.3g}",
            f"{8 * report.bytes / weights:.3g} with scales and zero points",
        )  # fmt: skip
        yield "packed size", page.size(report.bytes), f"as float16 {page.size(2 * weights)}"
    solving = report.stages.get("solves")
    told = "" if solving is None else f"{page.span(solving)} of it solves"
    yield "time", page.span(report.seconds), told
    if report.memory:
        where, peak = list(report.memory.items())[-1]
        yield "peak memory", page.size(peak), f"of the {where}"


def _place(number: int, layer: LayerReport) -> Place:
    ours, nearest = layer.relative_error, layer.nearest_relative_error
    hint = (
        f"{number + 1}. {layer.name}\n{page.quantity(ours)}, rounded to nearest "
        f"{page.quantity(nearest)}"
    )
    return Place(layer.name, ours, nearest, _anchor(number), hint)


def _anchor(number: int) -> str:
    return f"layer-{number + 1}"


HEADS = (
    "#", "layer", "kind", "weight", "bits", "group", "relative error", "rounded to nearest",
    "ratio", "damping", "drift corr.", "rows", "dead cols.", "fall-backs", "size", "Hessian (s)",
    "solve (s)",
)  # fmt: skip


def _table(report: Report) -> str:
    rows = []
    for number, x in enumerate(report.layers):
        none = math.nan if x.nearest_ratio is None else x.nearest_ratio
        cells = (
            Cell(str(number + 1), number + 1),
            Cell(x.name or NAMELESS, link=_anchor(number)),
            Cell(x.kind),
            Cell("×".join(map(str, x.shape)), x.weights),
            Cell(str(x.spec.bits), x.spec.bits),
            Cell(_group(x), x.spec.columns_per_group(x.matrix[2])),
            Cell(page.quantity(x.relative_error), x.relative_error),
            Cell(page.quantity(x.nearest_relative_error), x.nearest_relative_error),
            Cell(page.ratio(x.nearest_ratio), none),
            Cell(f"{x.damp:g}", x.damp),
            Cell(f"{x.drift_correction:.2f}", x.drift_correction),
            Cell(f"{x.rows:,}", x.rows),
            Cell(str(x.dead_columns), x.dead_columns),
            Cell(str(x.fallbacks), x.fallbacks),
            Cell(page.size(x.bytes), x.bytes),
            Cell(f"{x.seconds_hessian:.3f}", x.seconds_hessian),
            Cell(f"{x.seconds_solve:.3f}", x.seconds_solve),
        )
        rows.append((cells, x.remarks))
    return page.table(HEADS, rows, name=1)


def _group(layer: LayerReport) -> str:
    return "row" if layer.spec.group_size == -1 else str(layer.spec.group_size)


def _details(number: int, x: LayerReport) -> str:
    columns, (groups, rows, count) = x.columns, x.matrix
    unit = "Σ (w − Q(w))² / A" if columns.compensated else "Σ (w − Q(w))² H"
    what = "cost once the others make up for it" if columns.compensated else "cost by itself"
    free = f"; {columns.free} cost nothing" if columns.free else ""
    first = f", first of {groups} groups" if groups > 1 else ""
    facts = {
        "problem": f"{groups} × " * (groups > 1) + f"{rows} rows, {count} columns",
        "grid": _grid(x),
        "error": f"{page.quantity(x.error)} of {page.quantity(x.energy)}",
        "rounded to nearest": page.quantity(x.nearest_error),
        "calibration rows": f"{x.rows:,}",
        "damping": f"{x.damp:g}",
        "drift correction": f"{x.drift_correction:.3g}",
        "columns that never fired": str(x.dead_columns),
        "fall-backs": f"{x.fallbacks} of {groups}",
        "zeros": f"{x.sparsity:.1%}",
        "packed": page.size(x.bytes),
        "Hessian": page.span(x.seconds_hessian),
        "solve": page.span(x.seconds_solve),
    }
    histogram = charts.histogram(columns.counts, columns.low, columns.high, f"{unit}: {what}")
    order = "<p class=about>Each row has an order of its own.</p>"
    if columns.order:
        order = charts.order_map(columns.order, columns.columns)
    against = "" if x.nearest_ratio is None else f" · × {page.ratio(x.nearest_ratio)}"
    return (
        f'<details><summary><span class="soft">{number + 1}</span>'
        f'<span class="grow"><bdi>{shown(x.name or NAMELESS)}</bdi></span>'
        f'<span class="soft">{shown("×".join(map(str, x.shape)))} · {x.spec.bits} bits · '
        f"{page.quantity(x.relative_error)}{against}</span></summary>"
        f'<div class="layer" id="{_anchor(number)}">'
        f'<div class="small"><h3>Sensitivity of the columns{shown(free)}</h3>{histogram}</div>'
        f'<div class="small"><h3>Order of the columns{first}</h3>{order}</div>'
        f"<div>{page.definitions(facts)}</div></div></details>"
    )


def _grid(layer: LayerReport) -> str:
    spec = layer.spec
    parts = [
        f"{spec.bits} bits" if spec.codebook == "int" else spec.codebook,
        "symmetric" if spec.symmetric else "asymmetric",
        "a scale per row" if spec.group_size == -1 else f"groups of {spec.group_size}",
        f"{spec.scale_dtype} scales by {spec.scale_search}",
    ]
    if spec.sparsity is not None:
        parts.append(f"sparsity {spec.sparsity}")
    return ", ".join(parts)


def _stages(report: Report) -> str:
    if not report.stages:
        return f"<p>{page.span(report.seconds)}</p>"
    rest = report.seconds - sum(report.stages.values())
    stages = {**report.stages, "all else": max(0.0, rest)}
    text = {
        name: f"{page.span(value)}, {value / report.seconds:.0%}" if report.seconds else ""
        for name, value in stages.items()
    }
    memory = {f"peak memory of the {where}": page.size(n) for where, n in report.memory.items()}
    return f"{page.bars(stages, text)}<p></p>{page.definitions(memory)}"


def flat(entries: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested options as lines of text, by dotted name."""
    found: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _option(name, value)
    return found


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return CHOSEN if name in ("damp", "drift_correction") else "none"
    return str(value)
