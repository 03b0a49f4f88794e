"""Membership attacks, as suites measure them: scores of forget rows and of holdout rows, which no model saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...data import completion_text
from ..completions import score_completions
from ..logs.files import Log
from ..metrics.membership import MEMBERSHIP_PARTS, minimum_k, minimum_k_plus_plus, reference_score, zlib_score
from ..subject import Subject
from .suite import Splits, SuiteSettings, by_index


def membership_log(subject: Subject, splits: Splits, names: Mapping[str, str], settings: SuiteSettings) -> Log:
    """The entries of the membership attacks, 'mia_<attack>' -> {forget, holdout}.

    Args:
        subject: the model with its adapters.
        splits: split -> rows.
        names: 'forget' and 'holdout' -> the split that holds these rows.
        settings: ``retain_only`` adds the attack that compares with a retain-only model.
    """
    scores = {part: _scores(subject, splits[names[part]], settings, names[part]) for part in MEMBERSHIP_PARTS}
    return {
        f"mia_{attack}": {part: by_index({"score": value} for value in scores[part][attack]) for part in scores}
        for attack in scores["forget"]
    }


def _scores(subject: Subject, rows: Sequence[dict], settings: SuiteSettings, name: str) -> dict[str, list[float]]:
    """attack -> a score for each row, lower for rows that look like members of the training set."""
    scored = score_completions(subject, rows, f"{name}: membership")
    scores = {
        "loss": [row.loss for row in scored],
        "min_k": [minimum_k(row.tokens.log_probabilities) for row in scored],
        "min_k_plus_plus": [minimum_k_plus_plus(row.tokens.standardised) for row in scored],
        "zlib": [zlib_score(row.loss, completion_text(text)) for row, text in zip(scored, rows, strict=True)],
    }
    if settings.retain_only is not None:
        by_retain_only = score_completions(settings.retain_only, rows, f"{name}: retain-only")
        scores["reference"] = [
            reference_score(row.loss, other.loss) for row, other in zip(scored, by_retain_only, strict=True)
        ]
    return scores
