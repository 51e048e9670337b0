"""Figures of a study: layer errors against the loss of the model, and errors by type of layer."""

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.methods import METHODS, PARTS

Cells = dict[str, dict[str, Any]]
MAIN = ("RTN", "GPTQ order", "activation order", "SAPQ")


def draw(name: str, loss: str, cells: Cells, folder: Path) -> None:
    """Write study-NAME.png and study-NAME-layers.png; cells by name as in `study.Cell`."""
    folder.mkdir(parents=True, exist_ok=True)
    _errors(name, loss, cells, folder / f"study-{name}.png")
    _layers(name, cells, folder / f"study-{name}-layers.png")


def _aims(method: str) -> bool:
    """Whether layers aim at the outputs of the full-precision model."""
    options = (METHODS | PARTS)[method]
    by_default = options.get("preset") != "fast" and options.get("order") != "nearest"
    return options.get("drift_correction", 1.0 if by_default else 0.0) > 0


def _errors(name: str, loss: str, cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = sorted({key.split(" | ")[3] for key in cells})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, kind in zip(axes, ("local error", "total error"), strict=True):
        for number, method in enumerate(methods):
            chosen = [cell for key, cell in cells.items() if key.split(" | ")[3] == method]
            axis.scatter(
                [cell[kind] for cell in chosen],
                [cell[loss] for cell in chosen],
                label=method,
                marker="o" if _aims(method) else "x",
                color=pyplot.get_cmap("turbo")(number / len(methods)),
                s=26,
            )
        axis.set(xscale="log", yscale="log", xlabel=f"{kind}, mean over layers, held-out data")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(loss)
    axes[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{name}: circles aim at the outputs of the full-precision model")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _layers(name: str, cells: Cells, path: Path) -> None:
    """Mean total error of each type of layer, of the main methods at each number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({key.split(" | ")[0] for key in cells}, reverse=True)
    figure, axes = pyplot.subplots(1, len(widths), figsize=(4.5 * len(widths), 4), squeeze=False)
    for axis, width in zip(axes[0], widths, strict=True):
        by_type: dict[str, dict[str, list[float]]] = {}
        for key, cell in cells.items():
            bits, _, _, method, _ = key.split(" | ")
            if bits == width and method in MAIN:
                for kind, _, _, total in cell["layers"].values():
                    by_type.setdefault(kind, {}).setdefault(method, []).append(total)
        for place, method in enumerate(MAIN):
            heights = [mean(values.get(method, [0.0])) for values in by_type.values()]
            places = [number + 0.2 * place for number in range(len(by_type))]
            axis.bar(places, heights, 0.2, label=method)
        axis.set(title=width, yscale="log", ylabel="total error")
        axis.set_xticks([number + 0.3 for number in range(len(by_type))], [*by_type], rotation=30)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(name)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
