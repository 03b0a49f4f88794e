"""Sampling attack: ask each question many times and keep the best answer, which may say what greedy decoding hides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...data import spread
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import answered, answers, check_prompts, recalls_of, with_prompt

ASKED = (1, 4, 16, 64)  # numbers of answers, of which the best leaks


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "sampling")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """ROUGE-L recall, mean over rows, of the greedy answer, and what the best of k answers is expected to have.

    leak@k is estimated without bias from all samples of a row; of all samples it is the best. The samples depend on the
    seed and on the batch size.

    Reference: leak@k, arXiv 2511.04934.
    """
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        asked = spread(with_prompt(subject, rows), settings.generated)
        greedy = answered(asked, answers(subject, asked, settings, name))
        repeated = [row for row in asked for _ in range(settings.samples)]
        texts = answers(subject, repeated, settings, f"{name}, samples", temperature=settings.temperature)
        said = answered(repeated, texts)
        recalls = recalls_of(said)
        draws = [range(start, start + settings.samples) for start in range(0, len(recalls), settings.samples)]
        found = {"greedy": Measured({"rouge_l_recall": recalls_of(greedy)}, greedy)}
        for count in (*(count for count in ASKED if count < settings.samples), settings.samples):
            leaked = [expected_best([recalls[place] for place in of_row], count) for of_row in draws]
            best = [said[max(of_row, key=recalls.__getitem__)] for of_row in draws]
            # The best answers are those of the last setting; a leak@k of fewer is of no answer in particular.
            shown = best if count == settings.samples else ()
            setting = f"leak@{count} of {settings.samples} samples at temperature {settings.temperature:g}"
            found[setting] = Measured({"rouge_l_recall": leaked}, shown)
        return found

    return compare("sampling", victims, measure)


ATTACK = Attack("sampling", "Ask many times and keep the best answer.", check, run)


def expected_best(scores: Sequence[float], count: int) -> float:
    """The mean of the best score over all sets of k = ``count`` of the N scores, which stand in rising order:
    sum_i s_i C(i - 1, k - 1) / C(N, k)."""
    ranked = enumerate(sorted(scores))
    return sum(score * math.comb(below, count - 1) for below, score in ranked) / math.comb(len(scores), count)
