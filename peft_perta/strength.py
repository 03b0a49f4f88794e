"""How strong an edit must be: a search by forward passes only, since an adapter's scale is one scalar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import NumericalError

LARGEST_STRENGTH = 256.0


@dataclass(frozen=True)
class Match:
    """The strength that was found, the loss there, and every (strength, loss) that was evaluated on the way."""

    strength: float
    loss: float
    evaluated: list[tuple[float, float]]


def match_forgetting(
    loss_at: Callable[[float], float], target: float, *, tolerance: float = 0.01, max_evaluations: int = 14
) -> Match:
    """The strength at which the forget loss meets a target, such as the retain-only model's loss.

    Bracket by doubling from 1, then the Illinois variant of false position. Losses grow with strength; where a curve
    does not, the crossing nearest to no edit at all is sought.

    Args:
        loss_at: strength -> mean forget loss (nats per token).
        target: the loss to meet, within ``tolerance`` of itself.

    Returns:
        The best point that was seen: off the target by more than the tolerance only where ``max_evaluations`` ran out.

    Raises:
        NumericalError: the target lies below the loss at strength 0, no strength up to 256 reaches it, or a loss is not
            finite.
    """
    if not 0 < target < math.inf:
        raise NumericalError(f"expected a finite target loss above 0, found {target!r}")
    evaluated: list[tuple[float, float]] = []

    def evaluate(strength: float) -> float:
        loss = loss_at(strength)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the forget loss is {loss} at strength {strength:g}; evaluate in float32 or bfloat16, or train the "
                "forget adapter less"
            )
        evaluated.append((strength, loss))
        return loss - target

    low, gap_low = 0.0, evaluate(0.0)
    if gap_low > tolerance * target:
        raise NumericalError(
            f"the forget loss is {gap_low + target:.3f} with no edit at all, above the target {target:.3f}: "
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
                f"no strength up to {LARGEST_STRENGTH:g} brings the forget loss to {target:.3f} (at {low:g} it is "
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
