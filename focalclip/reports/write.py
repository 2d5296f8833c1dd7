"""One function that writes a result in the format that the file's ending names."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.base.errors import UserError
from focalclip.base.files import write_text
from focalclip.reports.page import html_page
from focalclip.reports.submission import write_submission
from focalclip.reports.tables import csv_table, latex_table, markdown_table

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

_TEXTS: dict[str, Callable[["Result"], str]] = {
    ".html": html_page,
    ".csv": csv_table,
    ".md": markdown_table,
    ".tex": latex_table,
}

FORMATS = (".json", *_TEXTS, ".zip")


def check_format(path: str | Path) -> Path:
    """The path, before the work rather than after it.

    Raises:
        UserError: if nothing is written in the format that its ending names.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"--report {path}: the ending must be one of {', '.join(FORMATS)}, which names the format")
    return path


def write_report(result: "Result", path: str | Path) -> Path:
    """Write a result as JSON, page, CSV, Markdown, LaTeX, or ELEVATER submission (``.zip``), by the file's ending.

    Raises:
        UserError: if the ending is none of these, or a submission lacks what the server needs.
    """
    path = check_format(path)
    if path.suffix == ".json":
        return result.write(path)
    if path.suffix == ".zip":
        return write_submission(result, path)
    return write_text(path, _TEXTS[path.suffix](result))
