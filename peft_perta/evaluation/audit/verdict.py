"""The verdict, and the one rule that makes it of the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import DataError
from .evidence import Evidence

FORGOTTEN = "forgotten as if never learned"
SUPPRESSED = "suppressed"
STILL_THERE = "still there"

PRESENT = 0.5  # share of what was known: above it, plain answers still know
TRACE = 0.1  # share of what was known: within it, a measure cannot be told from never learned
_ANSWERS = ("probability", "rouge_l_recall", "exact_memorization")  # the measures of plain answers
_ALWAYS = "switched-off"  # brings back everything from separate files, whatever the adapter

RULE = (
    f"'{STILL_THERE}' if a plain answer's share of what was known lies above {PRESENT} with its whole interval; else "
    f"'{SUPPRESSED}' if any measure's share, plain or under attack, lies outside -{TRACE} to {TRACE} with its whole "
    f"interval; else '{FORGOTTEN}'. The share is 0 for the retain-only model and 1 for the full model"
)


@dataclass(frozen=True)
class Verdict:
    """What an audit ends in.

    Attributes:
        name: one of ``FORGOTTEN``, ``SUPPRESSED`` and ``STILL_THERE``.
        reasons: the evidence that decided it, the strongest first; none for ``FORGOTTEN``.
        widest: the evidence with the highest end of an interval: what the rows cannot exclude.
    """

    name: str
    reasons: list[Evidence]
    widest: Evidence

    def __str__(self) -> str:
        if not self.reasons:
            widest = self.widest
            assert widest.share is not None
            return (
                f"{self.name}: no measure tells the model from one that never learned the rows; what {widest.rows} "
                f"rows cannot exclude is a share of {widest.share.high:.2f} ({widest.name})"
            )
        strongest = self.reasons[0]
        assert strongest.share is not None
        if self.name == STILL_THERE:
            return f"{self.name}: {strongest.name} is at {strongest.share} of what was known"
        count = len(self.reasons) - 1
        more = f" (and {count} more {'measure' if count == 1 else 'measures'})" if count else ""
        if strongest.share.mean > 0:
            return f"{self.name}: plain answers are gone, but {strongest.name} finds {strongest.share} of it{more}"
        return (
            f"{self.name}: plain answers are gone, but {strongest.name} is {strongest.share}, lower than if never "
            f"learned, which shows that something was removed{more}"
        )


def decide(evidence: Sequence[Evidence]) -> Verdict:
    """The verdict by ``RULE``.

    Args:
        evidence: of all attacks; that of an adapter that is switched off does not count.

    Raises:
        DataError: no plain answer tells the full from the retain-only model, so that there is nothing to audit.
    """
    told = [piece for piece in evidence if piece.share is not None and piece.attack != _ALWAYS]
    plain = [piece for piece in told if piece.attack == "as-asked" and piece.measure in _ANSWERS]
    if not plain:
        raise DataError(
            "the forget rows cannot tell the full model from the yardstick: expected at least five rows that the full "
            "model has learned and the yardstick has not; check the rows, the adapters and --retain-only-adapter"
        )
    widest = max(told, key=lambda piece: piece.share.high)  # type: ignore[union-attr]
    there = [piece for piece in plain if piece.share.low > PRESENT]  # type: ignore[union-attr]
    if there:
        return Verdict(STILL_THERE, _strongest_first(there), widest)
    found = [piece for piece in told if piece.share.low > TRACE]  # type: ignore[union-attr]
    removed = [piece for piece in told if piece.share.high < -TRACE]  # type: ignore[union-attr]
    if found or removed:
        return Verdict(SUPPRESSED, [*_strongest_first(found), *_strongest_first(removed)], widest)
    return Verdict(FORGOTTEN, [], widest)


def _strongest_first(evidence: Sequence[Evidence]) -> list[Evidence]:
    return sorted(evidence, key=lambda piece: -abs(piece.share.mean))  # type: ignore[union-attr]
