"""The forget rows beside rows of the same kind that no model saw: can the two be told apart?

A model that never learned the forget rows cannot tell them from such rows. A membership attack reads a score of every
row; how well it does is the area under its curve, the probability that a forget row looks more like a member than a row
that was never seen.

Reference: MUSE (Shi et al. 2024, arXiv 2407.06460); the Kolmogorov-Smirnov test as in TOFU (Maini et al. 2024, arXiv
2401.06121).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import ks_2samp, kstwobign
from torch import Tensor

from ..attacks.attack import AttackSettings, Victims, attacked_rows
from ..completions import score_completions
from ..metrics.bootstrap import DRAWS, interval
from ..metrics.membership import minimum_k, minimum_k_plus_plus
from ..subject import Subject
from .evidence import ATTACK_NEVER_SEEN, Evidence, share_of

LEVEL = 0.05  # of the test


@dataclass(frozen=True)
class NeverSeen:
    """What rows that no model saw tell.

    Attributes:
        rows: how many of them.
        evidence: the area under the curve of each membership score, for each model.
        distance: the largest distance between the distributions of the unlearned model's mean log-probabilities of the
            forget rows and of these rows (Kolmogorov and Smirnov), in [0, 1].
        p_value: how likely such a distance is between two samples of one distribution.
        detectable: the least distance that so many rows can tell from chance at the level of 5 %: a larger p-value
            says nothing against a smaller distance.
    """

    rows: int
    evidence: list[Evidence]
    distance: float
    p_value: float
    detectable: float

    def __str__(self) -> str:
        verdict = "told apart" if self.p_value < LEVEL else "not told apart"
        return (
            f"forget rows and {self.rows} rows that no model saw are {verdict} by the unlearned model's likelihoods "
            f"(KS distance {self.distance:.2f}, p = {self.p_value:.2g}; so many rows can show {self.detectable:.2f} "
            "and more)"
        )


def compare_never_seen(victims: Victims, settings: AttackSettings) -> NeverSeen:
    """Score the forget rows that are attacked and ``victims.never_seen`` with every model."""
    forget = attacked_rows(victims, settings)
    sets = {"forget": forget, "never-seen": victims.never_seen}
    scores = {
        role: [_scores(subject, rows, f"{kind} rows, {role}") for kind, rows in sets.items()]
        for role, subject in victims.subjects()
    }
    evidence = [
        membership_evidence(name, {role: (of[0][name], of[1][name]) for role, of in scores.items()})
        for name in ("loss", "min_k", "min_k_plus_plus")
    ]
    losses, unseen = (of_rows["loss"] for of_rows in scores["unlearned"])
    found: Any = ks_2samp(losses, unseen)
    n, m = len(losses), len(unseen)
    detectable = float(kstwobign.isf(LEVEL)) * math.sqrt((n + m) / (n * m))
    return NeverSeen(m, evidence, float(found.statistic), float(found.pvalue), min(detectable, 1.0))


def membership_evidence(score: str, scores: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Evidence:
    """The area under the curve of one score, as evidence; its intervals draw rows of both sets.

    Args:
        score: its name; it is lower for members.
        scores: role -> the scores of N forget rows and of M rows that were never seen.
    """
    areas = {role: _area(*map(torch.tensor, of_role)) for role, of_role in scores.items()}
    drawn = {role: _drawn(area) for role, area in areas.items()}
    means = {role: float(area.mean()) for role, area in areas.items()}
    models = {role: interval(means[role], drawn[role]) for role in areas}
    n, m = next(iter(areas.values())).shape
    setting = f"forget rows against {m} never seen"
    return Evidence(ATTACK_NEVER_SEEN, setting, f"membership_{score}", n, models, share_of(means, drawn))


def _scores(subject: Subject, rows: Sequence[dict], name: str) -> dict[str, list[float]]:
    scored = score_completions(subject, rows, name)
    return {
        "loss": [row.loss for row in scored],
        "min_k": [minimum_k(row.tokens.log_probabilities) for row in scored],
        "min_k_plus_plus": [minimum_k_plus_plus(row.tokens.standardised) for row in scored],
    }


def _area(forget: Tensor, never_seen: Tensor) -> Tensor:
    """[N, M]: 1 where the forget row has the lower score, 1/2 where they are equal; the mean is the area."""
    difference = never_seen.unsqueeze(0) - forget.unsqueeze(1)
    return (difference.sign().double() + 1) / 2


def _drawn(area: Tensor) -> Tensor:
    """[draws], the areas of rows of both sets that are drawn with replacement, the same for every score and model."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for size in area.shape:
        rows = torch.randint(size, (DRAWS, size), generator=generator)
        drawn = torch.zeros(DRAWS, size, dtype=area.dtype)
        counts.append(drawn.scatter_add_(1, rows, torch.ones_like(rows, dtype=area.dtype)))
    forget, never_seen = counts
    return ((forget @ area) * never_seen).sum(1) / area.numel()
