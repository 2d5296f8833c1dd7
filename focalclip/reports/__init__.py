"""What people read: pages, tables and submissions of a result, one function that writes each, published numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.base.errors import UserError, require
from focalclip.base.files import user_path, write_text

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

FORMATS = (".json", ".html", ".csv", ".md", ".tex", ".zip")


def check_format(path: str | Path) -> Path:
    """The path, before the work rather than after it.

    Raises:
        UserError: if nothing is written in the format that its ending names, or what writes it is not installed.
    """
    path = user_path(path)
    if path.suffix == ".html":
        require(f"the page {path}", "eval", "jinja2")
    if path.suffix not in FORMATS:
        raise UserError(f"--report {path}: the ending must be one of {', '.join(FORMATS)}, which names the format")
    return path


def write_report(result: "Result", path: str | Path) -> Path:
    """Write a result as JSON, page, CSV, Markdown, LaTeX, or ELEVATER submission (``.zip``), by the file's ending.

    Raises:
        UserError: if the ending is not one of these, only a part of the images was evaluated, or a submission lacks
            what the server needs.
    """
    path = check_format(path)
    if path.suffix == ".json":
        return result.write(path)
    if path.suffix == ".zip":
        from focalclip.reports.submission import write_submission

        return write_submission(result, path)
    if result.is_partial:
        raise UserError(f"{path}: only a part of the images was evaluated (--max-images), which is no result to report")
    return write_text(path, _text_format(path.suffix)(result))


def _text_format(suffix: str) -> Callable[["Result"], str]:
    if suffix == ".html":
        from focalclip.reports.page import html_page  # jinja2 is an optional dependency

        return html_page
    from focalclip.reports.tables import csv_table, latex_table, markdown_table

    return {".csv": csv_table, ".md": markdown_table, ".tex": latex_table}[suffix]
