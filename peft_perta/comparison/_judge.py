"""The measurements of one run: losses, the suite's metrics, and what attacks recover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..evaluation import AttackSettings, Log, Splits, Subject, Victims, aggregate, evaluate, run_attacks, summary
from .bench import Bench, Stack
from .settings import ComparisonSettings

_RELEARNED_ROWS = 10


@dataclass(frozen=True)
class Judge:
    """Measures stacks of adapters on one bench.

    Attributes:
        bench: the model and its rows.
        suite_splits: the splits that only the suite reads; the forget and retain rows are the bench's.
        settings: sizes of the measurements.
    """

    bench: Bench
    suite_splits: Splits
    settings: ComparisonSettings

    def log(self, stack: Stack) -> Log:
        """The suite's log of the stack, without metrics that compare it with the retain-only model."""
        rows = {
            **self.suite_splits,
            "forget": self.bench.setup.forget_rows,
            "retain": [row for row in self.bench.held_out_rows if row.get("perturbed_answer")],
        }
        with self.bench.scaled(stack):
            return evaluate(
                self.bench.model,
                self.bench.tokenizer,
                {"tofu": rows},
                adapters=stack.adapters,
                rows=self.settings.suite_rows,
                max_new_tokens=self.settings.max_new_tokens,
                show_progress_bar=False,
            )["tofu"]

    def measure(self, stack: Stack, retain_only: Log, log: Log | None = None) -> dict[str, Any]:
        """The part of a result that says what the stack knows.

        Args:
            retain_only: the retain-only model's log, which some metrics compare with.
            log: the stack's own log, if it is known.
        """
        log = log or self.log(stack)
        return {
            "losses": self.bench.losses(stack),
            "scores": summary(aggregate(log, retain_only)),
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
        victims = Victims(subject, None, None, rows)  # the full and the retain-only model have results of their own
        with self.bench.scaled(stack):
            results = run_attacks(victims, self.settings.attacks, settings)
        return [{"attack": r.attack, "setting": r.setting, **r.unlearned} for r in results]
