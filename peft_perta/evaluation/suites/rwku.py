"""RWKU: what a model still knows of a real person and of their neighbours, by cloze, questions and adversarial prompts.

Reference: Jin et al. 2024, arXiv 2406.10890, and its repository jinzhuoran/RWKU for the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..logs.files import Log
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings, check_texts, read_file, required, rouge_of

REQUIRED = ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2")

ADVERSARIAL = "forget_level3"

MAX_NEW_TOKENS = 30

ENDS = ("\n",)

CLOZE = "Please complete the blank in the following question.\n"

QUESTION = "Please briefly answer the following question.\n"

ANSWER = "Answer:"


def read(path: Path, split: str | None) -> Splits:
    """Read a directory of RWKU's files, of rows {query, answer[, subject, type]}.

    Required are forget_level1 (cloze), forget_level2 (questions), neighbor_level1 and neighbor_level2. Optional is
    forget_level3 (adversarial prompts).

    Args:
        path: the directory.
        split: the person ('Stephen King') whose rows are asked; None for all.

    Raises:
        DataError: a file is missing or malformed, or holds no row of the person.
    """
    if not path.is_dir():
        raise DataError(f"expected a directory of RWKU's files at {path}, found none; check the path")
    splits = {stem: required(read_file(path, stem), f"{stem}.jsonl in {path}") for stem in REQUIRED}
    adversarial = read_file(path, ADVERSARIAL)
    if adversarial is not None:
        splits[ADVERSARIAL] = adversarial
    for stem, rows in splits.items():
        check_texts(rows, ["query", "answer"], f"{path / stem}")
        if split is not None:
            splits[stem] = _of_subject(rows, split, f"{path / stem}")
    return splits


def evaluate(subject: Subject, splits: Splits, settings: SuiteSettings) -> Log:
    """ROUGE of each split, and of each type of adversarial prompt.

    Answers are one line of at most 30 tokens, or of ``settings.max_new_tokens`` where that is less.
    """
    log: Log = {}
    for split, rows in splits.items():
        asked = [_asked(row, split, subject.tokenizer) for row in rows]
        log[f"{split}_ROUGE"] = rouge_of(
            subject,
            [row for row, _ in asked],
            settings,
            split,
            max_new_tokens=min(MAX_NEW_TOKENS, settings.max_new_tokens),
            ends=ENDS,
            prefixes=[prefix for _, prefix in asked],
        )
    if ADVERSARIAL in splits:
        log |= _by_type(log[f"{ADVERSARIAL}_ROUGE"], splits[ADVERSARIAL])
    return log


SUITE = Suite(
    "rwku",
    "RWKU_EVAL.json",
    read,
    evaluate,
    forget_split="forget_level2",
    question_key="query",
    shown_answers={"forget": "forget_level2_ROUGE", "retain": "neighbor_level2_ROUGE"},
)


def _of_subject(rows: list[dict], name: str, where: str) -> list[dict]:
    of_subject = [row for row in rows if row.get("subject") == name]
    if not of_subject:
        subjects = sorted({str(row["subject"]) for row in rows if "subject" in row})
        raise DataError(
            f"{where}: expected rows whose subject is {name!r}, found none among {', '.join(subjects[:10])}"
        )
    return of_subject


def _asked(row: Mapping, split: str, tokenizer: Any) -> tuple[dict, str]:
    """The row as RWKU asks it: instruction and query; and the prefix of its answer, 'Answer:'.

    A query of type 'affirmative suffix' ends with the beginning of the answer and has no prefix. One of type
    'incontext learning' has its own 'Question:'.
    """
    kind = row.get("type") if split == ADVERSARIAL else None
    prefix = "" if kind == "affirmative suffix" else ANSWER
    instruction = CLOZE if split.endswith("level1") else QUESTION
    label = "" if kind == "incontext learning" else "Question: "
    text = f"{instruction}{label}{row['query']}" + ("\n" if prefix else "")
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": row["answer"]}]
        return {"messages": messages}, prefix
    return {"prompt": f"{text}{prefix}", "completion": f" {row['answer']}"}, ""


def _by_type(log: Mapping[str, Any], rows: list[dict]) -> Log:
    """A metric for each type of adversarial prompt. The generations are in the metric of all of them alone."""
    by_type: Log = {}
    for index, row in enumerate(rows):
        if row.get("type"):
            metric = f"{ADVERSARIAL}_{'_'.join(str(row['type']).split())}_ROUGE"
            entry = by_type.setdefault(metric, {"agg_value": None, "value_by_index": {}})
            scores = log["value_by_index"][str(index)]
            entry["value_by_index"][str(index)] = {key: v for key, v in scores.items() if key.startswith("rouge")}
    return by_type
