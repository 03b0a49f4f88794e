"""The first screen: is it gone, what did it cost, does it come back; and what the page cannot say."""

from __future__ import annotations

import math
from collections import Counter

from ..adapters import Provenance
from ..evaluation import Calibration
from ._answers import SHOWN_ROWS
from ._attacks import MEANINGS, Strongest, strongest, switched_off, words_of
from ._contents import ReportData
from ._markup import Markup, element, join
from ._measures import NEAR, lost_share, measure_of, ordered, standing
from ._parts import number, percent, section, shown

_ARROW = join(element("span", " to ", class_="spoken"), element("span", " → ", aria_hidden="true"))


# The chip's sign and class; the words beside it say the same.
GOOD, MIXED, BAD, UNKNOWN = ("✓", "good"), ("!", "mixed"), ("✕", "bad"), ("?", "unknown")


def glance_section(report_data: ReportData, calibration: Calibration | None) -> Markup:
    tiles = [_gone(report_data, calibration), _cost(report_data, calibration), _back(report_data)]
    return section("glance", "At a glance", element("div", *tiles, class_="tiles"))


def limits_section(report_data: ReportData, report: Provenance | None) -> Markup:
    entries = [element("li", element("strong", lead), " ", *said) for lead, *said in _limits(report_data, report)]
    return section("limits", "What this page does not show", element("ul", *entries))


def _tile(question: str, chip: tuple[str, str], verdict: str, *content: str) -> Markup:
    sign, class_ = chip
    return element(
        "article",
        element("h3", question),
        element("p", element("span", sign, aria_hidden="true"), " ", element("span", verdict), class_=f"chip {class_}"),
        *content,
    )


def _pair(name: str, before: float, after: float, retain_only: float | None) -> Markup:
    """before → after, large; the retain-only model below."""
    aim = join("reference ", number(retain_only)) if retain_only is not None else "no retain-only model"
    return join(
        element("p", name, class_="what"),
        element("p", number(before), _ARROW, element("strong", number(after)), class_="pair"),
        element("p", aim, class_="aim"),
    )


def _both(report_data: ReportData, groups: tuple[str, ...]) -> list[str]:
    """Metrics with a direction, before and after."""
    before, after = (
        {
            name
            for name, value in report_data.models.get(label, {}).items()
            if value is not None and math.isfinite(value)
        }
        for label in ("before", "after")
    )
    return [name for group in groups for name in ordered(before & after, group) if measure_of(name).better]


def _gone(report_data: ReportData, calibration: Calibration | None) -> Markup:
    question = "Is it gone?"
    metrics = _both(report_data, ("forget",))
    if not metrics:
        if calibration is None:
            return _tile(
                question, UNKNOWN, "Not measured", element("p", "No metric of the forget rows, before and after.")
            )
        before, after = calibration.points[0], calibration.losses
        retain_only = (calibration.retain_only or {}).get("forget")
        said = "In nats per token, while the strength was searched: higher is less known. Nothing else was measured."
        chip, verdict = (
            (UNKNOWN, "Loss alone") if after["forget"] > before["forget"] else (BAD, "The loss did not rise")
        )
        pair = _pair("Loss on the forget rows", before["forget"], after["forget"], retain_only)
        return _tile(question, chip, verdict, pair, element("p", said))
    values = {
        name: [report_data.value(label, name) for label in ("before", "after", "retain-only")] for name in metrics
    }
    places = {name: place for name, found in values.items() if (place := standing(measure_of(name), *found))}
    before, after, retain_only = values[metrics[0]]
    assert before is not None
    assert after is not None
    pair = _pair(measure_of(metrics[0]).words, before, after, retain_only)
    if not places:
        worse = [name for name in metrics if not _improved(name, *values[name][:2])]
        if worse:
            return _tile(question, BAD, f"Not better by {len(worse)} of {len(metrics)} measures", pair)
        said = (
            "There is nothing to compare with: how low is low enough was not measured."
            if not report_data.has_retain_only
            else "Before and retain-only model hardly differ: these measures cannot tell."
        )
        return _tile(question, UNKNOWN, "Moved, but how far is far enough?", pair, element("p", said))
    chip, verdict = _distance([place.kind for place in places.values()])
    counts = Counter({"near": "near it", "past": "past it"}.get(place.kind, "short of it") for place in places.values())
    said = ", ".join(f"{counts[what]} {what}" for what in ("near it", "past it", "short of it") if counts[what])
    note = f"{said} (near: within {percent(NEAR)} of the way from before to the retain-only model)."
    least = min(places, key=lambda name: places[name].share)
    short = places[least].kind in ("part", "unmoved")
    rest = element(
        "p", f"Least gone: {measure_of(least).words} (", number(values[least][1]), ", reference ",
        number(values[least][2]), f"; {places[least].words}).",
    ) if short else Markup()  # fmt: skip
    return _tile(question, chip, verdict, pair, rest, element("p", note, class_="fine"))


def _distance(kinds: list[str]) -> tuple[tuple[str, str], str]:
    """The chip: what falls short of the retain-only model counts first, then what went past it."""
    short = sum(kind in ("part", "unmoved") for kind in kinds)
    past = kinds.count("past")
    if not short and not past:
        return GOOD, "Near the retain-only model by every measure"
    where, number_of = ("Short of", short) if short else ("Past", past)
    of = "every measure" if number_of == len(kinds) else f"{number_of} of {len(kinds)} measures"
    return BAD if short == len(kinds) else MIXED, f"{where} the retain-only model by {of}"


