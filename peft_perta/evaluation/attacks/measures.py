"""What is measured of an attacked model: losses of the answers, and what it answers by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...data import completion_text, encode_prompt, spread
from ...errors import DataError
from ..completions import score_completions
from ..generation import generate
from ..metrics.rouge import rouge_l_recall
from ..subject import Subject
from .attack import AttackSettings, Numbers


def measured(subject: Subject, rows: Sequence[Mapping], settings: AttackSettings, name: str) -> Numbers:
    """Loss and probability of the completions, and ROUGE-L recall of greedy answers to the rows that have a prompt."""
    numbers = likelihood(subject, rows, name)
    asked = spread(with_prompt(subject, rows), settings.generated)
    if asked:
        texts = answers(subject, asked, settings, name)
        numbers["rouge_l_recall"] = fmean(rouge_l_recall(texts, [completion_text(row) for row in asked]))
    return numbers


def likelihood(subject: Subject, rows: Sequence[Mapping], name: str) -> Numbers:
    """Mean over rows of the completion's mean token loss (nats), and of exp(-loss)."""
    return of_losses([reading.loss for reading in score_completions(subject, rows, name)])


def of_losses(losses: Sequence[float]) -> Numbers:
    return {"loss": fmean(losses), "probability": fmean(math.exp(-loss) for loss in losses)}


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


def with_prompt(subject: Subject, rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows that can be answered: all but texts."""
    return [row for row in rows if encode_prompt(row, subject.tokenizer)]


def check_prompts(subject: Subject, rows: Sequence[Mapping], attack: str) -> None:
    """Refuse rows of which none can be answered.

    Raises:
        DataError: they are texts, all of them.
    """
    if not with_prompt(subject, rows):
        raise DataError(
            f"the {attack} attack needs rows with a prompt to answer (question/answer, prompt/completion or messages), "
            "found texts alone; leave it out"
        )
