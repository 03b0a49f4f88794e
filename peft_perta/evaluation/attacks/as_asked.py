"""No attack: the rows as a user asks them, in the measures that are hardest to fool.

It is what every attack is held against, and what an audit begins with.
"""

from __future__ import annotations

import math

from ...data import spread
from ..completions import score_completions
from ..metrics.membership import minimum_k, minimum_k_plus_plus
from ..metrics.memorization import exact_memorization, extraction_strength
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import answered, answers, of_losses, recalls_of, with_prompt


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """Loss, probability, exact memorization, extraction strength, min-k and min-k++ of each row, and ROUGE-L recall of
    greedy answers."""
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        scored = score_completions(subject, rows, name)
        tokens = [completion.tokens for completion in scored]
        exact = [exact_memorization(of_row.hits) for of_row in tokens]
        values = {
            **of_losses([completion.loss for completion in scored]),
            "exact_memorization": [math.nan if share is None else share for share in exact],
            "extraction_strength": [extraction_strength(of_row.hits) for of_row in tokens],
            "min_k": [minimum_k(of_row.log_probabilities) for of_row in tokens],
            "min_k_plus_plus": [minimum_k_plus_plus(of_row.standardised) for of_row in tokens],
        }
        asked = spread(with_prompt(subject, rows), settings.generated)
        said = answered(asked, answers(subject, asked, settings, name)) if asked else []
        if said:
            values["rouge_l_recall"] = recalls_of(said)
        return {"plain": Measured(values, said)}

    return compare("as-asked", victims, measure)


AS_ASKED = Attack("as-asked", "Ask as a user would.", check_victims, run)
