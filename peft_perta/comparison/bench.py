"""The bench that the comparison and the demo share: a model, a forget adapter, rows, and the measurements on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data import Sample, encode_row, read_rows, spread
from ..evaluation import Match, Subject, exact_memorization, losses_of, match_forgetting, score_completions
from ..model import adapter_strength, attach_adapters, load_base, row_length
from ..training import default_lora_config, train_forget_adapter
from ._method import Setup
from .settings import MEASURES, BenchSettings

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("forget", "retain", "general")
Losses = dict[str, float]  # split -> mean loss of its judged rows, nats per token


def prepare(
    settings: BenchSettings, *, four_bit: bool, assets: Path = ASSETS
) -> tuple[PeftModel, Any, dict[str, list[dict]]]:
    """Load a model and its rows, and train a forget adapter.

    Args:
        settings: training of the forget adapter, and which forget rows there are.
        four_bit: quantise the base to NF4.
        assets: directory of the model and its rows.

    Returns:
        The model with the adapters 'forget' (trained here), 'task' and 'retain-only'; its tokenizer; and split -> rows.
    """
    rows = {name: read_rows(assets / f"{name}.jsonl") for name in SPLITS}
    rows["forget"] = rows["forget"][-(settings.forget_rows or 0) :]
    base, tokenizer = load_base(str(assets / "base"), four_bit=four_bit)
    model = train_forget_adapter(
        base,
        rows["forget"],
        tokenizer,
        lora_config=default_lora_config(settings.rank),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=0.05,
        logging_strategy="no",
        seed=settings.seed,
    )
    attach_adapters(model, {"task": assets / "task_adapter", "retain-only": assets / "retain_adapter"})
    return model, tokenizer, rows


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the wall time of the block as ``seconds[stage]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - start, 2)


@dataclass(frozen=True)
class Stack:
    """The adapters that are on together; the strength scales the last one."""

    adapters: Sequence[str]
    strength: float = 1.0

    def at(self, strength: float) -> Stack:
        """The same adapters at another strength."""
        return replace(self, strength=strength)


FULL_STACK, RETAIN_ONLY_STACK = Stack(["task"]), Stack(["retain-only"])


class Bench:
    """A model with one forget adapter, the rows that a method may use, and the rows that are judged.

    Attributes:
        setup: the input of every method.
        held_out_rows: the retain rows that no method uses.
        judged_rows: split -> rows whose losses are measured.
    """

    def __init__(self, settings: BenchSettings, *, four_bit: bool = False, assets: Path = ASSETS) -> None:
        self.settings = settings
        self.model, self.tokenizer, rows = prepare(settings, four_bit=four_bit, assets=assets)
        self.setup = Setup(
            model=self.model,
            tokenizer=self.tokenizer,
            forget_rows=rows["forget"],
            retain_rows=rows["retain"][::2][: settings.weight_samples],
            rank=settings.rank,
            seed=settings.seed,
        )
        self.held_out_rows = rows["retain"][1::2]
        judged = {**rows, "retain": self.held_out_rows}
        self.judged_rows = {name: spread(judged[name], settings.judged_rows) for name in SPLITS}
        self._samples = {name: self._encoded(split) for name, split in self.judged_rows.items()}

    def _encoded(self, rows: list[dict]) -> list[Sample]:
        length = row_length(self.model, None)
        return [encode_row(row, self.tokenizer, max_length=length) for row in rows]

    @cached_property
    def training_cost(self) -> float:
        """Forward-equivalents of the forget adapter's training.

        Each epoch is a forward and backward pass (2) of the forget set; a forward pass of both sets counts 1.
        """
        forget, retain = (
            sum(len(sample.input_ids) for sample in self._encoded(rows))
            for rows in (self.setup.forget_rows, self.setup.retain_rows)
        )
        return 2 * self.settings.epochs * forget / (forget + retain)

    def scaled(self, stack: Stack) -> AbstractContextManager[None]:
        """Within the block, the stack's last adapter is at the stack's strength."""
        return adapter_strength(self.model, stack.adapters[-1], stack.strength)

    def losses(self, stack: Stack, splits: Sequence[str] = SPLITS) -> Losses:
        """Mean loss of the judged rows of each split, nats per token."""
        with self.scaled(stack):
            return {
                name: float(losses_of(self.model, self._samples[name], adapters=stack.adapters).mean())
                for name in splits
            }

    def forgetting(self, stack: Stack) -> float:
        """How much of the judged forget rows is forgotten, in the measure of the settings."""
        if self.settings.matched == "loss":
            return self.losses(stack, ("forget",))["forget"]
        subject = Subject(self.model, self.tokenizer, stack.adapters, show_progress_bar=False)
        with self.scaled(stack):
            completions = score_completions(subject, self.judged_rows["forget"])
        shares = [exact_memorization(completion.tokens.hits) for completion in completions]
        return 1 - statistics.fmean(share for share in shares if share is not None)

    @cached_property
    def target(self) -> float:
        """How much the retain-only model 'forgot': what every edit is matched to."""
        return self.forgetting(RETAIN_ONLY_STACK)

    @cached_property
    def _forgetting_of_full(self) -> float:
        return self.forgetting(FULL_STACK)

    def match(self, stack: Stack, *, tolerance: float) -> Match:
        """Search the strength at which the stack forgets as much as the retain-only model.

        Args:
            stack: adapters whose last one is scaled; at strength 0 they are the full model.
            tolerance: of the target, relative.

        Raises:
            NumericalError: no strength reaches the target.
        """

        def forgetting_at(strength: float) -> float:
            return self.forgetting(stack.at(strength)) if strength else self._forgetting_of_full

        measure = MEASURES[self.settings.matched]
        return match_forgetting(forgetting_at, self.target, tolerance=tolerance, measure=measure)

    def curve(
        self, stack: Stack, strengths: Sequence[float], measured: Mapping[float, Losses] | None = None
    ) -> list[Losses]:
        """The losses at each strength, as points {'strength', split: loss}.

        Args:
            measured: strength -> losses that need not be measured again.
        """
        measured = measured or {}
        return [{"strength": s, **(measured.get(s) or self.losses(stack.at(s)))} for s in strengths]
