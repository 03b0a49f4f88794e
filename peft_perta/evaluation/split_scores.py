"""Scores of one split of rows: loss, probability, ROUGE-L and truth score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..data import completion_text
from ..errors import DataError
from .completions import losses_of
from .generation import generate
from .metrics.probability import probability
from .metrics.rouge import rouge_l_recall
from .metrics.truth_ratio import forget_truth_score, retain_truth_score, truth_ratio
from .subject import Subject


@dataclass(frozen=True)
class SplitScores:
    """The scores of one split.

    Attributes:
        rows: their number.
        loss: mean over rows of the answer's mean token loss, nats.
        probability: mean over rows of exp(-loss).
        rouge_l_recall: mean over the rows that were answered; None where none was.
        truth_score: ``forget_truth_score`` on the forget split, ``retain_truth_score`` elsewhere; None where no false
            answers were scored.
    """

    rows: int
    loss: float
    probability: float
    rouge_l_recall: float | None
    truth_score: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def evaluate_split(
    subject: Subject,
    rows: Sequence[Mapping],
    *,
    is_forget: bool,
    generated: int = 0,
    compared: int | None = None,
    max_new_tokens: int = 96,
) -> SplitScores:
    """Score the model on rows of a split. The model is left as it was.

    Args:
        subject: the model with its adapters.
        rows: {question, answer[, paraphrased_answer, perturbed_answer]}.
        is_forget: selects the truth score of the forget split.
        generated: the number of rows, from the first, that are answered greedily for ROUGE-L.
        compared: the number of rows, from the first, whose false answers are scored for the truth score; None for all.
        max_new_tokens: the most tokens of an answer.

    Raises:
        DataError: there are no rows, or one is malformed.
    """
    losses = _losses(subject, rows)
    recalls = None
    if generated:
        asked = rows[:generated]
        texts = generate(subject, asked, max_new_tokens=max_new_tokens)
        recalls = rouge_l_recall(texts, [completion_text(row) for row in asked])
    with_false_answers = [row for row in rows[:compared] if row.get("perturbed_answer")]
    truth = None
    if with_false_answers:
        ratios = _truth_ratios(subject, with_false_answers)
        truth = forget_truth_score(ratios) if is_forget else retain_truth_score(ratios)
    return SplitScores(
        rows=len(rows),
        loss=float(losses.mean()),
        probability=float(probability(losses).mean()),
        rouge_l_recall=sum(recalls) / len(recalls) if recalls else None,
        truth_score=truth,
    )


def _losses(subject: Subject, rows: Sequence[Mapping]) -> Tensor:
    samples = subject.encode(rows, "rows")
    return losses_of(subject.model, samples, adapters=subject.adapters, batch_size=subject.batch_size)


def _truth_ratios(subject: Subject, rows: Sequence[Mapping]) -> Tensor:
    for row in rows:
        false = row["perturbed_answer"]
        if "question" not in row or not isinstance(false, list):
            raise DataError(
                "expected perturbed_answer as a list of false answers beside a question, found "
                f"{type(false).__name__} beside {sorted(map(str, row))}"
            )
    true_rows = [{"question": r["question"], "answer": r.get("paraphrased_answer") or r["answer"]} for r in rows]
    false_rows = [{"question": r["question"], "answer": answer} for r in rows for answer in r["perturbed_answer"]]
    losses = _losses(subject, [*true_rows, *false_rows])
    counts = [len(row["perturbed_answer"]) for row in rows]
    return truth_ratio(losses[: len(rows)], list(losses[len(rows) :].split(counts)))
