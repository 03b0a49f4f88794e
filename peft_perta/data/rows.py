"""JSON-lines files, and the kinds of row that they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_files import parse_json

ROW_KINDS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
TEMPLATE_KEYS = ("tools", "chat_template_kwargs")  # further keys of a row, for its chat template, as in TRL


def read_rows(path: str | Path) -> list[dict]:
    """Read the rows of a JSON-lines file.

    Raises:
        DataError: the file is missing or empty, or a line is not a JSON object. The message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a JSON-lines file at {path}, found none; check the path")
    rows = []
    try:
        # splitlines would also split at characters that are legal inside a JSON string (U+2028, U+0085).
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected one JSON object per line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object per line")
    return rows


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
    raise DataError(f"{where}: expected {kinds}, found the keys {sorted(map(str, row))}")
