"""How strong an edit must be: a search by forward passes only, since an adapter's scale is one scalar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import NumericalError

LARGEST_STRENGTH = 256.0


@dataclass(frozen=True)
class Match:
    """The strength that was found, the loss there, and every (strength, loss) that was evaluated on the way."""

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
) -> Match:
    """The strength at which the forget loss meets a target, such as the retain-only model's loss.

    Bracket by doubling from 1, then the Illinois variant of false position. Losses grow with strength; where a curve
    does not, the crossing nearest to no edit at all is sought.

    Args:
        loss_at: strength -> mean forget loss (nats per token), or another measure of forgetting.
        target: the loss to meet, within ``tolerance`` of itself.
        measure: what messages call it.

    Returns:
        The best point that was seen: off the target by more than the tolerance only where ``max_evaluations`` ran out.

    Raises:
        NumericalError: the target lies below the loss at strength 0, no strength up to 256 reaches it, or a loss is not
            finite.
    """
    if not 0 < target < math.inf:
        raise NumericalError(f"expected a finite target above 0 for the {measure}, found {target!r}")
    evaluated: list[tuple[float, float]] = []

    def evaluate(strength: float) -> float:
        loss = loss_at(strength)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the {measure} is {loss} at strength {strength:g}; evaluate in float32 or bfloat16, or train the "
                "forget adapter less"
            )
        evaluated.append((strength, loss))
        return loss - target

    low, gap_low = 0.0, evaluate(0.0)
    if gap_low > tolerance * target:
        raise NumericalError(
            f"the {measure} is {gap_low + target:.3f} with no edit at all, above the target {target:.3f}: "
            "there is nothing to forget; is the task adapter on?"
        )
    if abs(gap_low) <= tolerance * target:
        return Match(*evaluated[0], evaluated)
    high = 1.0
    while (gap_high := evaluate(high)) < 0:
        low, gap_low = high, gap_high
        high *= 2
        if high > LARGEST_STRENGTH:
            raise NumericalError(
                f"no strength up to {LARGEST_STRENGTH:g} brings the {measure} to {target:.3f} (at {low:g} it is "
                f"{gap_low + target:.3f}); the forget adapter does not hold what the full model knows"
            )
    strength, gap = high, gap_high
    side = 0
    while abs(gap) > tolerance * target and len(evaluated) < max_evaluations:
        strength = (low * gap_high - high * gap_low) / (gap_high - gap_low)
        gap = evaluate(strength)
        if gap < 0:
            low, gap_low = strength, gap
            gap_high = gap_high / 2 if side == -1 else gap_high  # Illinois: a stuck end weighs half
            side = -1
        else:
            high, gap_high = strength, gap
            gap_low = gap_low / 2 if side == 1 else gap_low
            side = 1
    best, loss = min(evaluated, key=lambda point: abs(point[1] - target))
    return Match(best, loss, sorted(evaluated))


def most_forgetting(
    losses_at: Callable[[float], tuple[float, float]],
    limit: float,
    *,
    tolerance: float = 0.02,
    max_evaluations: int = 12,
) -> float:
    """The strength that forgets most while the retain loss stays at or below a limit, and near it.

    Bracket by doubling from 1, then false position (Illinois) on the retain loss, aimed just below the
    limit. Where the forget loss is no larger there than at a smaller strength that was seen (an inverted U), golden
    section looks for its top below instead.

    Args:
        losses_at: strength -> (mean forget loss, mean retain loss), nats per token.
        limit: of the retain loss; the result is within ``tolerance`` of it, from below, unless forgetting has its top
            before, or ``max_evaluations`` ran out.

    Raises:
        NumericalError: the retain loss is above the limit with no edit at all, no strength up to 256 reaches the limit,
            or a loss is not finite.
    """
    if not 0 < limit < math.inf:
        raise NumericalError(f"expected a finite limit above 0 for the retain loss, found {limit!r}")
    seen: dict[float, tuple[float, float]] = {}

    def gap_at(strength: float) -> float:
        if strength not in seen:
            seen[strength] = losses_at(strength)
            if not all(map(math.isfinite, seen[strength])):
                raise NumericalError(
                    f"a loss is not finite at strength {strength:g}: {seen[strength]}; evaluate in float32 or bfloat16"
                )
        return seen[strength][1] - aim

    aim = limit
    low, gap_low = 0.0, gap_at(0.0)
    if not gap_low < 0:
        raise NumericalError(
            f"the retain loss is {seen[0.0][1]:.3f} with no edit at all, not below the limit {limit:.3f}; raise "
            "the limit"
        )
    band = min(tolerance * limit, -gap_low / 2)
    aim, gap_low = limit - band / 2, gap_low + band / 2
    high = 1.0
    while (gap_high := gap_at(high)) < 0:
        low, gap_low = high, gap_high
        high *= 2
        if high > LARGEST_STRENGTH:
            raise NumericalError(
                f"no strength up to {LARGEST_STRENGTH:g} brings the retain loss to {limit:.3f} (at {low:g} it is "
                f"{gap_low + aim:.3f}); ask for a forget loss instead"
            )
    strength, gap, side = high, gap_high, 0
    while abs(gap) > band / 2 and len(seen) < max_evaluations:
        strength = (low * gap_high - high * gap_low) / (gap_high - gap_low)
        gap = gap_at(strength)
        if gap < 0:
            low, gap_low = strength, gap
            gap_high = gap_high / 2 if side == -1 else gap_high  # Illinois: a stuck end weighs half
            side = -1
        else:
            high, gap_high = strength, gap
            gap_low = gap_low / 2 if side == 1 else gap_low
            side = 1

    def best() -> float:
        allowed = [s for s, (_, retain) in seen.items() if retain <= limit]
        return max(allowed, key=lambda s: (seen[s][0], s))

    if best() < max(s for s, (_, retain) in seen.items() if retain <= limit):
        _golden_section(
            lambda s: (gap_at(s), seen[s][0])[1], *_around(best(), seen), lambda: len(seen) < max_evaluations
        )
    return best()


def _around(strength: float, seen: dict[float, tuple[float, float]]) -> tuple[float, float]:
    """The neighbours of a strength among those that were seen."""
    ordered = sorted(seen)
    place = ordered.index(strength)
    return ordered[max(place - 1, 0)], ordered[min(place + 1, len(ordered) - 1)]


def _golden_section(value_at: Callable[[float], float], low: float, high: float, goes_on: Callable[[], bool]) -> None:
    """Close in on the top of a curve with one top between ``low`` and ``high``, while it goes on."""
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
