"""The two files of a report: report.json for programs, report.html for people."""

import json
from pathlib import Path
from typing import Any, NoReturn

from .report import Report
from .report_html import report_page

REPORT_FILES = JSON, PAGE = "report.json", "report.html"


def report_files(report: Report) -> dict[str, str]:
    """The content of both files, by name."""
    return {JSON: as_text(report.to_json()), PAGE: report_page(report)}


def save_report(report: Report, folder: str | Path) -> None:
    """Write report.json and report.html into a folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in report_files(report).items():
        (folder / name).write_text(text, encoding="utf-8")


def read_report(path: str | Path) -> Report:
    """A report from its JSON file, or the folder of it; without codes and grids.

    ValueError for a file that is missing, damaged, or something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / JSON
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    try:
        return Report.from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for each layer."""

    def dump(value: object) -> str:
        return json.dumps(value, allow_nan=False)

    entries = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            inside = ",\n    ".join(map(dump, value))
            entries.append(f"{dump(key)}: [\n    {inside}\n  ]")
        else:
            entries.append(f"{dump(key)}: {dump(value)}")
    inside = ",\n  ".join(entries)
    return f"{{\n  {inside}\n}}\n"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
