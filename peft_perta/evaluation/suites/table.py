"""The suites table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import ConfigError
from . import choices, muse, rwku, tofu
from .suite import Splits, Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (tofu.SUITE, muse.SUITE, choices.SUITE, rwku.SUITE)}


def read_suites(paths: Mapping[str, str | Path], split: str | None = None) -> dict[str, Splits]:
    """Read the rows of each suite: suite -> split -> rows.

    Args:
        paths: suite -> the directory or file that holds its rows.
        split: the forget set, where a directory holds several ('forget10').

    Raises:
        ConfigError: no suite is given, or one is unknown.
        DataError: a file is missing or malformed.
    """
    if not paths:
        raise ConfigError(f"expected at least one suite to evaluate, found none; the suites are {sorted(SUITES)}")
    for name in paths:
        check_suite(name)
    return {name: SUITES[name].read(Path(path), split) for name, path in paths.items()}


def check_suite(name: str) -> None:
    """
    Raises:
        ConfigError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ConfigError(f"expected one of the suites {sorted(SUITES)}, found {name!r}")


def forget_rows(splits: Mapping[str, Splits]) -> list[dict]:
    """The forget rows of the first suite in the table's order that has any, each with a 'question'; [] without one.

    Args:
        splits: suite -> split -> rows, as ``read_suites`` gives them.
    """
    for name, suite in SUITES.items():
        rows = splits.get(name, {}).get(suite.forget_split or "")
        if rows:
            key = suite.question_key
            return [{"question": row[key], **row} if key in row else row for row in rows]
    return []
