"""The measurements of one run: losses, the suite's metrics, and what attacks recover."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..data import spread
from ..evaluation import (
    AttackSettings,
    Log,
    Splits,
    Subject,
    Victims,
    aggregate,
    depth_score,
    evaluate,
    patched_falls,
    run_attacks,
    summary,
)
from .bench import Bench, Stack
from .settings import ComparisonSettings

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
            "depth": self._depth(stack),
            "attacks": self._attack(stack) if self.settings.attacks else [],
        }

    def _attack(self, stack: Stack) -> list[dict[str, Any]]:
        subject = Subject(self.bench.model, self.bench.tokenizer, stack.adapters, show_progress_bar=False)
        rows = self.bench.judged_rows["forget"]
        settings = AttackSettings(
            relearning_rows=(min(_RELEARNED_ROWS, max(1, len(rows) // 2)),),
            generated=max(1, self.settings.suite_rows),
            max_new_tokens=self.settings.max_new_tokens,
        )
        victims = Victims(subject, None, None, rows)  # the full and the retain-only model have results of their own
        with self.bench.scaled(stack):
            results = run_attacks(victims, self.settings.attacks, settings)
        return [{"attack": r.attack, "setting": r.setting, **r.unlearned} for r in results]

    def _depth(self, stack: Stack) -> float | None:
        """The unlearning depth score; None where there is no retain-only model, or no block carries a row."""
        if not self.settings.depth_rows or self.bench.retain_only is None:
            return None
        with self.bench.scaled(stack):
            gone = self._falls(stack)
        score = float(depth_score(self._carried, gone).nanmean())
        return None if math.isnan(score) else score

    @cached_property
    def _carried(self) -> Tensor:
        assert self.bench.retain_only is not None
        return self._falls(self.bench.retain_only)

    def _falls(self, stack: Stack) -> Tensor:
        full, source = (
            Subject(self.bench.model, self.bench.tokenizer, adapters, show_progress_bar=False)
            for adapters in (self.bench.full.adapters, stack.adapters)
        )
        samples = spread(self.bench.samples["forget"], self.settings.depth_rows)
        return patched_falls(full, source, samples, "depth")


def _probability(loss: float) -> float:
    return math.exp(-loss)
