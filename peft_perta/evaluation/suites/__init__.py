"""Benchmark suites, one file each: the rows that a suite asks, and the log that it writes.

To add a suite: a file with its ``SUITE``, a row in table.py, a row in tests/tables.py.
"""

from .record import RECORD_NAME, hash_stack
from .running import evaluate
from .suite import Splits, Suite, SuiteSettings
from .table import SUITES, forget_rows, read_suites

__all__ = [
    "RECORD_NAME",
    "SUITES",
    "Splits",
    "Suite",
    "SuiteSettings",
    "evaluate",
    "forget_rows",
    "hash_stack",
    "read_suites",
]
