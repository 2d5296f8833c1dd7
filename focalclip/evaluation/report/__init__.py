"""Results of an evaluation: as records, as JSON, as tables, as one page to read."""

from focalclip.evaluation.report.records import Result, TaskResult
from focalclip.evaluation.report.write import write_report

__all__ = ["Result", "TaskResult", "write_report"]
