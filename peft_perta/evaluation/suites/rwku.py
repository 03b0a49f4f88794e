"""RWKU: what a model still says of real people when asked in five ways, three of them about whom it should forget.

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
    """A directory of RWKU's files: forget_level1 (cloze) and 2 (question), neighbor_level1 and 2; and, where it is
    there, forget_level3 (adversarial). Rows are {query, answer[, subject, type]}.

    Args:
        split: the one subject ('Stephen King') whose rows are asked; None for all.

    Raises:
        DataError: a file is missing or malformed, or holds nothing of the subject.
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
    """Answers are of at most 30 tokens (of ``settings.max_new_tokens`` where that is less), and of one line."""
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


SUITE = Suite("RWKU_EVAL.json", read, evaluate)


def _of_subject(rows: list[dict], name: str, what: str) -> list[dict]:
    kept = [row for row in rows if row.get("subject") == name]
    if not kept:
        known = sorted({str(row["subject"]) for row in rows if "subject" in row})
        raise DataError(f"{what}: expected rows whose subject is {name!r}, found none among {', '.join(known[:10])}")
    return kept


def _asked(row: Mapping, split: str, tokenizer: Any) -> tuple[dict, str]:
    """The row as it is asked, and what its answer begins with: RWKU's instruction, and 'Answer:' after it.

    An affirmative suffix begins the answer by itself, and a query that shows examples brings its own 'Question:'.
    """
    kind = row.get("type") if split == ADVERSARIAL else None
    prefix = "" if kind == "affirmative suffix" else ANSWER
    instruction = CLOZE if split.endswith("level1") else QUESTION
    label = "" if kind == "incontext learning" else "Question: "
    text = f"{instruction}{label}{row['query']}" + ("\n" if prefix else "")
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": row["answer"]}]
        return {"messages": said}, prefix
    return {"prompt": f"{text}{prefix}", "completion": f" {row['answer']}"}, ""


def _by_type(log: Mapping[str, Any], rows: list[dict]) -> Log:
    """The adversarial metric apart for each way of asking; the generations stay in the whole one."""
    found: Log = {}
    for index, row in enumerate(rows):
        if row.get("type"):
            metric = f"{ADVERSARIAL}_{'_'.join(str(row['type']).split())}_ROUGE"
            entry = found.setdefault(metric, {"agg_value": None, "value_by_index": {}})
            scores = log["value_by_index"][str(index)]
            entry["value_by_index"][str(index)] = {key: v for key, v in scores.items() if key.startswith("rouge")}
    return found
