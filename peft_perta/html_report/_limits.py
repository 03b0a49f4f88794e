"""The section on what the page cannot show."""

from __future__ import annotations

from ..adapters import Provenance
from ._attacks import attacks_not_run
from ._elements import section
from ._html import Markup, element
from .report_data import SHOWN_ROWS, ReportData


def limits_section(data: ReportData, provenance: Provenance | None) -> Markup:
    """A list of limits, each with its consequence."""
    limits = [
        _of_the_adapter(data),
        *_of_the_yardstick(data),
        _of_the_attacks(data),
        (
            "Only the given rows were tested.",
            "The model may still know the same facts in other rows, in other words or in another language. Knowledge "
            "outside the retain rows may be damaged without showing here.",
        ),
        _of_the_answers(data),
    ]
    if provenance is None:
        limits.append(("The edit is not on record.", "No adapter with a provenance file of peft_perta was given."))
    items = [element("li", element("strong", limit), " ", *consequence) for limit, *consequence in limits]
    return section("limits", "What this page does not show", element("ul", *items))


def _of_the_adapter(data: ReportData) -> tuple[str, ...]:
    if not data.header.adapters:
        return ("No adapter is named.", "The numbers describe the model as it was given.")
    return (
        "The edit can be switched off.",
        "An adapter suppresses knowledge that the weights under it still hold. To hand out a model without the "
        "knowledge, merge the adapters into a copy in full precision (", element("code", "peft-perta merge"),
        "), hand out only that copy, and evaluate it as well.",
    )  # fmt: skip


def _of_the_yardstick(data: ReportData) -> list[tuple[str, ...]]:
    if data.has_retain_only:
        return []
    return [(
        "No retain-only model was given.",
        "Without a model that never saw the forget rows, it is unknown how low the metrics should be, and a low number "
        "may mean damage instead of forgetting.",
    )]  # fmt: skip


def _of_the_attacks(data: ReportData) -> tuple[str, ...]:
    if not data.attacks:
        return ("No attack was run.", "Knowledge that plain questions do not show may come back under attack.")
    if left := attacks_not_run(data.attacks):
        return ("Not every attack was run.", f"Left out: {', '.join(left)}. Other attacks exist as well.")
    return ("Other attacks exist.", "Only common attacks were run, each in one or a few settings.")


def _of_the_answers(data: ReportData) -> tuple[str, ...]:
    if not any(data.generations.values()):
        return ("No answer was generated.", "Numbers alone do not show whether the model still answers sensibly.")
    return (
        "The answers are samples.",
        f"The page quotes at most {SHOWN_ROWS} rows of each set, each answered once. Asked again, the model may say "
        "more.",
    )
