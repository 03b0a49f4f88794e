"""Sets of rows in every form that people have them in, and the kinds of row that they may hold."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ._layouts import known_layout
from ._row_sets import is_hub_name, read_directory, read_file, read_hub
from .notes import note
from .row_source import RowSource

ROW_KINDS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
TEMPLATE_KEYS = ("tools", "chat_template_kwargs")  # further keys of a row, for its chat template, as in TRL


def read_rows(source: str | Path) -> list[dict]:
    """Read a set of rows.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet, .txt or .md, each also .gz; of another name: JSON lines), a
            directory (of such files, or as ``datasets`` saves one), or ``ORG/NAME`` on the Hugging Face Hub. After it
            may stand ``:CONFIG``, ``[SPLIT]`` as ``datasets`` writes it (``[train[:20]]``), and
            ``?question=prompt,answer=response``, which renames columns: ours = theirs. ``default`` names the
            general rows that ship.

    Raises:
        DataError: there is nothing of that name, it holds no rows, is damaged or of another format than its name says,
            or lacks a column. The message names the line or the row.
    """
    named = RowSource.of(str(source))
    if os.path.isdir(named.place):
        rows = read_directory(named)
    elif os.path.exists(named.place):
        rows = read_file(named)
    elif is_hub_name(named.place):
        rows = read_hub(named)
    else:
        raise DataError(
            f"expected rows at {source}, found none; check the path, or name a data set on the Hugging Face Hub as "
            "ORG/NAME:CONFIG[SPLIT]"
        )
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one")
    rows = _renamed(rows, named)
    known = known_layout(rows)
    if known is None:
        return rows
    layout, rows = known
    note(f"{named.place}: rows as {layout.name} has them; {layout.read}")
    return rows


def _renamed(rows: list[dict], source: RowSource) -> list[dict]:
    """The rows under our names of their columns."""
    if not source.columns:
        return rows
    found = sorted({str(key) for row in rows for key in row})
    for theirs in source.columns.values():
        if theirs not in found:
            nearest = difflib.get_close_matches(theirs, found, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise DataError(
                f"{source.place}: expected the column {theirs!r}, found none; {hint}there are {', '.join(found)}"
            )
    taken = {*source.columns.values()}
    return [
        {key: value for key, value in row.items() if key not in taken}
        | {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
        for row in rows
    ]


def spread(rows: list[Any], count: int) -> list[Any]:
    """Pick ``count`` rows, evenly spaced from the first to the last; all rows if there are no more than that."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]


def completion_text(row: Mapping) -> str:
    """The row's completion as plain text."""
    kind = row_kind(row, "row")
    value = row[kind[-1]]
    return value if isinstance(value, str) else content_text(value[-1].get("content")) or ""


def prompt_text(row: Mapping) -> str:
    """What the row asks, as plain text: the question, the prompt, or the last turn before the answer; '' for a text."""
    kind = row_kind(row, "row")
    if kind == ("text",):
        return ""
    value = row[kind[0]]
    if isinstance(value, str):
        return value
    turns = value[:-1] if kind == ("messages",) else value
    return (content_text(turns[-1].get("content")) or "") if turns else ""


def content_text(content: Any) -> str | None:
    """The text of a turn's content, which is a text or a list of text parts; None if it is neither."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if _is_text_part(part)] if isinstance(content, list) else []
    return "".join(map(str, texts)) if texts and len(texts) == len(content) else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def row_kind(row: Mapping, where: str) -> tuple[str, ...]:
    """The first entry of ``ROW_KINDS`` whose keys the row holds.

    Raises:
        DataError: the row is of no known kind.
    """
    for kind in ROW_KINDS:
        if all(row.get(key) is not None for key in kind):
            return kind
    kinds = " or ".join("/".join(kind) for kind in ROW_KINDS)
    raise DataError(
        f"{where}: expected {kinds}, found the keys {sorted(map(str, row))}; name the columns to read, such as "
        "--columns question=prompt,answer=response"
    )
