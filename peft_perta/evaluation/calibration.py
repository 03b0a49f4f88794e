"""Calibrate an adapter: find the strength that meets a goal, by forward passes only.

An adapter's strength is one scalar, so nothing is rebuilt between two evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from ..data import Holds, Sample, check_disjoint
from ..errors import ConfigError, DataError
from ..model import adapter_strength, describe_weights, require_adapter
from .completions import losses_of
from .logs.files import read_log
from .logs.rescoring import row_values
from .strength import match_forgetting, most_forgetting

MAX_EVALUATIONS = 12

TOLERANCE = 0.02  # accepted distance from the target, as a share of it; the search itself aims closer

# Strengths at which the plain negation is evaluated, until it forgets more than the adapter did.
_NEGATION_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Goal:
    """What the strength must reach. Give exactly one of the two.

    Attributes:
        target_forget_loss: the mean loss on the forget rows, nats per token; for instance that of a retain-only model.
        retain_tolerance: how far the mean loss on the retain rows may rise, nats per token; the strength that forgets
            most within it is taken.

    Raises:
        ConfigError: none or both are given, or the value is not finite and above 0.
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


class _GoalFields(TypedDict):
    target_forget_loss: float | None
    retain_tolerance: float | None


class _LossFields(TypedDict):
    forget: float
    retain: float


class _PointFields(_LossFields):
    strength: float


Losses = Annotated[dict[str, float], Holds(_LossFields)]
Point = Annotated[dict[str, float], Holds(_PointFields)]


