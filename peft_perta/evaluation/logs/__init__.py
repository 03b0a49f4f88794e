"""Evaluation logs in open-unlearning's layout: read, written, and their aggregates recomputed from the rows."""

from .files import Log, format_rescored, read_log, summary, write_log
from .rescoring import aggregate, check_retain_only, rescore, row_texts, row_values

__all__ = [
    "Log",
    "aggregate",
    "check_retain_only",
    "format_rescored",
    "read_log",
    "rescore",
    "row_texts",
    "row_values",
    "summary",
    "write_log",
]
