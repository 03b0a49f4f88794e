"""What every suite is: files -> splits of rows -> a log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import completion_text, encode_prompt, read_rows
from ...errors import DataError
from ..generation import generate
from ..logs.files import Log
from ..metrics.rouge import rouge_scores
from ..subject import Subject

Splits = Mapping[str, list[dict]]


@dataclass(frozen=True)
class SuiteSettings:
    """How much of a suite is asked.

    Attributes:
        rows: at most so many of each split, at even distances; None for all of them.
        max_new_tokens: of each generation.
        retain-only: a model that never saw the forget rows, for the membership attack that needs one.
    """

    rows: int | None = None
    max_new_tokens: int = 200
    retain_only: Subject | None = None


@dataclass(frozen=True)
class Suite:
    """A row of the table.

    Attributes:
        file_name: of its log.
        read: (path, name of the forget split or None) -> split -> rows; every refusal is here, before any compute.
        evaluate: (subject, splits, settings) -> metric -> {value_by_index}; nothing is aggregated yet.
    """

    file_name: str
    read: Callable[[Path, str | None], Splits]
    evaluate: Callable[[Subject, Splits, SuiteSettings], Log]


def read_file(directory: Path, stem: str) -> list[dict] | None:
    """The rows of ``stem``.json or .jsonl, JSON lines or one JSON list; None where there is no such file.

    Raises:
        DataError: the file is damaged or empty.
    """
    for path in (directory / f"{stem}.json", directory / f"{stem}.jsonl"):
        if path.is_file():
            return read_list(path)
    return None


def read_list(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, or of one JSON list of objects or texts.

    Raises:
        DataError: it is neither.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return read_rows(path)
    if isinstance(whole, dict):
        return [whole]
    rows = [{"text": row} if isinstance(row, str) else row for row in whole] if isinstance(whole, list) else []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected JSON lines, or one JSON list, of objects; found {type(whole).__name__}")
    return rows


def required(rows: list[dict] | None, what: str) -> list[dict]:
    """The rows.

    Raises:
        DataError: there are none.
    """
    if rows is None:
        raise DataError(f"expected {what}, found none; check the path")
    return rows


def check_keys(rows: Sequence[Mapping], keys: Sequence[str], what: str) -> None:
    """Every row has these keys.

    Raises:
        DataError: one does not; the message names it.
    """
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if row.get(key) in (None, "", [])]
        if missing:
            raise DataError(f"{what}, row {number}: expected {missing[0]!r}, found the keys {sorted(map(str, row))}")


def check_texts(rows: Sequence[Mapping], keys: Sequence[str], what: str) -> None:
    """Every row has a text that is not blank under each of these keys.

    Raises:
        DataError: one does not; the message names it.
    """
    check_keys(rows, keys, what)
    for number, row in enumerate(rows, start=1):
        for key in keys:
            if not isinstance(row[key], str):
                raise DataError(f"{what}, row {number}: expected {key!r} as text, found a {type(row[key]).__name__}")
            if not row[key].strip():
                raise DataError(f"{what}, row {number}: expected {key!r} as text, found only blanks")


def rouge_of(
    subject: Subject,
    rows: Sequence[Mapping],
    settings: SuiteSettings,
    name: str,
    *,
    max_new_tokens: int | None = None,
    ends: Sequence[str] = (),
    prefixes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Greedy answers to the rows, and their ROUGE against the completions, row by row; an empty answer scores 0.

    Args:
        ends: texts at the first of which a generation is cut; blanks before the answer are no part of it.
        prefixes: text, a row, with which the answer begins: written for the model, and no part of what is scored.
    """
    started = [subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prefixes or ()]
    texts = generate(
        subject,
        rows,
        max_new_tokens=max_new_tokens or settings.max_new_tokens,
        prefixes=started or None,
        name=f"{name}: answers",
    )
    for end in ends:
        texts = [text.split(end)[0].strip() for text in texts]
    truths = [completion_text(row).strip() for row in rows]
    begun = started or [[] for _ in rows]
    asked = [encode_prompt(row, subject.tokenizer) + ids for row, ids in zip(rows, begun, strict=True)]
    prompts = [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in asked]
    told = zip(rouge_scores(texts, truths), prompts, truths, texts, strict=True)
    return by_index(
        {**scores, "input": prompt, "ground_truth": truth, "generation": text} for scores, prompt, truth, text in told
    )


def by_index(values: Any) -> dict[str, Any]:
    """Rows' values as a log holds them."""
    return {"agg_value": None, "value_by_index": {str(index): value for index, value in enumerate(values)}}
