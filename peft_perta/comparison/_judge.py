"""The measurements of one run: losses, the suite's metrics, and what attacks recover."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation import AttackSettings, Log, Splits, Subject, Victims, aggregate, evaluate, run_attacks, summary
from .bench import Bench, Stack
from .settings import COMPARING, ComparisonSettings

_RELEARNED_ROWS = 10


@dataclass(frozen=True)
class Judge:
    """Measures stacks of adapters on one bench.

    Attributes:
        bench: the model and its rows.
        suite_rows: the splits that only the suite reads; the forget and retain rows are the bench's, where they have
            false answers.
        settings: sizes of the measurements.
    """

    bench: Bench
    suite_rows: Splits
    settings: ComparisonSettings

    def log(self, stack: Stack) -> Log:
        """The suite's log of the stack, without metrics that compare it with the retain-only model."""
        own = {"forget": self.bench.setup.forget_rows, "retain": self.bench.held_out_rows}
        answered = {name: [row for row in rows if row.get("perturbed_answer")] for name, rows in own.items()}
        splits = {**self.suite_rows, **{name: rows for name, rows in answered.items() if rows}}
        if not self.settings.suite_rows or not splits:
            return {}
        with self.bench.scaled(stack):
            return evaluate(
                self.bench.model,
                self.bench.tokenizer,
                {"tofu": splits},
                adapters=stack.adapters,
                rows=self.settings.suite_rows,
                max_new_tokens=self.settings.max_new_tokens,
                show_progress_bar=False,
            )["tofu"]

    def measure(self, stack: Stack, retain_only: Log | None, log: Log | None = None) -> dict[str, Any]:
        """The part of a result that says what the stack knows.

        Args:
            retain_only: the retain-only model's log, which some metrics compare with; None without one.
            log: the stack's own log, if it is known.
        """
        rows = self.bench.row_scores(stack)
        log = log if log is not None else self.log(stack)
        return {
            "losses": {split: statistics.fmean(rows[split]["loss"]) for split in rows},
            "probabilities": {split: statistics.fmean(map(_probability, rows[split]["loss"])) for split in rows},
            "missed": statistics.fmean(rows["forget"]["missed"]),
            "rows": rows,
            "scores": summary(aggregate(log, retain_only or None)) if log else {},
            "attacks": self._attack(stack) if self.settings.attacks else [],
        }

    def _attack(self, stack: Stack) -> list[dict[str, Any]]:
        subject = Subject(self.bench.model, self.bench.tokenizer, stack.adapters, show_progress_bar=False)
        rows = self.bench.judged_rows["forget"]
        settings = AttackSettings(
            relearning_rows=(min(_RELEARNED_ROWS, max(1, len(rows) // 2)),),
            generated=self.settings.suite_rows,
            max_new_tokens=self.settings.max_new_tokens,
        )
        # The full and the retain-only model have results of their own, and are no victims but for what compares them.
        alone, beside = Victims(subject, None, None, rows), Victims(subject, *self._others(subject), rows)
        with self.bench.scaled(stack):
            results = [
                result
                for name in self.settings.attacks
                for result in run_attacks(beside if name in COMPARING else alone, [name], settings)
            ]
        return [{"attack": r.attack, "setting": r.setting, **r.unlearned} for r in results]

    def _others(self, subject: Subject) -> tuple[Subject, Subject | None]:
        """The full and the retain-only model."""
        full = replace(subject, adapters=self.bench.full.adapters)
        yardstick = self.bench.retain_only
        return full, None if yardstick is None else replace(subject, adapters=yardstick.adapters)


def _probability(loss: float) -> float:
    return math.exp(-loss)
