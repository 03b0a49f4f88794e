"""Search for the strength of an edit, by forward passes only: an adapter's strength is one scalar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import NumericalError

LARGEST_STRENGTH = 256.0


@dataclass(frozen=True)
class Match:
    """The outcome of ``match_forgetting``.

    Attributes:
        strength: the strength whose loss is nearest to the target.
        loss: the loss at that strength.
        evaluated: every (strength, loss) that was evaluated, by strength.
    """

    strength: float
    loss: float
    evaluated: list[tuple[float, float]]


def match_forgetting(
    loss_at: Callable[[float], float],
    target: float,
    *,
    tolerance: float = 0.01,
    max_evaluations: int = 14,
    measure: str = "forget loss",
    known: Mapping[float, float] | None = None,
) -> Match:
    """The strength at which the forget loss meets a target, such as the retain-only model's loss.

    Brackets the target by doubling the strength from 1, then closes in by the Illinois variant of false position. The
    loss is expected to grow with strength; where it does not, the crossing nearest to strength 0 is sought.

    Args:
        loss_at: strength -> mean forget loss (nats per token), or another measure of forgetting.
        target: the loss to meet.
        tolerance: the accepted distance from the target, as a share of the target.
        max_evaluations: the most calls of ``loss_at``.
        measure: the name of the measure in messages.
        known: strength -> loss, where a search for another target has evaluated it: the search starts from there.

    Returns:
        The best point that was evaluated, now or before. It misses the target by more than the tolerance only where
        ``max_evaluations`` ran out.

    Raises:
        NumericalError: the target lies below the loss at strength 0, no strength up to 256 reaches it, or a loss is not
            finite.
    """
    if not 0 < target < math.inf:
        raise NumericalError(f"expected a finite target above 0 for the {measure}, found {target!r}")
    evaluated = dict(known or {})
    most_points = max_evaluations + len(evaluated)

    def gap_at(strength: float) -> float:
        if strength not in evaluated:
            loss = loss_at(strength)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the {measure} is {loss} at strength {strength:g}; evaluate in float32 or bfloat16, or train the "
                    "forget adapter less"
                )
            evaluated[strength] = loss
        return evaluated[strength] - target

    def nearest() -> tuple[float, float]:
        return min(sorted(evaluated.items()), key=lambda point: abs(point[1] - target))

    gap = gap_at(0.0)
    check_start(gap + target, target, tolerance=tolerance, measure=measure)
    if abs(nearest()[1] - target) > tolerance * target:
        goal, remedy = f"the {measure} to {target:.3f}", "the forget adapter does not hold what the full model knows"
        bracket = _crossing(evaluated, target) or _bracket(gap_at, gap, target, goal, remedy)
        _false_position(gap_at, bracket, lambda gap: abs(gap) > tolerance * target and len(evaluated) < most_points)
    return Match(*nearest(), sorted(evaluated.items()))


def check_start(loss: float, target: float, *, tolerance: float = 0.01, measure: str = "forget loss") -> None:
    """Check that a target is not below the loss without the edit; the arguments are those of ``match_forgetting``.

    Raises:
        NumericalError: it is.
    """
    if loss - target > tolerance * target:
        raise NumericalError(
            f"the {measure} is {loss:.3f} without the edit, above the target {target:.3f}: there is nothing to forget; "
            "check that the task adapter is on, or raise the target"
        )


def most_forgetting(
    losses_at: Callable[[float], tuple[float, float]],
    limit: float,
    *,
    tolerance: float = 0.02,
    max_evaluations: int = 12,
) -> float:
    """The strength that forgets most while the retain loss is at most ``limit``.

    Brackets the limit by doubling the strength from 1, then closes in by the Illinois variant of false position, aimed
    just below the limit. Where a smaller strength forgot more (the forget loss has a maximum before the limit),
    golden-section search looks for the maximum instead.

    Args:
        losses_at: strength -> (mean forget loss, mean retain loss), nats per token.
        limit: the highest accepted retain loss.
        tolerance: the accepted distance below the limit, as a share of the limit. The result is further below it only
            where the forget loss has its maximum before, or ``max_evaluations`` ran out.
        max_evaluations: the most calls of ``losses_at``.

    Raises:
        NumericalError: the retain loss is above the limit at strength 0, no strength up to 256 reaches the limit, or a
            loss is not finite.
    """
    if not 0 < limit < math.inf:
        raise NumericalError(f"expected a finite limit above 0 for the retain loss, found {limit!r}")
    curve = _LossCurve(losses_at, max_evaluations)
    gap = curve.retain_at(0.0) - limit
    if not gap < 0:
        raise NumericalError(
            f"the retain loss is {gap + limit:.3f} without the edit, not below the limit {limit:.3f}; raise the limit"
        )
    band = min(tolerance * limit, -gap / 2)
    aim = limit - band / 2

    def gap_at(strength: float) -> float:
        return curve.retain_at(strength) - aim

    bracket = _bracket(gap_at, gap + band / 2, aim, f"the retain loss to {limit:.3f}", "ask for a forget loss instead")
    _false_position(gap_at, bracket, lambda gap: abs(gap) > band / 2 and curve.goes_on())
    best = curve.best(limit)
    if best < curve.largest(limit):
        _golden_section(curve.forget_at, *curve.neighbours(best), curve.goes_on)
    return curve.best(limit)


class _LossCurve:
    """Both losses at each strength, evaluated once each.

    Args:
        losses_at: strength -> (forget loss, retain loss).
        max_evaluations: the most calls of ``losses_at``.
    """

    def __init__(self, losses_at: Callable[[float], tuple[float, float]], max_evaluations: int) -> None:
        self._losses_at, self._max_evaluations = losses_at, max_evaluations
        self._evaluated: dict[float, tuple[float, float]] = {}

    def goes_on(self) -> bool:
        """Whether another evaluation is allowed."""
        return len(self._evaluated) < self._max_evaluations

    def _at(self, strength: float) -> tuple[float, float]:
        if strength not in self._evaluated:
            losses = self._losses_at(strength)
            if not all(map(math.isfinite, losses)):
                raise NumericalError(
                    f"a loss is not finite at strength {strength:g}: {losses}; evaluate in float32 or bfloat16"
                )
            self._evaluated[strength] = losses
        return self._evaluated[strength]

    def forget_at(self, strength: float) -> float:
        """The forget loss."""
        return self._at(strength)[0]

    def retain_at(self, strength: float) -> float:
        """The retain loss."""
        return self._at(strength)[1]

    def _allowed(self, limit: float) -> list[float]:
        return [strength for strength, (_, retain) in self._evaluated.items() if retain <= limit]

    def largest(self, limit: float) -> float:
        """The largest evaluated strength whose retain loss is at most the limit."""
        return max(self._allowed(limit))

    def best(self, limit: float) -> float:
        """The evaluated strength that forgot most among those whose retain loss is at most the limit."""
        return max(self._allowed(limit), key=lambda strength: (self.forget_at(strength), strength))

    def neighbours(self, strength: float) -> tuple[float, float]:
        """The evaluated strengths next to an evaluated one."""
        ordered = sorted(self._evaluated)
        place = ordered.index(strength)
        return ordered[max(place - 1, 0)], ordered[min(place + 1, len(ordered) - 1)]


@dataclass(frozen=True)
class _Bracket:
    """Two strengths and the gaps there, below 0 at ``low`` and at least 0 at ``high``."""

    low: float
    gap_low: float
    high: float
    gap_high: float


def _crossing(evaluated: Mapping[float, float], aim: float) -> _Bracket | None:
    """The two neighbours nearest to strength 0, of those that are evaluated, between which the loss reaches ``aim``."""
    points = sorted(evaluated.items())
    for (low, below), (high, above) in itertools.pairwise(points):
        if below < aim <= above:
            return _Bracket(low, below - aim, high, above - aim)
    return None


def _bracket(gap_at: Callable[[float], float], gap_at_zero: float, aim: float, goal: str, remedy: str) -> _Bracket:
    """Double the strength from 1 until the gap to ``aim`` is at least 0.

    Raises:
        NumericalError: no strength up to ``LARGEST_STRENGTH`` brings the loss to its ``goal``; the message ends in the
            ``remedy``.
    """
    low, gap_low, high = 0.0, gap_at_zero, 1.0
    while (gap_high := gap_at(high)) < 0:
        low, gap_low = high, gap_high
        high *= 2
        if high > LARGEST_STRENGTH:
            raise NumericalError(
                f"no strength up to {LARGEST_STRENGTH:g} brings {goal} (at {low:g} it is {gap_low + aim:.3f}); {remedy}"
            )
    return _Bracket(low, gap_low, high, gap_high)


def _false_position(gap_at: Callable[[float], float], bracket: _Bracket, goes_on: Callable[[float], bool]) -> None:
    """Evaluate strengths ever nearer to a gap of 0, while ``goes_on`` of the last gap: Illinois false position."""
    low, gap_low, high, gap_high = bracket.low, bracket.gap_low, bracket.high, bracket.gap_high
    gap, side = gap_high, 0
    while goes_on(gap):
        strength = (low * gap_high - high * gap_low) / (gap_high - gap_low)
        gap = gap_at(strength)
        if gap < 0:
            low, gap_low = strength, gap
            gap_high = gap_high / 2 if side == -1 else gap_high  # Illinois: an end that stays counts half
            side = -1
        else:
            high, gap_high = strength, gap
            gap_low = gap_low / 2 if side == 1 else gap_low
            side = 1


def _golden_section(value_at: Callable[[float], float], low: float, high: float, goes_on: Callable[[], bool]) -> None:
    """Close in on the maximum of a unimodal curve between ``low`` and ``high``, while ``goes_on``."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    value_left = value_right = None
    while goes_on():
        if value_left is None:
            value_left = value_at(left)
        elif value_right is None:
            value_right = value_at(right)
        elif value_left > value_right:
            high, right, value_right = right, left, value_left
            left, value_left = high - share * (high - low), None
        else:
            low, left, value_left = left, right, value_right
            right, value_right = low + share * (high - low), None
