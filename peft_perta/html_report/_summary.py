"""The first section: is it forgotten, what did it cost, can it be brought back?"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from ..evaluation import ATTACKS, FORGOTTEN, STILL_THERE, Calibration, metric_of
from ._attacks import StrongestAttack, attacks_not_run, measure_label, strongest_attack, switched_off
from ._elements import section
from ._html import Markup, element, join
from ._numbers import number, percent, rounded
from ._standing import NEAR, lost_share, metrics_of_group, standing
from .report_data import FULL, RETAIN_ONLY, UNLEARNED, ReportData, Values

_ARROW = join(element("span", " to ", class_="spoken"), element("span", " → ", aria_hidden="true"))


class _Rating(NamedTuple):
    """How a verdict is marked. The verdict beside it says the same in words."""

    sign: str
    css_class: str


GOOD, MIXED, BAD, UNKNOWN = (
    _Rating("✓", "good"),
    _Rating("!", "mixed"),
    _Rating("✕", "bad"),
    _Rating("?", "unknown"),
)

_VERDICTS = {FORGOTTEN: GOOD, STILL_THERE: BAD}  # of an audit; any other is mixed


def summary_section(data: ReportData, calibration: Calibration | None) -> Markup:
    """What the page compares, and one tile for each of the three questions."""
    tiles = [_forgotten(data, calibration), _cost(data, calibration), _recovery(data)]
    return section("summary", "Summary", _introduction(), element("div", *tiles, class_="tiles"))


def _introduction() -> Markup:
    return element(
        "p", "Unlearning makes a model forget some of its training data, the ", element("strong", "forget rows"),
        ", and keeps what it knows from the other data, the ", element("strong", "retain rows"), ". The ",
        element("strong", FULL), " model knows the forget rows. The ", element("strong", UNLEARNED),
        " model is the full model with an edit, usually an adapter, that makes it forget. The ",
        element("strong", RETAIN_ONLY),
        " model never saw the forget rows. It is the yardstick: unlearning should make the model behave like it.",
    )  # fmt: skip


def _tile(question: str, rating: _Rating, verdict: str, *content: str) -> Markup:
    return element(
        "article",
        element("h3", question),
        element(
            "p",
            element("span", rating.sign, aria_hidden="true"),
            " ",
            element("span", verdict),
            class_=f"verdict {rating.css_class}",
        ),
        *content,
    )


def _pair(label: str, values: Values) -> Markup:
    """full → unlearned in large type, with the retain-only value below."""
    yardstick = (
        join("retain-only: ", number(values.retain_only))
        if values.retain_only is not None
        else "no retain-only model to compare with"
    )
    return join(
        element("p", f"{label}, full → unlearned", class_="quantity"),
        element("p", number(values.full), _ARROW, element("strong", number(values.unlearned)), class_="pair"),
        element("p", yardstick, class_="yardstick"),
    )


def _compared_metrics(data: ReportData, group: str) -> dict[str, Values]:
    """The group's metrics that have a better direction and are finite for the full and the unlearned model."""
    measured = (
        {name for name, value in data.models.get(label, {}).items() if value is not None and math.isfinite(value)}
        for label in (FULL, UNLEARNED)
    )
    names = metrics_of_group(set.intersection(*measured), group)
    return {name: data.values(name) for name in names if metric_of(name).better}


def _losses(calibration: Calibration, split: str) -> Values:
    """Losses that the search for the strength measured."""
    return Values(
        calibration.points[0][split], calibration.losses[split], (calibration.retain_only or {}).get(split)
    )  # fmt: skip


def _forgotten(data: ReportData, calibration: Calibration | None) -> Markup:
    question = "Is it forgotten?"
    metrics = _compared_metrics(data, "forget")
    if not metrics:
        return _forgotten_by_loss(question, calibration)
    first, values = next(iter(metrics.items()))
    pair = _pair(metric_of(first).label, values)
    places = {name: place for name, values in metrics.items() if (place := standing(metric_of(name), values))}
    if not places:
        worse = [name for name, values in metrics.items() if not _improved(name, values)]
        if worse:
            return _tile(question, BAD, f"No improvement by {len(worse)} of {len(metrics)} metrics", pair)
        reason = (
            "The full and the retain-only model hardly differ by these metrics, so they cannot show forgetting."
            if data.has_retain_only
            else "Without a retain-only model it is unknown how far the metrics should move."
        )
        return _tile(question, UNKNOWN, "Improved, but the aim is unknown", pair, element("p", reason))
    farthest = min(places, key=lambda name: places[name].share)
    remark = element(
        "p", f"Least forgotten: {metric_of(farthest).label}, ", number(metrics[farthest].unlearned),
        " (retain-only: ", number(metrics[farthest].retain_only), f"), {places[farthest].description}.",
    ) if places[farthest].falls_short else Markup()  # fmt: skip
    counts = Counter("short" if place.falls_short else place.kind for place in places.values())
    rating, verdict = _verdict_on_forgetting(counts)
    note = (
        f"Metrics near the retain-only model: {counts['near']}; past it: {counts['past']}; short of it: "
        f"{counts['short']}. Near means within {percent(NEAR)} of the distance from the full to the retain-only model."
    )
    return _tile(question, rating, verdict, pair, remark, element("p", note, class_="fine"))


