"""Pages of reports in a real browser: what is drawn, where, and what the script does.

Chromium or Chrome without a window; `apt install chromium`.
"""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sapq_triton import compare
from sapq_triton.report_html import report_page
from tests.reports import EMPTY, of_layers, real_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome found")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip
WEIRD = ["<script>document.title = 'owned'</script>", "höhe.重み", "x" * 400]


def browse(text: str, folder: Path, *flags: str) -> str:
    page = folder / "page.html"
    page.write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *FLAGS, profile, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Probe(HTMLParser):
    """What a script left in an attribute of the body."""

    found: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.found = dict(attrs).get("data-probe")


def probe(text: str, script: str, folder: Path, width: int = 1280) -> Any:
    """The value of a script after that of the page, of the document as the browser has it then."""
    added = f"<script>document.body.dataset.probe = JSON.stringify((() => {{{script}}})())</script>"
    dumped = browse(
        text.replace("</body>", f"{added}</body>"),
        folder,
        "--dump-dom",
        f"--window-size={width},900",
    )
    parser = Probe()
    parser.feed(dumped)
    assert parser.found is not None, dumped[:1000]
    return json.loads(parser.found)


# boxes of texts that lie on one another, and elements that stick out of the page to the right
LAID_OUT = """
  for (const each of document.querySelectorAll("details")) each.open = true;
  const clash = [];
  for (const svg of document.querySelectorAll("svg")) {
    const level = [...svg.querySelectorAll("text:not([transform*=rotate])")];
    const boxes = level.map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
        clash.push([name, other]);
    }));
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
        clash.push([text.textContent, "the frame"]);
    }
  }
  for (const tile of document.querySelectorAll(".tile"))
    if (tile.scrollWidth > tile.clientWidth) clash.push([tile.textContent, "its tile"]);
  const out = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return {clash, out, title: document.title, dots: document.querySelectorAll("circle.a").length,
    svgs: document.querySelectorAll("svg").length};
"""


def test_nothing_overlaps_and_nothing_sticks_out(tmp_path: Path) -> None:
    for name, text, width, dots in (
        ("small", report_page(real_report()), 1280, 3),
        ("narrow", report_page(of_layers(14)), 420, 14),
        ("large", report_page(of_layers(200)), 1280, 200),
        ("weird", report_page(of_layers(3, WEIRD)), 1024, 3),
    ):
        found = probe(text, LAID_OUT, tmp_path, width)
        assert found["clash"] == [] and found["out"] <= 0, (name, found)
        assert (found["dots"], found["svgs"]) == (dots, 1 + 2 * dots), name
        assert found["title"] == "Quantization of Sequential", name


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 800, 1280, 1900])
def test_other_pages_lie_well(tmp_path: Path, width: int) -> None:
    for text in (
        report_page(EMPTY), report_page(of_layers(1)), report_page(of_layers(48)),
        report_page(of_layers(49)), compare(EMPTY, EMPTY).page(),
        compare(of_layers(20), of_layers(30), ("runs/a", "y" * 300)).page(),
        compare(of_layers(3, WEIRD), of_layers(3, WEIRD[::-1]), (WEIRD[0], WEIRD[2])).page(),
    ):  # fmt: skip
        found = probe(text, LAID_OUT, tmp_path, width)
        assert found["clash"] == [] and found["out"] <= 0, found


SORT = """
  const table = document.querySelector("table.sortable"), seen = {};
  const column = i => [...table.tBodies].map(body => body.rows[0].cells[i].textContent);
  const button = i => table.tHead.rows[0].cells[i].querySelector("button");
  seen.before = column(0);
  button(8).click();
  seen.up = column(8);
  seen.sorted = table.tHead.rows[0].cells[8].ariaSort;
  button(8).click();
  seen.down = column(8);
  button(6).click();
  seen.errors = column(6);
  button(1).click();
  seen.names = column(1);
  seen.marked = [...table.tHead.rows[0].cells].filter(head => head.ariaSort).length;
  seen.notes = [...table.tBodies].filter(body => body.rows.length > 1).map(
    body => body.rows[0].cells[12].textContent);
  location.hash = "#layer-2";
  seen.opened = [...document.querySelectorAll("details")].map(each => each.open);
  return seen;
"""


def test_the_script_sorts(tmp_path: Path) -> None:
    report = of_layers(12)
    seen = probe(report_page(report), SORT, tmp_path)
    assert seen["before"] == [str(number + 1) for number in range(12)]
    ratios = [float(text) for text in seen["up"]]
    assert ratios == sorted(ratios) and len(set(ratios)) > 5 and seen["sorted"] == "ascending"
    errors = [float(text) for text in seen["errors"]]
    assert errors == sorted(errors) and errors[0] < 2e-4 < 5e-3 < errors[-1]
    assert seen["down"] == seen["up"][::-1]
    assert seen["names"] == [
        f"model.layers.{n}.mlp.down_proj" for n in range(12)
    ]  # as people count
    assert seen["marked"] == 1
    dead = [x.dead_columns for x in report.layers if x.remarks]
    assert seen["notes"] == [str(n) for n in dead]  # notes have moved with their rows
    assert seen["opened"][:3] == [False, True, False]  # a link opens what it leads to


def picture(text: str, folder: Path, *flags: str) -> Any:
    from PIL import Image

    path = folder / "page.png"
    browse(text, folder, f"--screenshot={path}", "--window-size=1280,2600", *flags)
    return Image.open(path).convert("RGB")


REGIONS = """
  const boxes = {};
  for (const [name, selector] of Object.entries({head: "header", tiles: ".tiles", chart: ".chart",
      table: "table", histogram: "details svg", order: ".small + .small svg", bars: ".bars"})) {
    document.querySelector("details").open = true;
    const box = document.querySelector(selector).getBoundingClientRect();
    boxes[name] = [box.left, box.top, box.right, box.bottom].map(Math.round);
  }
  return boxes;
"""


def test_a_picture_of_it(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    text = report_page(real_report())
    regions = probe(text, REGIONS, tmp_path)
    text = text.replace("<details><summary>", "<details open><summary>", 1)
    light = picture(text, tmp_path)
    dark = picture(text, tmp_path, "--blink-settings=preferredColorScheme=0")
    for image, paper, ours in ((light, (247, 247, 245), (11, 113, 137)),
                               (dark, (17, 21, 26), (79, 196, 218))):  # fmt: skip
        assert image.size == (1280, 2600) and image.getpixel((2, 2)) == paper
        for name, box in regions.items():
            assert box[3] <= 2600, name
            part = image.crop(box)
            colours = part.getcolors(part.width * part.height)
            assert len(colours) > 20, name  # letters and lines have soft edges
            background = max(colours)[0] / (part.width * part.height)
            assert 0.3 < background < 0.995, (name, background)
            if name in ("chart", "histogram", "order", "bars"):
                drawn = sum(count for count, colour in colours if colour == ours)
                assert drawn > 60, (name, drawn)