@dataclass
class Calibration:
    """The strength that was found, and every point that was evaluated.

    Attributes:
        goal: the fields of the ``Goal``.
        target: the loss that the goal comes to, nats per token: the forget loss to meet, or the highest retain loss.
        strength: the factor on the adapter as it was given.
        losses: 'forget' and 'retain' -> mean loss at that strength, nats per token.
        points: {strength, forget, retain} of every evaluation, by strength; strength 0 is the model without the edit.
        negation: the same for the plain negation of the forget adapter; empty where none was given.
        retain_only: 'forget' and 'retain' -> mean loss of a retain-only model; None where none was given.
        measured_on: the form of the base's weights, such as 'float32' or 'NF4'; None in records of earlier versions.
    """

    goal: Annotated[dict[str, float | None], Holds(_GoalFields)]
    target: float
    strength: float
    losses: Losses
    points: Annotated[list[Point], Field(min_length=1)]
    negation: list[Point] = field(default_factory=list)
    retain_only: Losses | None = None
    measured_on: str | None = None

    @property
    def reached(self) -> bool:
        """Whether the loss is within ``TOLERANCE`` of the target.

        A retain tolerance also counts as reached where a larger strength within it forgot no more.
        """
        if self.goal["target_forget_loss"] is not None:
            return abs(self.losses["forget"] - self.target) <= TOLERANCE * self.target
        passed_maximum = any(
            point["strength"] > self.strength
            and point["retain"] <= self.target
            and point["forget"] <= self.losses["forget"]
            for point in self.points
        )
        return passed_maximum or abs(self.losses["retain"] - self.target) <= TOLERANCE * self.target

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        goal = (
            f"a forget loss of {self.target:.3f}"
            if self.goal["target_forget_loss"] is not None
            else f"the most forgetting at a retain loss of at most {self.target:.3f}"
        )
        return (
            f"strength {self.strength:.4g} for {goal}: forget loss {self.losses['forget']:.3f}, retain loss "
            f"{self.losses['retain']:.3f} (without the edit {self.points[0]['forget']:.3f} and "
            f"{self.points[0]['retain']:.3f}), in {len(self.points)} evaluations"
            + (f" on {self.measured_on}" if self.measured_on else "")
            + ("" if self.reached else f"; the goal was NOT reached within {TOLERANCE * 100:g} %")
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
    """Find the strength of an adapter that meets the goal. The model is left as it was.

    Args:
        model: the model with the adapters on it. The strength holds for the form in which its base is loaded
            (``load_served``); a target that was measured on another form is not what this one comes to.
        goal: the forget loss to meet, or the accepted rise of the retain loss.
        forget: forget samples that the losses are measured on.
        retain: retain samples that the losses are measured on; take samples that no gradient was taken of.
        adapter_name: the adapter whose strength is sought.
        start_adapter: the adapter that ``adapter_name`` was trained from, where that is not zero. At strength s it is
            active with strength 1 - s.
        with_adapters: adapters that are active in addition, such as the task adapter.
        negated_adapter: the forget adapter; the losses of its plain negation are measured for comparison.
        retain_only: the adapters of a retain-only model, whose losses are measured for comparison; [] is the base
            itself, None measures none.
        batch_size: samples per forward.
        show_progress_bar: show a bar of the evaluations.

    Returns:
        The strength, and every point that was evaluated, at most 12 of them.

    Raises:
        AdapterError: an adapter is not on the model.
        ConfigError: an adapter is named twice.
        DataError: a set is empty, or a sample is in both sets.
        NumericalError: no strength meets the goal, or a loss is not finite.
    """
    stack = [*with_adapters, *([start_adapter] if start_adapter else []), adapter_name]
    _check(model, {"forget": forget, "retain": retain}, stack, negated_adapter)
    losses = _Losses(model, {"forget": forget, "retain": retain}, batch_size)
    with tqdm(total=MAX_EVALUATIONS, desc="strength", disable=not show_progress_bar) as bar:
        curve = _Curve(losses, stack, adapter_name, start_adapter, bar)
        target, strength = _search(goal, curve)
    largest = max(point["forget"] for s, point in curve.points.items() if s <= strength)
    return Calibration(
        goal=dataclasses.asdict(goal),
        target=target,
        strength=strength,
        losses=curve.points[strength],
        points=[{"strength": s, **curve.points[s]} for s in sorted(curve.points)],
        negation=_negation(losses, [*with_adapters, negated_adapter], largest) if negated_adapter is not None else [],
        retain_only=losses(retain_only) if retain_only is not None else None,
        measured_on=describe_weights(model),
    )


def _check(model: nn.Module, sets: dict[str, list[Sample]], stack: list[str], negated_adapter: str | None) -> None:
    """
    Raises:
        AdapterError: an adapter is not on the model.
        ConfigError: an adapter is named twice.
        DataError: a set is empty, or a sample is in both.
    """
    for name, samples in sets.items():
        if not samples:
            raise DataError(f"expected {name} rows to measure the strengths on, found none")
    check_disjoint(sets["forget"], sets["retain"])
    if len(set(stack)) != len(stack):
        raise ConfigError(f"expected distinct adapters, found {stack}; name each adapter once")
    for name in (*stack, *([negated_adapter] if negated_adapter else [])):
        require_adapter(model, name)


@dataclass(frozen=True)
class _Losses:
    """The mean losses of both sets, under any stack of adapters."""

    model: nn.Module
    samples: dict[str, list[Sample]]
    batch_size: int

    def __call__(self, adapters: Sequence[str]) -> dict[str, float]:
        return {
            name: float(losses_of(self.model, samples, adapters=adapters, batch_size=self.batch_size).double().mean())
            for name, samples in self.samples.items()
        }


@dataclass
class _Curve:
    """The losses at each strength of an adapter, evaluated once each."""

    losses: _Losses
    stack: list[str]
    adapter_name: str
    start_adapter: str | None
    bar: tqdm
    points: dict[float, dict[str, float]] = field(default_factory=dict)

    def at(self, strength: float) -> dict[str, float]:
        if strength not in self.points:
            with ExitStack() as strengths:
                strengths.enter_context(adapter_strength(self.losses.model, self.adapter_name, strength))
                if self.start_adapter:
                    strengths.enter_context(adapter_strength(self.losses.model, self.start_adapter, 1 - strength))
                self.points[strength] = self.losses(self.stack)
            self.bar.update()
        return self.points[strength]


def _search(goal: Goal, curve: _Curve) -> tuple[float, float]:
    """The loss that the goal comes to, and the strength that meets it."""
    if goal.target_forget_loss is not None:
        match = match_forgetting(
            lambda strength: curve.at(strength)["forget"],
            goal.target_forget_loss,
            tolerance=TOLERANCE / 2,
            max_evaluations=MAX_EVALUATIONS,
        )
        return goal.target_forget_loss, match.strength
    assert goal.retain_tolerance is not None
    limit = curve.at(0.0)["retain"] + goal.retain_tolerance
    strength = most_forgetting(
        lambda strength: (curve.at(strength)["forget"], curve.at(strength)["retain"]),
        limit,
        tolerance=TOLERANCE,
        max_evaluations=MAX_EVALUATIONS,
    )
    return limit, strength


def _negation(losses: _Losses, stack: list[str], largest: float) -> list[dict[str, float]]:
    """{strength, forget, retain} of the plain negation of the stack's last adapter, until its forget loss passes
    ``largest``."""
    points = []
    for strength in _NEGATION_STRENGTHS:
        with adapter_strength(losses.model, stack[-1], -strength):
            points.append({"strength": strength, **losses(stack)})
        if points[-1]["forget"] > largest:
            break
    return points


def forget_loss_of_log(path: str | Path) -> float:
    """The mean loss on the forget rows in an evaluation log, nats per token, from the rows of ``forget_Q_A_Prob``.

    Args:
        path: the log, such as open-unlearning's TOFU_EVAL.json of a retain-only model.

    Raises:
        DataError: the file is missing or is not JSON, or the log has no such rows.
    """
    losses = row_values(read_log(path), "forget_Q_A_Prob", "avg_loss", where=str(path))
    return sum(losses) / len(losses)
