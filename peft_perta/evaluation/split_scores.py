"""Scores of one split of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..data import completion_text
from ..errors import DataError
from .completions import row_losses
from .generation import generate
from .metrics.probability import probability
from .metrics.rouge import rouge_l_recall
from .metrics.truth_ratio import forget_truth_score, retain_truth_score, truth_ratio


@dataclass(frozen=True)
class SplitScores:
    """One split of rows, judged.

    Attributes:
        loss: mean over rows of the answers' mean token loss, nats.
        probability: mean over rows of exp(-loss).
        rouge_l_recall: mean over the first ``generated`` rows, of greedy generations; None where nothing was generated.
        truth_score: ``forget_truth_score`` on the forget split, ``retain_truth_score`` elsewhere; None where the rows
            hold no false answers.
    """

    rows: int
    loss: float
    probability: float
    rouge_l_recall: float | None
    truth_score: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_split(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping],
    *,
    is_forget: bool,
    adapters: Sequence[str] | None = None,
    generated: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 96,
) -> SplitScores:
    """Judge the model on rows {question, answer[, paraphrased_answer, perturbed_answer]}, with these adapters on.

    Args:
        is_forget: which of the two truth scores is taken.
        adapters: as for ``preserved``; the model goes back as it came.
        generated: how many rows, from the first, are answered greedily for ROUGE-L.

    Raises:
        DataError: there are no rows, or one is malformed.
    """
    losses = row_losses(model, tokenizer, rows, adapters=adapters, batch_size=batch_size)
    rouge = None
    if generated:
        asked = rows[:generated]
        texts = generate(
            model, tokenizer, asked, adapters=adapters, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        rouge = rouge_l_recall(texts, [completion_text(row) for row in asked])
    judged = [row for row in rows if row.get("perturbed_answer")]
    truth = None
    if judged:
        ratios = _truth_ratios(model, tokenizer, judged, adapters, batch_size)
        truth = forget_truth_score(ratios) if is_forget else retain_truth_score(ratios)
    return SplitScores(
        rows=len(rows),
        loss=float(losses.mean()),
        probability=float(probability(losses).mean()),
        rouge_l_recall=sum(rouge) / len(rouge) if rouge else None,
        truth_score=truth,
    )


def _truth_ratios(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping], adapters: Sequence[str] | None, batch_size: int
) -> Tensor:
    for row in rows:
        false = row["perturbed_answer"]
        if "question" not in row or not isinstance(false, list):
            raise DataError(
                "expected perturbed_answer as a list of false answers beside a question, found "
                f"{type(false).__name__} beside {sorted(map(str, row))}"
            )
    true_rows = [{"question": r["question"], "answer": r.get("paraphrased_answer") or r["answer"]} for r in rows]
    false_rows = [{"question": r["question"], "answer": answer} for r in rows for answer in r["perturbed_answer"]]
    losses = row_losses(model, tokenizer, [*true_rows, *false_rows], adapters=adapters, batch_size=batch_size)
    counts = [len(row["perturbed_answer"]) for row in rows]
    return truth_ratio(losses[: len(rows)], list(losses[len(rows) :].split(counts)))
