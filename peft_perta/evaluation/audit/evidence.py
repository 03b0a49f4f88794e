"""Evidence: one measure of one attack, as a position between what was never learned and what was known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.attack import AttackResult
from ..metrics.bootstrap import Interval, drawn_means, interval

_LEAST_ROWS = 5  # of fewer rows, a bootstrap says that it is certain
_ROLES = ("unlearned", "full", "retain-only")
# Settings in which an attack only repeats what is measured as asked.
_PLAIN = ("as it is", "as asked", "greedy", "on", "0% of the answer given", "after the last block")


class _Meaning(NamedTuple):
    """How a measure is read: its name in tables, and known(value), which grows with what the model knows."""

    shown: str
    known: Callable[[Tensor], Tensor]


_MEASURES = {
    "loss": _Meaning("log-likelihood", torch.neg),
    "probability": _Meaning("probability", lambda value: value),
    "rouge_l_recall": _Meaning("ROUGE-L recall", lambda value: value),
    "exact_memorization": _Meaning("exact memorization", lambda value: value),
    "extraction_strength": _Meaning("extraction strength", lambda value: value),
    "min_k": _Meaning("min-k", torch.neg),
    "min_k_plus_plus": _Meaning("min-k++", torch.neg),
    "uds": _Meaning("1 - UDS", lambda value: 1 - value),
}
ATTACK_NEVER_SEEN = "membership"  # the attack's name in evidence; it reads two sets of rows
_MEMBERSHIP = {
    "membership_loss": "AUC of the loss",
    "membership_min_k": "AUC of min-k",
    "membership_min_k_plus_plus": "AUC of min-k++",
}


@dataclass(frozen=True)
class Evidence:
    """One measure of one attack in one setting.

    Attributes:
        attack: name of the attack; 'as-asked' for none.
        setting: of the attack.
        measure: the measure.
        rows: the number of rows.
        models: role -> the measure's mean over rows with its interval, in the measure's own unit.
        share: (unlearned - retain-only) / (full - retain-only): 0 as never learned, 1 as before unlearning, below 0
            less than never learned. None where the rows cannot tell the full from the retain-only model, or are fewer
            than five.
    """

    attack: str
    setting: str
    measure: str
    rows: int
    models: dict[str, Interval]
    share: Interval | None

    @property
    def name(self) -> str:
        """The evidence in words."""
        where = "" if self.attack == "as-asked" else f", {self.attack}: {self.setting}"
        return f"{shown_measure(self.measure)}{where}"


def shown_measure(measure: str) -> str:
    """A measure's name in tables."""
    return _MEMBERSHIP.get(measure) or _MEASURES[measure].shown


def evidence_of(results: Sequence[AttackResult]) -> list[Evidence]:
    """The evidence in attacks' results, in their order.

    What attacks only repeat of the plain answers is left out.
    """
    return [
        _evidence(result, measure)
        for result in results
        if result.setting not in _PLAIN and not result.setting.startswith("0 steps")
        for measure in result.unlearned
        if measure in _MEASURES
    ]


def _evidence(result: AttackResult, measure: str) -> Evidence:
    known = _MEASURES[measure].known
    values = {role: torch.tensor(result.rows[role][measure], dtype=torch.float64) for role in _ROLES}
    whole = torch.stack(list(values.values())).isfinite().all(0)  # answers without a word have no tokens to memorize
    values = {role: known(of_role[whole]) for role, of_role in values.items()}
    count = int(whole.sum())
    means = {role: drawn_means(of_role) for role, of_role in values.items()} if count else {}
    share = share_of({role: float(of.mean()) for role, of in values.items()}, means) if count >= _LEAST_ROWS else None
    models = {role: interval(float(values[role].mean()), means[role]) for role in means}
    return Evidence(result.attack, result.setting, measure, count, models, share)


def share_of(means: Mapping[str, float], drawn: Mapping[str, Tensor]) -> Interval | None:
    """The share of what was known, of a measure that grows with what is known; None where the rows cannot tell the full
    from the retain-only model.

    Args:
        means: role -> the measure.
        drawn: role -> [draws], the measure on rows that were drawn with replacement.
    """
    unlearned, full, retain_only = (means[role] for role in _ROLES)
    distance = drawn["full"] - drawn["retain-only"]
    if not interval(full - retain_only, distance).low > 0:
        return None
    shares = (drawn["unlearned"] - drawn["retain-only"]) / distance
    return interval((unlearned - retain_only) / (full - retain_only), shares)


def ratio(values: Tensor, of: Tensor) -> Interval:
    """The ratio of two means over the same rows, with its interval."""
    return interval(float(values.mean() / of.mean()), drawn_means(values) / drawn_means(of))
