"""Columns as well-known benchmarks name them, as rows of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Layout(NamedTuple):
    """The columns of a benchmark.

    Attributes:
        name: of the benchmark.
        read: what is read, for the note.
        row_of: a row of the benchmark -> our row; None for another row.
    """

    name: str
    read: str
    row_of: Callable[[Mapping], dict | None]


def known_layout(rows: list[dict]) -> tuple[Layout, list[dict]] | None:
    """The layout that every one of the rows has, and our rows; None if they have none."""
    for layout in LAYOUTS:
        ours: list[dict] = []
        for row in rows:
            of_row = layout.row_of(row)
            if of_row is None:
                break
            ours.append(of_row)
        else:
            return layout, ours
    return None


def _has(row: Mapping, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _tofu(row: Mapping) -> dict | None:
    return dict(row) if _has(row, "question", "answer", "paraphrased_answer", "perturbed_answer") else None


def _muse(row: Mapping) -> dict | None:
    if not _has(row, "prompt", "gt") or "completion" in row:
        return None
    return {"prompt": row["prompt"], "completion": row["gt"]}


def _rwku(row: Mapping) -> dict | None:
    if not _has(row, "query", "answer") or "question" in row:
        return None
    return {"question": row["query"], "answer": row["answer"]}


def _wmdp(row: Mapping) -> dict | None:
    choices, answer = row.get("choices"), row.get("answer")
    if not _has(row, "question") or not isinstance(choices, list) or isinstance(answer, bool):
        return None
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        return None
    false = [choice for number, choice in enumerate(choices) if number != answer]
    return {"question": row["question"], "answer": choices[answer], "perturbed_answer": false}


LAYOUTS = (
    Layout("TOFU", "question and answer are the row, their variants serve to judge", _tofu),
    Layout("MUSE", "gt is the completion of prompt", _muse),
    Layout("RWKU", "query is the question of answer", _rwku),
    Layout("WMDP", "the right one of choices is the answer, the others are false answers", _wmdp),
)
