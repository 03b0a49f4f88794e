"""What every runtime is asked, what it answers, and the files that it reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Scores = list[tuple[float, bool]]  # of each token: its log-probability, and whether it is the likeliest
Scorer = Callable[[list[int], int], Scores]  # (token ids, where the answer starts) -> the scores of the answer


@dataclass(frozen=True)
class Question:
    """One text to score.

    Attributes:
        kind: 'forget', 'retain', or 'greedy' for an answer that the yardstick gave.
        ids: the tokens of the prompt and of the answer.
        start: the place of the answer's first token.
    """

    kind: str
    ids: list[int]
    start: int


@dataclass(frozen=True)
class Place:
    """The files of a run.

    Attributes:
        base: the directory of the base.
        quantised: the base's GGUF, as it comes.
        task: the task adapter's directory.
        negative: the negative adapter's directory.
        output: the directory of everything that is written.
    """

    base: Path
    quantised: Path
    task: Path
    negative: Path
    output: Path

    def exported(self, name: str) -> Path:
        """The directory of an export."""
        return self.output / "exports" / name


@dataclass(frozen=True)
class Runtime:
    """A way to serve.

    Attributes:
        name: in the table.
        package: which must be installed.
        serves: 'adapters', or 'base' for the base without adapters.
        weights: of the base as it is served.
        open: gives the scorer.
    """

    name: str
    package: str
    serves: str
    weights: str
    open: Callable[[Place], Scorer]


def scores_of(logits: np.ndarray, ids: list[int], start: int) -> Scores:
    """The scores of the tokens from ``start`` on, from the logits [T, V] at every token."""
    found = []
    for place in range(start, len(ids)):
        row = logits[place - 1].astype(np.float64)
        shifted = row - row.max()
        found.append((float(shifted[ids[place]] - np.log(np.exp(shifted).sum())), int(row.argmax()) == ids[place]))
    return found


def write_questions(file: Path, questions: list[Question]) -> None:
    """Keep the questions."""
    file.write_text(json.dumps([dataclasses.asdict(question) for question in questions]), encoding="utf-8")


def read_questions(file: Path) -> list[Question]:
    """The questions that were kept."""
    return [Question(**values) for values in json.loads(file.read_text(encoding="utf-8"))]


def answers(scorer: Scorer, questions: list[Question]) -> list[dict[str, Any]]:
    """The scores of every question, as they are kept."""
    return [{"kind": each.kind, "scores": scorer(each.ids, each.start)} for each in questions]