def _improved(metric: str, before: float | None, after: float | None) -> bool:
    assert before is not None
    assert after is not None
    return after < before if measure_of(metric).better == "lower" else after > before


def _cost(report_data: ReportData, calibration: Calibration | None) -> Markup:
    question = "What did it cost?"
    metrics = _both(report_data, ("retain",))
    if not metrics:
        if calibration is None:
            return _tile(
                question, UNKNOWN, "Not measured", element("p", "No metric of rows to keep, before and after.")
            )
        before, after = calibration.points[0]["retain"], calibration.losses["retain"]
        pair = _pair("Loss on retain rows", before, after, (calibration.retain_only or {}).get("retain"))
        said = element("p", "In nats per token; higher is worse. Nothing else was measured.")
        return _tile(question, UNKNOWN, f"Loss up by {shown(after - before)}", pair, said)
    values = {
        name: [report_data.value(label, name) for label in ("before", "after", "retain-only")] for name in metrics
    }
    before, after, retain_only = values[metrics[0]]
    assert before is not None
    assert after is not None
    pair = _pair(measure_of(metrics[0]).words, before, after, retain_only)
    shares = {name: share for name, found in values.items()
              if (share := lost_share(measure_of(name), *found[:2])) is not None}  # fmt: skip
    if not shares:
        return _tile(question, UNKNOWN, "See the table", pair)
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] <= 0:
        return _tile(question, GOOD, f"Nothing lost by {len(shares)} measures", pair)
    said = element(
        "p", f"Largest loss of {len(shares)} measures: {measure_of(worst).words}, ", number(values[worst][0]), _ARROW,
        number(values[worst][1]), ".",
    )  # fmt: skip
    return _tile(question, MIXED, f"Up to {percent(shares[worst])} lost", pair, said)


def _back(report_data: ReportData) -> Markup:
    question = "Can it be brought back?"
    if not report_data.attacks:
        return _tile(question, UNKNOWN, "Not tested", element("p", "No attack was run."))
    off = switched_off(report_data)
    switch = element("p", "With the edit switched off: ", number(off), ", by design.") if off is not None else Markup()
    found = strongest(report_data)
    if found is None:
        return _tile(question, UNKNOWN, "See the table of attacks", switch)
    chip, verdict = _came_back(found)
    where = f"{found.attack}, {found.setting}" if found.setting else found.attack
    what = f"{words_of(found.measure)} of the forget rows under the strongest attack: {where}"
    content = [
        element("p", what[0].upper() + what[1:], class_="what"),
        element("p", element("strong", number(found.unlearned)), class_="pair"),
    ]
    for name, value in (("retain-only", found.retain_only), ("before", found.full)):
        if value is not None:
            content.append(element("p", f"{name}, attacked alike: ", number(value), class_="aim"))
    left = len(MEANINGS.keys() - {row["attack"] for row in report_data.attacks})
    if left:
        content.append(element("p", f"{left} of {len(MEANINGS)} kinds of attack not run.", class_="fine"))
    return _tile(question, chip, verdict, *content, switch)


def _came_back(found: Strongest) -> tuple[tuple[str, str], str]:
    if found.came_back is None:
        return UNKNOWN, "Attacked; no retain-only model to compare with"
    if found.came_back <= NEAR:
        return GOOD, f"At most {percent(max(found.came_back, 0.0))} brought back"
    return BAD, f"{found.attack.capitalize()} brings back {percent(min(found.came_back, 1.0))}"


def _limits(report_data: ReportData, report: Provenance | None) -> list[tuple[str, ...]]:
    """(what, why it matters) of everything that this page leaves open."""
    found: list[tuple[str, ...]] = []
    if report_data.adapters:
        found.append((
            "The edit can be switched off.",
            "An adapter suppresses, it does not erase: what is beneath it still knows. To hand out a model without the "
            "knowledge, merge the adapters into a full-precision copy (", element("code", "peft-perta merge"),
            ") and hand out that alone; then evaluate that copy, too.",
        ))  # fmt: skip
    else:
        found.append(("No adapter is named.", "What was judged is the model as it was given."))
    if not report_data.has_retain_only:
        found.append((
            "No retain-only model was given.",
            "Without a model that never saw the rows, low numbers cannot be told from damage, nor is it known how low "
            "they should be.",
        ))  # fmt: skip
    if not report_data.attacks:
        found.append(
            ("No attack was run.", "Knowledge that is silent under plain questions may come back under pressure.")
        )
    elif left := [name for name in MEANINGS if name not in {row["attack"] for row in report_data.attacks}]:
        found.append(("Not every attack was run.", f"Left out: {', '.join(left)}. And nobody knows them all."))
    else:
        found.append(("Other attacks exist.", "Those below are the common ones, at one setting each or a few."))
    found.append((
        "Only the rows at hand were asked.",
        "The same facts in other rows, other words or another language may still be known; and what was not among the "
        "rows to keep may have suffered unseen.",
    ))  # fmt: skip
    if not any(report_data.generations.values()):
        found.append(("No answer was read.", "Numbers alone do not show whether the model still speaks sensibly."))
    else:
        found.append((
            "Answers are samples.",
            f"At most {SHOWN_ROWS} rows of each set are quoted, each answered once; asked again, it may say more.",
        ))  # fmt: skip
    if report is None:
        found.append(("How the edit was made is not on record.", "The adapter carries no provenance of this package."))
    return found
