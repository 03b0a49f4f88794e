"""What every suite shares: its row of the table, its settings, and how it reads files and generates answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data import check_characters, completion_text, encode_prompt, read_json, read_row_file
from ...errors import DataError
from ..generation import generate
from ..logs.files import Log
from ..metrics.rouge import PUBLISHED_TOKENIZER, rouge_scores, rouge_tokenizer
from ..subject import Subject

Splits = Mapping[str, list[dict]]  # split -> rows


@dataclass(frozen=True)
class SuiteSettings:
    """How much of a suite is asked.

    Attributes:
        rows: the most rows of each split, taken at even distances; None for all.
        max_new_tokens: the most tokens of a generated answer.
        retain_only: a model that never saw the forget rows, for the membership attack that compares with one.
    """

    rows: int | None = None
    max_new_tokens: int = 200
    retain_only: Subject | None = None


@dataclass(frozen=True)
class Suite:
    """One suite; a row of ``SUITES``.

    Attributes:
        name: its key in ``SUITES``.
        file_name: the file name of its log.
        read: (path, name of the forget set or None) -> split -> rows. It raises every error of the rows, before any
            compute.
        evaluate: (subject, splits, settings) -> metric -> {value_by_index}, without aggregates.
        forget_split: the split that attacks are run on; None where the suite has no forget rows.
        question_key: the key of a row's question.
        shown_answers: 'forget' and 'retain' -> the metric whose rows hold the generated answers that the HTML report
            shows.
        retain_only_metrics: the metrics that are measured against a retain-only model's log -> the split that each is
            computed from.
    """

    name: str
    file_name: str
    read: Callable[[Path, str | None], Splits]
    evaluate: Callable[[Subject, Splits, SuiteSettings], Log]
    forget_split: str | None = None
    question_key: str = "question"
    shown_answers: Mapping[str, str] = field(default_factory=dict)
    retain_only_metrics: Mapping[str, str] = field(default_factory=dict)


def read_file(directory: Path, stem: str) -> list[dict] | None:
    """The rows of ``stem``.json or ``stem``.jsonl, which hold JSON lines or one JSON list; None without such a file.

    Raises:
        DataError: the file is damaged or empty.
    """
    for path in (directory / f"{stem}.json", directory / f"{stem}.jsonl"):
        if path.is_file():
            return read_list(path)
    return None


def read_list(path: Path) -> list[dict]:
    """The rows of a file that holds JSON lines, or one JSON list of objects or texts.

    Raises:
        DataError: the file holds something else.
    """
    try:
        whole = read_json(path)
    except (OSError, ValueError):
        return read_row_file(path)
    if isinstance(whole, dict):
        return [whole]
    rows = [{"text": row} if isinstance(row, str) else row for row in whole] if isinstance(whole, list) else []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected JSON lines, or one JSON list, of objects; found {type(whole).__name__}")
    return rows


def required(rows: list[dict] | None, file: str) -> list[dict]:
    """The rows of a file that a suite cannot do without; ``file`` is its name in the message.

    Raises:
        DataError: the file is missing.
    """
    if rows is None:
        raise DataError(f"expected {file}, found none; check the path")
    return rows


def check_keys(rows: Sequence[Mapping], keys: Sequence[str], where: str) -> None:
    """Check that every row has these keys; ``where`` is the set's name in the message.

    Raises:
        DataError: a row lacks one; the message names the row.
    """
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if row.get(key) in (None, "", [])]
        if missing:
            raise DataError(f"{where}, row {number}: expected {missing[0]!r}, found the keys {sorted(map(str, row))}")


def check_texts(rows: Sequence[Mapping], keys: Sequence[str], where: str) -> None:
    """Check that every row has a text of whole characters, not only blanks, under each of these keys.

    Raises:
        DataError: a row has none; the message names the row.
    """
    check_keys(rows, keys, where)
    for number, row in enumerate(rows, start=1):
        for key in keys:
            if not isinstance(row[key], str):
                raise DataError(f"{where}, row {number}: expected {key!r} as text, found a {type(row[key]).__name__}")
            check_characters(row[key], f"{where}, row {number}, {key!r}")
            if not row[key].strip():
                raise DataError(f"{where}, row {number}: expected {key!r} as text, found only blanks")


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
    """The log entry of greedy answers: for each row its ROUGE against the completion. An empty answer scores 0.

    A row that rouge_score's own tokenizer did not split names the one that did ('tokenizer').

    Args:
        subject: the model with its adapters.
        rows: the rows that are answered.
        settings: ``max_new_tokens``.
        name: the set's name on the progress bar.
        max_new_tokens: overrides the one of ``settings``.
        ends: an answer is cut at the first of these texts, after the blanks before it are removed.
        prefixes: for each row a text that its answer starts with; it is not scored.
    """
    prefix_ids = [subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prefixes or ()]
    texts = generate(
        subject,
        rows,
        max_new_tokens=max_new_tokens or settings.max_new_tokens,
        prefixes=prefix_ids or None,
        name=f"{name}: answers",
    )
    for end in ends:
        texts = [text.split(end)[0].strip() for text in texts]
    truths = [completion_text(row).strip() for row in rows]
    starts = zip(rows, prefix_ids or [[] for _ in rows], strict=True)
    prompt_ids = [encode_prompt(row, subject.tokenizer) + ids for row, ids in starts]
    prompts = [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
    return by_index(
        {**scores, "input": prompt, "ground_truth": truth, "generation": text, **_tokenizer(truth)}
        for scores, prompt, truth, text in zip(rouge_scores(texts, truths), prompts, truths, texts, strict=True)
    )


def _tokenizer(truth: str) -> dict[str, str]:
    name = rouge_tokenizer(truth)
    return {} if name == PUBLISHED_TOKENIZER else {"tokenizer": name}


def by_index(values: Iterable[Any]) -> dict[str, Any]:
    """The log entry of these values, one for each row."""
    return {"agg_value": None, "value_by_index": {str(index): value for index, value in enumerate(values)}}
