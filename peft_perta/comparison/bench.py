"""The bench that the comparison and the demo share: a model, a forget adapter, rows, and the measurements on them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data import Sample, encode_row, spread
from ..evaluation import (
    Match,
    Subject,
    exact_memorization,
    losses_of,
    match_forgetting,
    normalised_probability,
    score_completions,
    score_false_answers,
)
from ..model import CONFIG_NAME, adapter_strength, attach_adapters, input_device, load_base, row_length
from ..training import default_lora_config, train_forget_adapter
from .method import WARMUP, Setup
from .settings import MEASURES, BenchSettings
from .testbed import SPLITS, Testbed, has_options, small

JUDGED = ("forget", "retain", "seen", "general")  # 'retain': no method saw them; 'seen': retain rows that methods use
Losses = dict[str, float]  # split -> mean loss of its judged rows, nats per token
RowScores = dict[str, dict[str, list[float]]]  # split -> key of ``ROW_SCORES`` -> one value for each row
ROW_SCORES = {"loss": "loss", "first-choice": "missed", "options": "misled"}  # measure of forgetting -> key


def prepare(
    settings: BenchSettings,
    *,
    four_bit: bool,
    testbed: Testbed | None = None,
    cache: Path | None = None,
    has_forget_adapter: bool = True,
) -> tuple[PeftModel, Any, dict[str, list[dict]]]:
    """Load a model and its rows, and train a forget adapter.

    Args:
        settings: training of the forget adapter, and which forget rows there are.
        four_bit: quantise the base to NF4.
        testbed: the model and its rows; by default the shipped one.
        cache: directory of the trained forget adapter: it is read from there, or written there.
        has_forget_adapter: False trains none, where the testbed has a task adapter.

    Returns:
        The model with the adapters 'forget' (trained here) and, where the testbed has them, 'task' and 'retain-only';
        its tokenizer; and split -> rows.
    """
    testbed = testbed or small()
    rows = dict(testbed.rows)
    rows["forget"] = rows["forget"][-(settings.forget_rows or 0) :]
    model, tokenizer = load_base(testbed.base, four_bit=four_bit)
    if cache is not None and (cache / CONFIG_NAME).is_file():
        model = attach_adapters(model, {"forget": cache})
    elif has_forget_adapter or testbed.task_adapter is None:
        model = train_forget_adapter(
            model,
            rows["forget"],
            tokenizer,
            cache,
            lora_config=default_lora_config(settings.rank),
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            warmup_steps=WARMUP,
            logging_strategy="no",
            seed=settings.seed,
        )
    others = {"task": testbed.task_adapter, "retain-only": testbed.retain_only_adapter}
    model = attach_adapters(model, {name: path for name, path in others.items() if path is not None})
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


class StrengthPath:
    """How much is forgotten along an adapter's strength, in every measure. Each strength is scored once.

    Args:
        score: strength -> measure of ``MEASURES`` -> how much is forgotten.
        at_zero: the same at strength 0.
        target: measure -> how much is to be forgotten.
    """

    def __init__(
        self,
        score: Callable[[float], dict[str, float]],
        at_zero: dict[str, float],
        target: Callable[[str], float],
    ) -> None:
        self._score, self._target = score, target
        self._scored = {0.0: at_zero}

    def at(self, strength: float) -> dict[str, float]:
        """Measure -> how much is forgotten at this strength."""
        if strength not in self._scored:
            self._scored[strength] = self._score(strength)
        return self._scored[strength]

    def match(self, measure: str, *, tolerance: float) -> Match:
        """The strength that meets the target in this measure; the errors are those of ``match_forgetting``."""

        return match_forgetting(
            lambda strength: self.at(strength)[measure],
            self._target(measure),
            tolerance=tolerance,
            measure=MEASURES[measure],
            known={strength: scores[measure] for strength, scores in self._scored.items()},
        )


class Bench:
    """A model with its adapters, the rows that a method may use, and the rows that are judged.

    Attributes:
        setup: the input of every method.
        held_out_rows: the retain rows that no method uses.
        judged_rows: split of ``JUDGED`` -> rows that are scored.
        samples: the same, tokenised.
        measures: the measures of forgetting that have a target.
        full, origin: the stacks of the full model and of the base alone.
        retain_only: the stack of the retain-only model; None without one.
    """

    def __init__(
        self,
        settings: BenchSettings,
        *,
        four_bit: bool = False,
        testbed: Testbed | None = None,
        cache: Path | None = None,
        has_forget_adapter: bool = True,
    ) -> None:
        self.settings = settings
        testbed = testbed or small()
        self.model, self.tokenizer, rows = prepare(
            settings, four_bit=four_bit, testbed=testbed, cache=cache, has_forget_adapter=has_forget_adapter
        )
        has_task = testbed.task_adapter is not None
        self.origin, self.full = Stack([]), Stack(["task"] if has_task else [])
        self.retain_only = Stack(["retain-only"]) if testbed.retain_only_adapter is not None else None
        self._target_forget_loss = testbed.target_forget_loss
        self.measures = testbed.measures
        self.setup = Setup(
            model=self.model,
            tokenizer=self.tokenizer,
            forget_rows=rows["forget"],
            retain_rows=rows["retain"][::2][: settings.weight_samples],
            rank=settings.rank,
            seed=settings.seed,
            task_adapter="task" if has_task else None,
        )
        self.held_out_rows = rows["retain"][1::2]
        judged = {**rows, "retain": self.held_out_rows, "seen": self.setup.retain_rows}
        self.judged_rows = {name: spread(judged[name], settings.judged_rows) for name in JUDGED}
        self.samples = {name: self._encoded(split) for name, split in self.judged_rows.items()}

    def _encoded(self, rows: list[dict]) -> list[Sample]:
        length = row_length(self.model, None)
        return [encode_row(row, self.tokenizer, max_length=length) for row in rows]

    @property
    def yardstick(self) -> Stack:
        """What forgetting is matched to: the retain-only model, or the origin without one."""
        return self.retain_only or self.origin

    @property
    def device(self) -> str:
        """The device that computes, such as 'cpu' or 'cuda:0'."""
        return str(input_device(self.model))

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

    def edited(self, adapter_name: str, strength: float = 1.0) -> Stack:
        """The full model with an adapter on top, at that strength."""
        return Stack([*self.full.adapters, adapter_name], strength)

    def scaled(self, stack: Stack) -> AbstractContextManager[None]:
        """Within the block, the stack's last adapter is at the stack's strength."""
        if not stack.adapters:
            return nullcontext()
        return adapter_strength(self.model, stack.adapters[-1], stack.strength)

    def losses(self, stack: Stack, splits: Sequence[str] = SPLITS) -> Losses:
        """Mean loss of the judged rows of each split, nats per token."""
        with self.scaled(stack):
            return {
                name: float(losses_of(self.model, self.samples[name], adapters=stack.adapters).mean())
                for name in splits
            }

    def row_scores(self, stack: Stack, splits: Sequence[str] = JUDGED) -> RowScores:
        """Of each judged row the loss, nats per token, and the share of its tokens that are not the first choice; where
        forgetting is measured by options, also the probability of its false answers among all."""
        subject = Subject(self.model, self.tokenizer, stack.adapters, show_progress_bar=False)
        scores: RowScores = {}
        with self.scaled(stack):
            for name in splits:
                scored = score_completions(subject, self.judged_rows[name], name)
                shares = [exact_memorization(row.tokens.hits) for row in scored]
                scores[name] = {
                    "loss": [row.loss for row in scored],
                    "missed": [1 - share for share in shares if share is not None],
                }
                if "options" in self.measures and has_options(self.judged_rows[name]):
                    scores[name]["misled"] = self._misled(subject, name, [row.loss for row in scored])
        return scores

    def _misled(self, subject: Subject, split: str, losses: Sequence[float]) -> list[float]:
        """The probability of each row's false answers among all its answers; ``losses`` are those of the true ones."""
        false = score_false_answers(subject, self.judged_rows[split], split)
        return [
            1 - normalised_probability(math.exp(-loss), [math.exp(-answer.loss) for answer in answers])
            for loss, answers in zip(losses, false, strict=True)
        ]

    def forgetting(self, stack: Stack, measure: str) -> float:
        """How much of the judged forget rows is forgotten, in a measure of ``MEASURES``."""
        return self._all_forgetting(stack)[measure]

    def _all_forgetting(self, stack: Stack) -> dict[str, float]:
        """Measure -> how much of the judged forget rows is forgotten: one pass gives them all."""
        scores = self.row_scores(stack, ("forget",))["forget"]
        return {measure: statistics.fmean(scores[key]) for measure, key in ROW_SCORES.items() if key in scores}

    def target(self, measure: str) -> float:
        """How much the yardstick 'forgot', which every edit is matched to: the retain-only model, else the forget loss
        that stands for one, else the base alone, else chance.

        Args:
            measure: one of ``measures``.
        """
        if measure not in self._targets:
            self._targets[measure] = self._measured_target(measure)
        return self._targets[measure]

    @cached_property
    def _targets(self) -> dict[str, float]:
        return {}

    def _measured_target(self, measure: str) -> float:
        if measure == "options":
            counts = [len(row["perturbed_answer"]) for row in self.judged_rows["forget"]]
            return statistics.fmean(count / (count + 1) for count in counts)
        return self._target_forget_loss or self.forgetting(self.yardstick, measure)

    @cached_property
    def _forgetting_of_full(self) -> dict[str, float]:
        return self._all_forgetting(self.full)

    def match(self, stack: Stack, measure: str = "loss", *, tolerance: float) -> Match:
        """Search the strength at which the stack forgets as much as the retain-only model.

        Args:
            stack: adapters whose last one is scaled; at strength 0 they are the full model.
            measure: a key of ``MEASURES``.
            tolerance: of the target, relative.

        Raises:
            NumericalError: no strength reaches the target.
        """
        return self.path(stack).match(measure, tolerance=tolerance)

    def path(self, stack: Stack) -> StrengthPath:
        """The strengths of a stack, for matching it in several measures: a strength is scored once for all."""
        return StrengthPath(lambda strength: self._all_forgetting(stack.at(strength)), self._forgetting_of_full,
                            self.target)  # fmt: skip

    def curve(
        self, stack: Stack, strengths: Sequence[float], measured: Mapping[float, Losses] | None = None
    ) -> list[Losses]:
        """The losses at each strength, as points {'strength', split: loss}.

        Args:
            measured: strength -> losses that need not be measured again.
        """
        measured = measured or {}
        return [{"strength": s, **(measured.get(s) or self.losses(stack.at(s)))} for s in strengths]
