"""Asked again and again, the best answer counting: does what greedy decoding hides lie close below?"""

from __future__ import annotations

from statistics import fmean

from ...data import completion_text, spread
from ..metrics.rouge import rouge_l_recall
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import answers, check_prompts, with_prompt


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "sampling")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """ROUGE-L recall, mean over rows: of the greedy answer, and of the best of several that are sampled.

    What is sampled depends on the seed and on the batch size.
    """
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Numbers]:
        asked = spread(with_prompt(subject, rows), settings.generated)
        truths = [completion_text(row) for row in asked]
        greedy = rouge_l_recall(answers(subject, asked, settings, name), truths)
        repeated = [row for row in asked for _ in range(settings.samples)]
        texts = answers(subject, repeated, settings, f"{name}, samples", temperature=settings.temperature)
        recalls = rouge_l_recall(texts, [completion_text(row) for row in repeated])
        best = [max(recalls[i : i + settings.samples]) for i in range(0, len(recalls), settings.samples)]
        return {
            "greedy": {"rouge_l_recall": fmean(greedy)},
            f"best of {settings.samples} at temperature {settings.temperature:g}": {"rouge_l_recall": fmean(best)},
        }

    return compare("sampling", victims, measure)


ATTACK = Attack("sampling", "Ask many times and keep the best answer.", check, run)
