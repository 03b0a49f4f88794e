"""TOFU: what a model still knows of invented authors, and of everything else.

Reference: Maini et al. 2024, arXiv 2401.06121; metric names and definitions as open-unlearning's (arXiv 2506.12618).
"""

from __future__ import annotations

import math
from pathlib import Path

from ...errors import DataError
from ..completions import ScoredCompletion, score_completions, score_false_answers
from ..logs.files import Log
from ..metrics.memorization import exact_memorization, extraction_strength
from ..metrics.truth_ratio import truth_ratio_of
from ..metrics.utility import normalised_probability
from ..subject import Subject
from .membership import membership_log
from .suite import Splits, Suite, SuiteSettings, by_index, check_keys, read_file, required, rouge_of

PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}  # of metric names


def read(path: Path, split: str | None) -> Splits:
    """Read a directory of TOFU's files.

    Required are forget*_perturbed and retain_perturbed. Optional are paraphrased answers, real_authors_perturbed,
    world_facts_perturbed and holdout*.

    Args:
        path: the directory.
        split: the forget set ('forget10', or 'forget10_perturbed' as its file is called); needed where the directory
            holds several.

    Raises:
        DataError: a set is missing or malformed, or ``split`` names none of the forget sets, or not one of several.
    """
    if not path.is_dir():
        raise DataError(f"expected a directory of TOFU's files at {path}, found none; check the path")
    name = _forget_set(path, split)
    files = {
        "forget": required(_either(path, name), f"{name}_perturbed.json in {path}"),
        "retain": required(_either(path, "retain"), f"retain_perturbed.json in {path}"),
        "real_authors": _either(path, "real_authors"),
        "world_facts": _either(path, "world_facts"),
        "holdout": _either(path, name.replace("forget", "holdout")) or _either(path, "holdout"),
    }
    splits = {key: rows for key, rows in files.items() if rows is not None}
    for key, rows in splits.items():
        check_keys(rows, ["question", "answer"], f"{path}, {key}")
        if key == "holdout":
            continue
        check_keys(rows, ["perturbed_answer"], f"{path}, {key}")
        for number, row in enumerate(rows, start=1):
            false = row["perturbed_answer"]
            if not isinstance(false, list) or not all(isinstance(text, str) and text.strip() for text in false):
                raise DataError(f"{path}, {key}, row {number}: expected perturbed_answer as a list of false answers")
    return splits


def evaluate(subject: Subject, splits: Splits, settings: SuiteSettings) -> Log:
    """Probabilities, truth ratios and ROUGE of each split, memorization of the forget rows, membership attacks."""
    for split, rows in splits.items():
        subject.encode(rows, split)  # raises for rows that are empty or too long, before the first forward
    log: Log = {}
    for split in PREFIXES:
        if split in splits:
            log |= _split_log(subject, split, splits[split], settings)
    if "holdout" in splits:
        log |= membership_log(subject, splits, {"forget": "forget", "holdout": "holdout"}, settings)
    return log


SUITE = Suite(
    "tofu",
    "TOFU_EVAL.json",
    read,
    evaluate,
    forget_split="forget",
    shown_answers={"forget": "forget_Q_A_ROUGE", "retain": "retain_Q_A_ROUGE"},
    retain_only_metrics={"forget_quality": "forget", "privleak": "holdout"},
)


def _forget_set(path: Path, split: str | None) -> str:
    """The name of the forget set that ``split`` asks for, which the sets that belong to it share."""
    files = (file for file in path.glob("forget*") if file.suffix in (".json", ".jsonl"))
    names = sorted({file.stem.removesuffix("_perturbed") for file in files})
    listed = ", ".join(names) or "none"
    if split is None:
        if len(names) != 1:
            raise DataError(
                f"{path}: expected one forget set (forget*_perturbed.json), found {listed}; name one by --split"
            )
        return names[0]
    name = split.removesuffix("_perturbed")
    if name not in names:
        raise DataError(f"{path}: expected --split to name a forget set, found {split!r}; there are {listed}")
    return name


def _either(path: Path, stem: str) -> list[dict] | None:
    return read_file(path, f"{stem}_perturbed") or read_file(path, stem)


def _split_log(subject: Subject, split: str, rows: list[dict], settings: SuiteSettings) -> Log:
    log: Log = {}
    prefix = PREFIXES[split]
    true = score_completions(subject, rows, f"{split}: answers")
    log[f"{prefix}_Q_A_Prob"] = by_index(map(_probability, true))
    if split == "forget":
        log["exact_memorization"] = by_index(map(_memorization, true))
        log["extraction_strength"] = by_index({"score": extraction_strength(row.tokens.hits)} for row in true)
    paraphrased = true
    if split in ("forget", "retain"):
        paraphrases = [
            {"question": row["question"], "answer": row.get("paraphrased_answer") or row["answer"]} for row in rows
        ]
        paraphrased = score_completions(subject, paraphrases, f"{split}: paraphrases")
        log[f"{prefix}_Q_A_PARA_Prob"] = by_index(map(_probability, paraphrased))
    false = [[answer.loss for answer in answers] for answers in score_false_answers(subject, rows, split)]
    log[f"{prefix}_Q_A_PERT_Prob"] = by_index(
        {"prob": [math.exp(-loss) for loss in losses], "avg_loss": losses} for losses in false
    )
    log["forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio"] = by_index(
        {"score": truth_ratio_of(row.loss, losses)} for row, losses in zip(paraphrased, false, strict=True)
    )
    if split in ("real_authors", "world_facts"):
        log[f"{prefix}_Q_A_Prob_normalised"] = by_index(
            {"prob": normalised_probability(math.exp(-row.loss), [math.exp(-loss) for loss in losses])}
            for row, losses in zip(true, false, strict=True)
        )
    log[f"{prefix}_Q_A_ROUGE"] = rouge_of(subject, rows, settings, split)
    return log


def _memorization(scored: ScoredCompletion) -> dict[str, float] | None:
    score = exact_memorization(scored.tokens.hits)
    return None if score is None else {"score": score}


def _probability(scored: ScoredCompletion) -> dict[str, float]:
    return {"prob": math.exp(-scored.loss), "avg_loss": scored.loss}
