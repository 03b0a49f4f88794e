"""TOFU: what a model still says of invented authors, and of everything else.

Reference: Maini et al. 2024, arXiv 2401.06121; metric names and definitions as open-unlearning's (arXiv 2506.12618).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...data import completion_text
from ...errors import DataError
from ..completions import ScoredCompletion, score_completions
from ..logs.files import Log
from ..metrics.membership import minimum_k, minimum_k_plus_plus, reference_score, zlib_score
from ..metrics.memorization import exact_memorization, extraction_strength
from ..metrics.truth_ratio import truth_ratio_of
from ..metrics.utility import normalised_probability
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings, by_index, check_keys, read_file, required, rouge_of

PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def read(path: Path, split: str | None) -> Splits:
    """A directory of TOFU's files: forget*_perturbed and retain_perturbed; and, where they are there, paraphrases,
    real_authors_perturbed, world_facts_perturbed and holdout*.

    Raises:
        DataError: a set is missing, or malformed; or there are several forget sets, and ``split`` names none.
    """
    if not path.is_dir():
        raise DataError(f"expected a directory of TOFU's files at {path}, found none; check the path")
    name = split or _only_forget(path)
    found = {
        "forget": required(_either(path, name), f"{name}_perturbed.json in {path}"),
        "retain": required(_either(path, "retain"), f"retain_perturbed.json in {path}"),
        "real_authors": _either(path, "real_authors"),
        "world_facts": _either(path, "world_facts"),
        "holdout": read_file(path, name.replace("forget", "holdout")) or read_file(path, "holdout"),
    }
    splits = {key: rows for key, rows in found.items() if rows is not None}
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
    for split, rows in splits.items():
        subject.encode(rows, split)  # what is too long or empty is refused before the first forward
    log: Log = {}
    for split, prefix in PREFIXES.items():
        if split in splits:
            _judge(log, subject, splits[split], settings, split, prefix)
    if "holdout" in splits:
        _attack(log, subject, splits, settings)
    return log


SUITE = Suite("TOFU_EVAL.json", read, evaluate)


def _only_forget(path: Path) -> str:
    names = sorted({f.stem.removesuffix("_perturbed") for f in path.glob("forget*.json*")})
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise DataError(f"{path}: expected one forget set (forget*_perturbed.json), found {found}; name one by --split")
    return names[0]


def _either(path: Path, stem: str) -> list[dict] | None:
    return read_file(path, f"{stem}_perturbed") or read_file(path, stem)


def _judge(log: Log, subject: Subject, rows: list[dict], settings: SuiteSettings, split: str, prefix: str) -> None:
    truths = score_completions(subject, rows, f"{split}: answers")
    log[f"{prefix}_Q_A_Prob"] = by_index(map(_probability, truths))
    if split == "forget":
        log["exact_memorization"] = by_index(map(_memorization, truths))
        log["extraction_strength"] = by_index({"score": extraction_strength(r.tokens.hits)} for r in truths)
    believed = truths
    if split in ("forget", "retain"):
        paraphrased = [
            {"question": row["question"], "answer": row.get("paraphrased_answer") or row["answer"]} for row in rows
        ]
        believed = score_completions(subject, paraphrased, f"{split}: paraphrases")
        log[f"{prefix}_Q_A_PARA_Prob"] = by_index(map(_probability, believed))
    false_rows = [{"question": r["question"], "answer": answer} for r in rows for answer in r["perturbed_answer"]]
    read_false = iter(score_completions(subject, false_rows, f"{split}: false answers"))
    false = [[next(read_false) for _ in row["perturbed_answer"]] for row in rows]
    log[f"{prefix}_Q_A_PERT_Prob"] = by_index(
        {"prob": [math.exp(-r.loss) for r in found], "avg_loss": [r.loss for r in found]} for found in false
    )
    ratios = [truth_ratio_of(true.loss, [r.loss for r in found]) for true, found in zip(believed, false, strict=True)]
    log["forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio"] = by_index(
        {"score": ratio} for ratio in ratios
    )
    if split in ("real_authors", "world_facts"):
        log[f"{prefix}_Q_A_Prob_normalised"] = by_index(
            {"prob": normalised_probability(math.exp(-true.loss), [math.exp(-r.loss) for r in found])}
            for true, found in zip(truths, false, strict=True)
        )
    log[f"{prefix}_Q_A_ROUGE"] = rouge_of(subject, rows, settings, split)


def _memorization(reading: ScoredCompletion) -> dict[str, float] | None:
    score = exact_memorization(reading.tokens.hits)
    return None if score is None else {"score": score}


def _probability(reading: ScoredCompletion) -> dict[str, float]:
    return {"prob": math.exp(-reading.loss), "avg_loss": reading.loss}


def _attack(log: Log, subject: Subject, splits: Splits, settings: SuiteSettings) -> None:
    """Membership: could one tell the forget rows from rows that no model saw?"""
    rows = {name: splits[name] for name in ("forget", "holdout")}
    scores = {name: membership_scores(subject, found, settings, name) for name, found in rows.items()}
    for attack in scores["forget"]:
        log[f"mia_{attack}"] = {
            name: by_index({"score": value} for value in found[attack]) for name, found in scores.items()
        }


def membership_scores(
    subject: Subject, rows: Sequence[dict], settings: SuiteSettings, name: str
) -> dict[str, list[float]]:
    """Attack -> a score a row, lower for what looks like a member."""
    readings = score_completions(subject, rows, f"{name}: membership")
    scores = {
        "loss": [r.loss for r in readings],
        "min_k": [minimum_k(r.tokens.log_probabilities) for r in readings],
        "min_k_plus_plus": [minimum_k_plus_plus(r.tokens.standardised) for r in readings],
        "zlib": [zlib_score(r.loss, completion_text(row)) for r, row in zip(readings, rows, strict=True)],
    }
    if settings.retain_only is not None:
        known = score_completions(settings.retain_only, rows, f"{name}: reference")
        scores["reference"] = [reference_score(r.loss, other.loss) for r, other in zip(readings, known, strict=True)]
    return scores