def _forgotten_by_loss(question: str, calibration: Calibration | None) -> Markup:
    if calibration is None:
        reason = "No metric of the forget rows was measured on both the full and the unlearned model."
        return _tile(question, UNKNOWN, "Not measured", element("p", reason))
    losses = _losses(calibration, "forget")
    rose = calibration.losses["forget"] > calibration.points[0]["forget"]
    rating, verdict = (UNKNOWN, "Only the loss was measured") if rose else (BAD, "The loss did not rise")
    note = "In nats per token, from the search for the strength. A higher loss means that less is known."
    return _tile(question, rating, verdict, _pair("Loss on the forget rows", losses), element("p", note))


def _verdict_on_forgetting(counts: Counter[str]) -> tuple[_Rating, str]:
    """Metrics that fall ``short`` of the retain-only model outweigh those that went ``past`` it."""
    short, past, total = counts["short"], counts["past"], counts.total()
    if not short and not past:
        return GOOD, "Near the retain-only model by every metric"
    where, count = ("Short of", short) if short else ("Past", past)
    metrics = "every metric" if count == total else f"{count} of {total} metrics"
    return BAD if short == total else MIXED, f"{where} the retain-only model by {metrics}"


def _improved(name: str, values: Values) -> bool:
    assert values.full is not None
    assert values.unlearned is not None
    if metric_of(name).better == "lower":
        return values.unlearned < values.full
    return values.unlearned > values.full


def _cost(data: ReportData, calibration: Calibration | None) -> Markup:
    question = "What did it cost?"
    metrics = _compared_metrics(data, "retain")
    if not metrics:
        return _cost_by_loss(question, calibration)
    first, values = next(iter(metrics.items()))
    pair = _pair(metric_of(first).label, values)
    shares = {
        name: share for name, values in metrics.items() if (share := lost_share(metric_of(name), values)) is not None
    }
    if not shares:
        return _tile(question, UNKNOWN, "See the table of metrics", pair)
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] <= 0:
        return _tile(question, GOOD, f"No loss by {len(shares)} metric{'s' * (len(shares) > 1)}", pair)
    if len(shares) == 1:
        return _tile(question, MIXED, f"{percent(shares[worst])} lost", pair)
    remark = element(
        "p", f"The largest loss among {len(shares)} metrics: {metric_of(worst).label}, ", number(metrics[worst].full),
        _ARROW, number(metrics[worst].unlearned), ".",
    )  # fmt: skip
    return _tile(question, MIXED, f"Up to {percent(shares[worst])} lost", pair, remark)


def _cost_by_loss(question: str, calibration: Calibration | None) -> Markup:
    if calibration is None:
        reason = "No metric of the retain rows was measured on both the full and the unlearned model."
        return _tile(question, UNKNOWN, "Not measured", element("p", reason))
    losses = _losses(calibration, "retain")
    rise = calibration.losses["retain"] - calibration.points[0]["retain"]
    note = "In nats per token, from the search for the strength. A higher loss is worse."
    pair = _pair("Loss on the retain rows", losses)
    verdict = f"The loss {'rose' if rise >= 0 else 'fell'} by {rounded(abs(rise))}"
    return _tile(question, UNKNOWN, verdict, pair, element("p", note))


def _recovery(data: ReportData) -> Markup:
    question = "Can it be brought back?"
    if not data.attacks:
        return _tile(question, UNKNOWN, "Not measured", element("p", "No attack was run."))
    off = switched_off(data.attacks)
    switch = (
        element("p", "Anyone can switch the adapter off. The probability is then ", number(off), ".")
        if off is not None
        else Markup()
    )
    attack = strongest_attack(data.attacks)
    name, _, because = data.verdict.partition(": ")
    audited = element("p", f"The audit: {because}.") if data.verdict else Markup()
    rating, verdict = _VERDICTS.get(name, MIXED), name.capitalize()
    if attack is None:
        return _tile(question, rating if name else UNKNOWN, verdict or "See the table of attacks", audited, switch)
    if not name:
        rating, verdict = _verdict_on_recovery(attack)
    made = f"{attack.name}, {attack.setting}" if attack.setting else attack.name
    quantity = f"{measure_label(attack.measure)} of the forget rows under the strongest attack: {made}"
    content = [
        element("p", quantity[0].upper() + quantity[1:], class_="quantity"),
        element("p", element("strong", number(attack.values.unlearned)), class_="pair"),
    ]
    for label, value in ((RETAIN_ONLY, attack.values.retain_only), (FULL, attack.values.full)):
        if value is not None:
            content.append(element("p", f"{label} under the same attack: ", number(value), class_="yardstick"))
    left = len(attacks_not_run(data.attacks))
    if left:
        content.append(element("p", f"{left} of {len(ATTACKS)} kinds of attack were not run.", class_="fine"))
    return _tile(question, rating, verdict, audited, *content, switch)


def _verdict_on_recovery(attack: StrongestAttack) -> tuple[_Rating, str]:
    if attack.recovered is None:
        return UNKNOWN, "Attacked, without a retain-only model to compare with"
    if attack.recovered <= NEAR:
        return GOOD, f"At most {percent(max(attack.recovered, 0.0))} brought back"
    return BAD, f"{attack.name.capitalize()} brings back {percent(min(attack.recovered, 1.0))}"
