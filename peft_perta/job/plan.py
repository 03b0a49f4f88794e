"""What a job will do, printed before it does it: steps, rows, predicted time, and where everything goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..data import spread
from ..evaluation import losses_of
from ..gradients import Plan as EnginePlan
from ..model import input_device, show_size, taken
from ._engine_plan import engine_plan
from ._steps import BEFORE, FORGET_ADAPTER, REFINED, TRAINED, UNLEARNED, Step
from ._workshop import ADAPTER, Workshop
from .recipe import STANDS_FOR

_TIMED_ROWS = 8
_BACK_AND_FORTH = 3.0  # forward passes that a forward and backward pass takes as long as
_SEARCH = 6.0  # evaluations of a strength that a search takes, of at most 12


@dataclass
class Plan:
    """The steps that are to be done, with what they are predicted to take.

    Attributes:
        lines: what is known of the job, for people.
        steps: the steps.
        predicted: step -> seconds, where they can be predicted.
        took: step -> seconds, of those that are done.
    """

    lines: list[str]
    steps: Sequence[Step]
    predicted: dict[str, float]
    took: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, workshop: Workshop, steps: Sequence[Step], *, because: str, kept: Sequence[str]) -> Plan:
        """Predict what the steps take, from the time of one forward pass over a few rows.

        Args:
            workshop: the job, with its model.
            steps: what is to be done.
            because: why the method was chosen.
            kept: the steps that are done already.
        """
        per_token = _seconds_per_token(workshop)
        engine = engine_plan(workshop) if {step.name for step in steps} & {UNLEARNED, REFINED} else None
        tokens = _tokens(workshop, engine.cost if engine is not None else 0.0)
        predicted = {step.name: tokens[step.name] * per_token for step in steps if step.name in tokens}
        lines = [*_described(workshop, engine), f"why this method: {because}"]
        return cls([*lines, f"done already: {', '.join(kept)}"] if kept else lines, steps, predicted)

    def __str__(self) -> str:
        width = max(len(step.what) for step in self.steps)
        times = [f"  {step.what:<{width}}  {self.expected(step.name):>9}  -> {step.name}" for step in self.steps]
        return "\n".join([*self.lines, "steps, predicted time, output:", *times])

    def expected(self, name: str) -> str:
        """The time that a step is predicted to take."""
        return clock(self.predicted[name]) if name in self.predicted else "unknown"

    def left(self, name: str, elapsed: float = 0.0) -> str:
        """The predicted time from this step on, as far as it is known, corrected by how long the last steps took.

        Args:
            name: the step.
            elapsed: seconds since it began.
        """
        names = [step.name for step in self.steps]
        ahead = [self.predicted[step] for step in names[names.index(name) :] if step in self.predicted]
        done = [step for step in self.took if step in self.predicted]
        expected = sum(self.predicted[step] for step in done)
        factor = sum(self.took[step] for step in done) / expected if expected else 1.0
        of_others = factor * sum(ahead[name in self.predicted :])
        of_this = max(factor * self.predicted.get(name, 0.0) - elapsed, 0.0)
        return f"about {clock(of_this + of_others)} left, and the time of judging" if ahead else ""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a step."""
        began = time.perf_counter()
        yield
        self.took[name] = time.perf_counter() - began


@dataclass(frozen=True)
class Begun:
    """A step begins; its text is the line that tells of it.

    Attributes:
        plan: the steps that are to be done.
        step: the one that begins.
        number: its place among all steps of the job, those that were done before included.
        of: how many these are.
    """

    plan: Plan
    step: Step
    number: int
    of: int

    def __str__(self) -> str:
        left = self.plan.left(self.step.name)
        return f"step {self.number} of {self.of}: {self.step.what}{left and f' ({left})'}"


def clock(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _seconds_per_token(workshop: Workshop) -> float:
    """Of a forward pass; the first one is not timed, as it warms up."""
    samples = spread(workshop.judged["forget"], _TIMED_ROWS)
    for _ in range(2):
        began = time.perf_counter()
        losses_of(workshop.model, samples, adapters=workshop.full, batch_size=_TIMED_ROWS)
        seconds = time.perf_counter() - began
    return seconds / sum(len(sample.input_ids) for sample in samples)


def _tokens(workshop: Workshop, engine_cost: float) -> dict[str, float]:
    """Step -> the tokens that its forward passes read, a backward pass counted as two.

    Args:
        workshop: the job.
        engine_cost: forward-equivalents of the step that takes gradients.
    """
    recipe = workshop.recipe
    of_set = {name: sum(len(sample.input_ids) for sample in samples) for name, samples in workshop.samples.items()}
    evaluation = sum(len(sample.input_ids) for samples in workshop.judged.values() for sample in samples)
    weighed = engine_cost * (of_set["forget"] + of_set["retain"])
    tokens = {BEFORE: evaluation * (1 if workshop.yardstick is None else 2), ADAPTER: _SEARCH * evaluation}
    if recipe.forget_training is not None:
        tokens[FORGET_ADAPTER] = recipe.forget_training.epochs * of_set["forget"] * _BACK_AND_FORTH
    if recipe.unlearn is not None:
        tokens[UNLEARNED] = weighed
    if recipe.train is not None:
        read = recipe.train.epochs * len(workshop.rows.forget)  # rows of each set
        tokens[TRAINED] = sum(
            read
            * (of_set[name] / len(getattr(workshop.rows, name)))
            * (_BACK_AND_FORTH + sum(forward_pass.is_frozen for forward_pass in loss.reads))
            for name, loss in recipe.train.losses.items()
        )
    if recipe.refine is not None:
        tokens[REFINED] = weighed
    return tokens


def _described(workshop: Workshop, engine: EnginePlan | None) -> list[str]:
    recipe, rows = workshop.recipe, workshop.rows
    device = str(input_device(workshop.model))
    goal = (
        "the loss that was asked for" if recipe.target_forget_loss else f"as forgotten as the {workshop.yardstick_name}"
    )
    if workshop.yardstick is None and not recipe.target_forget_loss:
        goal = "as much forgotten as the tolerance allows"
    kept = f"{len(rows.retain)} to keep for the method, {len(rows.unseen)} to keep that judge"
    if not rows.are_written:
        kept = f"the full model writes those to keep; planned as {kept}"
    guarded = (
        [
            f"retain set: {recipe.retain!r} stands for {STANDS_FOR[recipe.retain]}, and keeps what is like that; "
            "nothing guards what nobody listed"
        ]
        if recipe.retain in STANDS_FOR
        else []
    )
    return [
        f"job: {recipe.model} must forget {recipe.forget}",
        f"rows: {len(rows.forget)} to forget, {kept}",
        *guarded,
        f"goal: {goal}, with the loss on the rows to keep up by at most {recipe.retain_tolerance:g} nats per token",
        f"method: {recipe.method}",
        f"memory: {show_size(taken(device))} in use on {device} with the model{_peak(engine)}; that of training is not "
        "predicted",
        f"everything goes to {Path(workshop.directory)}",
    ]


def _peak(engine: EnginePlan | None) -> str:
    """The predicted memory of the step that takes gradients."""
    if engine is None:
        return ""
    peaks = [f"{show_size(size)} of {show_size(engine.budget[pool])} on {pool}" for pool, size in engine.peak.items()]
    return f", at most {', '.join(peaks)} while the inputs are weighed"
