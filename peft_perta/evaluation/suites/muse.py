"""MUSE: does a model still recite a text, know what it says, and show that it was trained on it?

Reference: Shi et al. 2024, arXiv 2407.06460; metric names as open-unlearning's (arXiv 2506.12618).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..completions import score_completions
from ..logs.files import Log
from ..metrics.memorization import exact_memorization, extraction_strength
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings, by_index, check_texts, read_file, required, rouge_of
from .tofu import membership_scores

FILES = {  # split -> its file, and what each of its rows says
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
    """A directory of MUSE's files: knowmem/forget_qa and retain_qa {question, answer}, verbmem/forget {prompt, gt},
    privleak/forget and holdout (texts); and, where they are there, knowmem/forget_qa_icl and retain_qa_icl, answered
    questions that are shown before each one that is asked.

    Args:
        split: the corpus ('news', 'books'), where ``path`` holds a directory for each.

    Raises:
        DataError: a file is missing or malformed.
    """
    directory = path / split if split else path
    if not directory.is_dir():
        raise DataError(f"expected a directory of MUSE's files at {directory}, found none; check the path")
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
    """Answers are of at most 32 tokens, continuations of at most 128, or of ``settings.max_new_tokens`` where that is
    less; texts of up to 2048 tokens are read whole."""
    log: Log = {}
    subject = replace(subject, max_length=max(subject.max_length, MAX_LENGTH))
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
    log["exact_memorization"] = by_index({"score": exact_memorization(r.tokens.hits)} for r in recited)
    log["extraction_strength"] = by_index({"score": extraction_strength(r.tokens.hits)} for r in recited)
    scores = {
        part: membership_scores(subject, splits[f"{part}_privleak"], settings, f"{part}_privleak")
        for part in ("forget", "holdout")
    }
    for attack in scores["forget"]:
        log[f"mia_{attack}"] = {
            part: by_index({"score": value} for value in found[attack]) for part, found in scores.items()
        }
    return log


SUITE = Suite("MUSE_EVAL.json", read, evaluate)


def _question(row: Mapping, tokenizer: Any) -> dict:
    """The question after its examples: turns of a chat where the model has a template for it, else text."""
    examples = row.get("examples") or []
    if not examples:
        return {"question": row["question"], "answer": row["answer"]}
    if getattr(tokenizer, "chat_template", None):
        turns = [(shown["question"], shown["answer"]) for shown in (*examples, row)]
        said = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return {"messages": said}
    shown = "".join(f"Question: {shown['question']}\nAnswer: {shown['answer']}\n\n" for shown in examples)
    return {"prompt": f"{shown}Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def _continuation(row: Mapping, text: str) -> dict:
    """What follows the prompt, with a blank between the two where neither brings one."""
    gap = "" if row["prompt"][-1].isspace() or text[0].isspace() else " "
    return {"prompt": row["prompt"], "completion": f"{gap}{text}"}


def _cut(text: str, tokens: int, tokenizer: Any) -> str:
    """As much of the text as a model could have written: a perfect continuation has ROUGE 1."""
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens], skip_special_tokens=True)
