"""MUSE: whether a model still recites a text, knows its content, and shows that it was trained on it.

Reference: Shi et al. 2024, arXiv 2407.06460; metric names as open-unlearning's (arXiv 2506.12618).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...model import row_length
from ..completions import score_completions
from ..logs.files import Log
from ..metrics.memorization import exact_memorization, extraction_strength
from ..metrics.words import writes_no_spaces
from ..subject import Subject
from .membership import membership_log
from .suite import Splits, Suite, SuiteSettings, by_index, check_texts, read_file, required, rouge_of

FILES = {  # split -> its file, and the keys of its rows
    "forget_knowmem": ("knowmem/forget_qa", ("question", "answer")),
    "retain_knowmem": ("knowmem/retain_qa", ("question", "answer")),
    "forget_verbmem": ("verbmem/forget", ("prompt", "gt")),
    "forget_privleak": ("privleak/forget", ("text",)),
    "holdout_privleak": ("privleak/holdout", ("text",)),
}

KNOWLEDGE_TOKENS = 32  # of an answer

VERBATIM_TOKENS = 128  # of a continuation

KNOWLEDGE_ENDS = ("\n\n", "\nQuestion", "Question:")

MAX_LENGTH = 2048  # MUSE's prompts alone are a thousand tokens long


def read(path: Path, split: str | None) -> Splits:
    """Read a directory of MUSE's files.

    Required are knowmem/forget_qa and knowmem/retain_qa {question, answer}, verbmem/forget {prompt, gt},
    privleak/forget and privleak/holdout (texts). Optional are knowmem/forget_qa_icl and knowmem/retain_qa_icl: answered
    questions that precede each question in its prompt.

    Args:
        path: the directory.
        split: the corpus ('news', 'books'), where ``path`` holds a directory for each.

    Raises:
        DataError: a file is missing or malformed.
    """
    directory = path / split if split else path
    if not directory.is_dir():
        corpora = ", ".join(sorted(place.name for place in path.glob("*") if place.is_dir()))
        remedy = f"there are {corpora}" if corpora else "check the path"
        raise DataError(f"expected a directory of MUSE's files at {directory}, found none; {remedy}")
    splits = {}
    for key, (stem, keys) in FILES.items():
        rows = required(read_file(directory, stem), f"{stem}.json in {directory}")
        check_texts(rows, keys, f"{directory / stem}")
        splits[key] = rows
        examples = read_file(directory, f"{stem}_icl") if key.endswith("knowmem") else None
        if examples is not None:
            check_texts(examples, keys, f"{directory / stem}_icl")
            splits[key] = [{**row, "examples": examples} for row in rows]
    return splits


def evaluate(subject: Subject, splits: Splits, settings: SuiteSettings) -> Log:
    """ROUGE of answers and of continuations, memorization of the texts, membership attacks.

    Answers have at most 32 tokens and continuations at most 128, or ``settings.max_new_tokens`` where that is less.
    Texts are cut at 2048 tokens, or at the model's number of positions where that is less, or at the subject's
    ``max_length`` where that is more.
    """
    log: Log = {}
    longest = row_length(subject.model, None, default=MAX_LENGTH)
    subject = replace(subject, max_length=max(subject.max_length or 0, longest))
    for split in ("forget_knowmem", "retain_knowmem"):
        log[f"{split}_ROUGE"] = rouge_of(
            subject,
            [_question(row, subject.tokenizer) for row in splits[split]],
            settings,
            split,
            max_new_tokens=min(KNOWLEDGE_TOKENS, settings.max_new_tokens),
            ends=KNOWLEDGE_ENDS,
        )
    tokens = min(VERBATIM_TOKENS, settings.max_new_tokens)
    log["forget_verbmem_ROUGE"] = rouge_of(
        subject,
        [_continuation(row, _cut(row["gt"], tokens, subject.tokenizer)) for row in splits["forget_verbmem"]],
        settings,
        "forget_verbmem",
        max_new_tokens=tokens,
    )
    recited = score_completions(
        subject, [_continuation(row, row["gt"]) for row in splits["forget_verbmem"]], "forget_verbmem: texts"
    )
    log["exact_memorization"] = by_index({"score": exact_memorization(row.tokens.hits)} for row in recited)
    log["extraction_strength"] = by_index({"score": extraction_strength(row.tokens.hits)} for row in recited)
    parts = {"forget": "forget_privleak", "holdout": "holdout_privleak"}
    return log | membership_log(subject, splits, parts, settings)


SUITE = Suite(
    "muse",
    "MUSE_EVAL.json",
    read,
    evaluate,
    forget_split="forget_knowmem",
    shown_answers={"forget": "forget_knowmem_ROUGE", "retain": "retain_knowmem_ROUGE"},
    retain_only_metrics={"privleak": "holdout_privleak"},
)


def _question(row: Mapping, tokenizer: Any) -> dict:
    """The question after its examples: as turns where the tokenizer has a chat template, else as one text."""
    examples = row.get("examples") or []
    if not examples:
        return {"question": row["question"], "answer": row["answer"]}
    if getattr(tokenizer, "chat_template", None):
        turns = [(shown["question"], shown["answer"]) for shown in (*examples, row)]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return {"messages": messages}
    shown = "".join(f"Question: {shown['question']}\nAnswer: {shown['answer']}\n\n" for shown in examples)
    return {"prompt": f"{shown}Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def _continuation(row: Mapping, text: str) -> dict:
    """A row that continues the prompt with the text, after a blank where neither has one and their script writes it."""
    joined = row["prompt"][-1:] + text[:1]
    gap = "" if any(character.isspace() or writes_no_spaces(character) for character in joined) else " "
    return {"prompt": row["prompt"], "completion": f"{gap}{text}"}


def _cut(text: str, tokens: int, tokenizer: Any) -> str:
    """The text's first tokens, as many as the model may generate, so that a perfect continuation has ROUGE 1."""
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens], skip_special_tokens=True)
