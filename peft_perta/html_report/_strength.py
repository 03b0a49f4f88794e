"""The section on the strength of the negative adapter: the goal of the search, its curve and every point."""

from __future__ import annotations

from ..adapters import PerTAProvenance, Provenance
from ..evaluation import TOLERANCE, Calibration
from ._elements import missing, section
from ._html import Markup, element
from ._remedies import COMPARE_STRENGTHS, SEARCH_STRENGTH
from ._strength_curve import curve_tables, draw_curve


def strength_section(calibration: Calibration | None, provenance: Provenance | None) -> Markup:
    """The search for the strength, as a drawing and as tables."""
    heading = "Strength"
    if calibration is None:
        reason = "The strength was set by hand or is not on record, so the effect of other strengths is unknown."
        return section("strength", heading, missing(reason, SEARCH_STRENGTH))
    form = f", with the base in {calibration.measured_on}" if calibration.measured_on else ""
    introduction = element(
        "p", f"The goal was {_goal(calibration)}{form}. The strength scales the adapter: a higher strength forgets "
        "more and damages more. The curve shows this trade-off.",
    )  # fmt: skip
    notes = []
    if not calibration.reached:
        notes.append(element(
            "p", element("strong", "The goal was not reached"), f" within {TOLERANCE:.0%} of the target.",
            class_="warning",
        ))  # fmt: skip
    gaps, is_negative = [], isinstance(provenance, PerTAProvenance)  # `calibrate` compares no other adapter
    if is_negative and not calibration.negation:
        gaps.append(missing("Plain negation of the forget adapter was not measured for comparison.", COMPARE_STRENGTHS))
    if is_negative and not calibration.retain_only:
        gaps.append(missing("A retain-only model was not measured for comparison.", COMPARE_STRENGTHS))
    return section(
        "strength", heading, introduction, *notes, draw_curve(calibration), curve_tables(calibration), *gaps
    )  # fmt: skip


def _goal(calibration: Calibration) -> str:
    tolerance = calibration.goal["retain_tolerance"]
    if tolerance is None:
        return f"a loss of {calibration.goal['target_forget_loss']:.4g} on the forget rows"
    return f"to forget as much as possible while the loss on the retain rows rises by at most {tolerance:.4g}"
