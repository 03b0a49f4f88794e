"""Measures of an attacked model: the losses of the true answers, and the answers that it generates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...data import answer_frame, completion_text, encode_prompt, prompt_text, spread
from ...errors import DataError
from ..completions import completion_ids, score_completions
from ..generation import generate
from ..metrics.rouge import rouge_l_recall
from ..subject import Subject
from .attack import Answer, AttackResult, AttackSettings, Measured, RowValues, Victims, compare


def measured(subject: Subject, rows: Sequence[Mapping], settings: AttackSettings, name: str) -> Measured:
    """Loss and probability of the completions, and ROUGE-L recall of greedy answers to rows with a prompt."""
    values = likelihood(subject, rows, name).values
    asked = spread(with_prompt(subject, rows), settings.generated)
    if not asked:
        return Measured(values)
    said = answered(asked, answers(subject, asked, settings, name))
    return Measured({**values, "rouge_l_recall": recalls_of(said)}, said)


def compare_asked(
    attack: str, victims: Victims, asked: Mapping[str, Sequence[Mapping]], settings: AttackSettings
) -> list[AttackResult]:
    """Measure every model on the rows of each setting; a setting without rows is left out."""

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        return {
            setting: measured(subject, rows, settings, f"{name}, {setting}") for setting, rows in asked.items() if rows
        }

    return compare(attack, victims, measure)


def likelihood(subject: Subject, rows: Sequence[Mapping], name: str) -> Measured:
    """'loss' and 'probability' of the rows' completions."""
    return Measured(of_losses([scored.loss for scored in score_completions(subject, rows, name)]))


def of_losses(losses: Sequence[float]) -> RowValues:
    """'loss' and 'probability': of each row the completion's mean token loss (nats), and exp(-loss)."""
    return {"loss": list(losses), "probability": [math.exp(-loss) for loss in losses]}


def answered(rows: Sequence[Mapping], texts: Sequence[str], truths: Sequence[str] | None = None) -> list[Answer]:
    """The answers that were said to rows; ``truths`` are the rows' completions by default."""
    truths = [completion_text(row) for row in rows] if truths is None else truths
    return [Answer(prompt_text(row), truth, said) for row, truth, said in zip(rows, truths, texts, strict=True)]


def recalls_of(said: Sequence[Answer]) -> list[float]:
    """ROUGE-L recall of each answer."""
    return rouge_l_recall([answer.said for answer in said], [answer.truth for answer in said])


def answers(
    subject: Subject, rows: Sequence[Mapping], settings: AttackSettings, name: str, **options: Any
) -> list[str]:
    """The model's answers to the rows' prompts; ``options`` as for ``generate``."""
    return generate(
        subject,
        rows,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        name=f"{name}, answers",
        **options,
    )


def answer_tokens(subject: Subject, rows: Sequence[Mapping], name: str) -> list[list[int]]:
    """The tokens of each row's answer, without what opens or closes the completion."""
    frame = answer_frame(subject.tokenizer)
    completions = map(completion_ids, subject.encode(rows, name))
    return [tokens[frame.words(tokens)] for tokens in completions]


def with_prompt(subject: Subject, rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows that can be answered, which are all but plain texts."""
    return [row for row in rows if encode_prompt(row, subject.tokenizer)]


def check_prompts(subject: Subject, rows: Sequence[Mapping], attack: str) -> None:
    """Check that some row can be answered.

    Raises:
        DataError: all rows are plain texts.
    """
    if not with_prompt(subject, rows):
        raise DataError(
            f"the {attack} attack needs rows with a prompt to answer (question/answer, prompt/completion or messages), "
            "found only plain texts; leave the attack out"
        )
