"""Report data from forget and retain rows, without an evaluation suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data import ROW_KINDS, completion_text, content_text, spread
from ..evaluation import Subject, evaluate_split, generate
from .report_data import SHOWN_ROWS, ReportData, ReportHeader, build_report_data

SCORED_ROWS = 50  # rows of each split whose loss is measured


def report_data_of_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Mapping[str, Sequence[dict]],
    stacks: Mapping[str, Sequence[str]],
    header: ReportHeader,
    *,
    max_new_tokens: int = 96,
) -> ReportData:
    """Measure losses of, and generate answers to, a few rows with each stack of adapters on one model.

    Args:
        model: the base model with every adapter attached.
        tokenizer: the model's tokenizer.
        rows: ``forget`` and ``retain`` -> rows of any kind. At most ``SCORED_ROWS`` evenly spaced rows of each are
            scored, and at most ``SHOWN_ROWS`` answered. Rows of plain text get no answer.
        stacks: model label (``full``, ``unlearned``) -> names of the adapters that are on.
        header: what the report is about.
        max_new_tokens: upper limit on the length of an answer.

    Returns:
        Mean loss (nats per token), mean probability and generations for each stack and split.

    Raises:
        AdapterError: an adapter is not on the model, or the last adapter's provenance is damaged.
        DataError: a row is malformed.
    """
    models: dict[str, dict[str, float]] = {label: {} for label in stacks}
    generations: dict[str, list[dict[str, str]]] = {}
    for split, split_rows in rows.items():
        asked = [row for row in spread(list(split_rows), SHOWN_ROWS) if _has_prompt(row)]
        answers = {}
        for label, stack in stacks.items():
            subject = Subject(model, tokenizer, stack)
            scored = spread(list(split_rows), SCORED_ROWS)
            scores = evaluate_split(subject, scored, is_forget=split == "forget", compared=0)
            models[label][f"{split}_Q_A_Prob"] = scores.probability
            models[label][f"{split}_loss"] = scores.loss
            if asked:
                answers[label] = generate(subject, asked, max_new_tokens=max_new_tokens, name=f"{split}: {label}")
        generations[split] = [
            {
                "prompt": _question(row),
                "expected": completion_text(row),
                **{label: texts[place] for label, texts in answers.items()},
            }
            for place, row in enumerate(asked)
        ]
    return build_report_data(header, models, generations)


def _has_prompt(row: Mapping[str, Any]) -> bool:
    return any(set(kind) <= set(row) for kind in ROW_KINDS if kind != ("text",))


def _question(row: Mapping[str, Any]) -> str:
    """The row's prompt as plain text."""
    prompt = row.get("question") or row.get("prompt") or row["messages"][:-1]
    return prompt if isinstance(prompt, str) else content_text(prompt[-1].get("content")) or ""
