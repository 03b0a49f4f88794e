"""Sampling attack: ask each question many times and keep the best answer, which may say what greedy decoding hides."""

from __future__ import annotations

from ...data import spread
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import answered, answers, check_prompts, recalls_of, with_prompt


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "sampling")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """ROUGE-L recall, mean over rows, of the greedy answer and of the best of several samples.

    The samples depend on the seed and on the batch size.
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
        best = [max(of_row, key=recalls.__getitem__) for of_row in draws]
        return {
            "greedy": Measured({"rouge_l_recall": recalls_of(greedy)}, greedy),
            f"best of {settings.samples} at temperature {settings.temperature:g}": Measured(
                {"rouge_l_recall": [recalls[place] for place in best]}, [said[place] for place in best]
            ),
        }

    return compare("sampling", victims, measure)


ATTACK = Attack("sampling", "Ask many times and keep the best answer.", check, run)
