"""A strength that meets a stated goal, by forward passes only: an adapter's scale is one scalar, nothing is rebuilt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..data import Sample
from ..errors import ConfigError, DataError
from ..model import adapter_strength, require_adapter
from .completions import losses_of
from .logs.files import read_log
from .logs.rescoring import row_values
from .strength import match_forgetting, most_forgetting

MAX_EVALUATIONS = 12


TOLERANCE = 0.02  # of the goal; the search itself aims closer


@dataclass(frozen=True)
class Goal:
    """What a strength must reach: just one of the two.

    Attributes:
        target_forget_loss: the mean loss on the forget rows, for instance that of a model that never saw them.
        retain_tolerance: how far the mean loss on the retain rows may rise, nats per token, for the most forgetting.

    Raises:
        ConfigError: none or both are given, or a value is not finite and above 0.
    """

    target_forget_loss: float | None = None
    retain_tolerance: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.target_forget_loss, self.retain_tolerance) if value is not None]
        if len(given) != 1 or not (isinstance(given[0], (int, float)) and 0 < given[0] < math.inf):
            raise ConfigError(
                "a goal is either a forget loss or a retain tolerance, finite and above 0; found "
                f"target_forget_loss={self.target_forget_loss!r}, retain_tolerance={self.retain_tolerance!r}"
            )


@dataclass
class Calibration:
    """What the search found, and every point that it paid for.

    Attributes:
        goal: what was asked.
        target: the loss that the goal comes to: of the forget rows, or the limit on the retain rows'.
        strength: factor on the adapter as it was given.
        losses: 'forget' and 'retain' there.
        points: {strength, forget, retain}, by strength; 0 is the model without the edit.
        negation: the same of the forget adapter's plain negation, where there is one to compare with.
        reference: {forget, retain} of a model that never saw the forget rows, where it is known.
    """

    goal: dict[str, float | None]
    target: float
    strength: float
    losses: dict[str, float]
    points: list[dict[str, float]]
    negation: list[dict[str, float]] = field(default_factory=list)
    retain_only: dict[str, float] | None = None

    @property
    def reached(self) -> bool:
        """Whether the goal was met within ``TOLERANCE`` of its target; below a limit on the retain loss, it is met as
        well where going further was seen to forget no more."""
        if self.goal["target_forget_loss"] is not None:
            return abs(self.losses["forget"] - self.target) <= TOLERANCE * self.target
        topped = any(
            point["strength"] > self.strength
            and point["retain"] <= self.target
            and point["forget"] <= self.losses["forget"]
            for point in self.points
        )
        return topped or abs(self.losses["retain"] - self.target) <= TOLERANCE * self.target

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        return cls(**values)

    def __str__(self) -> str:
        what = (
            f"a forget loss of {self.target:.3f}"
            if self.goal["target_forget_loss"] is not None
            else f"the most forgetting at a retain loss of at most {self.target:.3f}"
        )
        return (
            f"strength {self.strength:.4g} for {what}: forget loss {self.losses['forget']:.3f}, retain loss "
            f"{self.losses['retain']:.3f} (without the edit {self.points[0]['forget']:.3f} and "
            f"{self.points[0]['retain']:.3f}), in {len(self.points)} evaluations"
            + ("" if self.reached else "; the goal was NOT reached within 2 %")
        )


def calibrate(
    model: nn.Module,
    goal: Goal,
    forget: list[Sample],
    retain: list[Sample],
    *,
    adapter_name: str = "perta_unlearn",
    start_adapter: str | None = None,
    with_adapters: Sequence[str] = (),
    negated_adapter: str | None = None,
    retain_only: Sequence[str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> Calibration:
    """Find the strength of an adapter on the model that meets the goal; the model goes back as it came.

    Args:
        forget, retain: the rows that judge, as samples; retain rows that gave no gradients, to be honest.
        start_adapter: where the adapter's own training began, if not at zero: at strength s, 1 - s of it is on beside.
        with_adapters: the adapters that are on beside it, such as the task adapter.
        negated_adapter: the forget adapter, whose plain negation is drawn beside, if wanted.
        reference: the adapters of a model that never saw the forget rows, if there is one; [] is the base itself.

    Raises:
        ConfigError: an adapter is named twice.
        DataError: a set is empty.
        NumericalError: the goal cannot be met at any strength, or a loss is not finite.
    """
    for name, samples in (("forget", forget), ("retain", retain)):
        if not samples:
            raise DataError(f"expected {name} rows to judge strengths by, found none")
    stack = [*with_adapters, *([start_adapter] if start_adapter else []), adapter_name]
    if len(set(stack)) != len(stack):
        raise ConfigError(f"expected distinct adapters to be on together, found {stack}; each counts as often as named")
    for name in (*stack, *([negated_adapter] if negated_adapter else [])):
        require_adapter(model, name)
    points: dict[float, dict[str, float]] = {}
    bar = tqdm(total=MAX_EVALUATIONS, desc="strength", disable=not show_progress_bar)

    def losses(adapters: Sequence[str]) -> dict[str, float]:
        found = {"forget": forget, "retain": retain}
        return {
            name: float(losses_of(model, samples, adapters=adapters, batch_size=batch_size).double().mean())
            for name, samples in found.items()
        }

    def at(strength: float) -> dict[str, float]:
        if strength not in points:
            with ExitStack() as held:
                held.enter_context(adapter_strength(model, adapter_name, strength))
                if start_adapter:
                    held.enter_context(adapter_strength(model, start_adapter, 1 - strength))
                points[strength] = losses(stack)
            bar.update()
        return points[strength]

    with bar:
        if goal.target_forget_loss is not None:
            target = goal.target_forget_loss
            strength = match_forgetting(
                lambda s: at(s)["forget"], target, tolerance=TOLERANCE / 2, max_evaluations=MAX_EVALUATIONS
            ).strength
        else:
            assert goal.retain_tolerance is not None
            target = at(0.0)["retain"] + goal.retain_tolerance
            strength = most_forgetting(
                lambda s: (at(s)["forget"], at(s)["retain"]), target, tolerance=TOLERANCE,
                max_evaluations=MAX_EVALUATIONS,
            )  # fmt: skip
    negation = []
    if negated_adapter is not None:
        largest = max(points[strength]["forget"], *(p["forget"] for s, p in points.items() if s <= strength))
        for factor in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0):
            with adapter_strength(model, negated_adapter, -factor):
                negation.append({"strength": factor, **losses([*with_adapters, negated_adapter])})
            if negation[-1]["forget"] > largest:
                break
    return Calibration(
        goal=dataclasses.asdict(goal),
        target=target,
        strength=strength,
        losses=points[strength],
        points=[{"strength": s, **points[s]} for s in sorted(points)],
        negation=negation,
        retain_only=losses(retain_only) if retain_only is not None else None,
    )


def forget_loss_of_log(path: str | Path) -> float:
    """The mean loss on the forget rows that an evaluation log reports: open-unlearning's ``TOFU_EVAL.json`` of a
    retain-only model, by ``forget_Q_A_Prob``.

    Raises:
        DataError: the file is missing, no JSON, or holds no such values.
    """
    losses = row_values(read_log(path), "forget_Q_A_Prob", "avg_loss", where=str(path))
    return sum(losses) / len(losses)
