"""The section on attacks: what was tried to bring the knowledge back, and how much of it came back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..evaluation import ATTACKS, AttackResult
from ._elements import Cell, missing, section, table
from ._html import Markup, element, join
from ._numbers import number, share
from ._remedies import ATTACK
from .report_data import MODELS, ReportData, Values

_SWITCHED_OFF = "switched-off"  # always succeeds, so it does not compete for the strongest attack
_RANKING_MEASURES = ("probability", "rouge_l_recall")
_MEASURES = {
    "probability": "probability",
    "rouge_l_recall": "ROUGE-L recall",
    "loss": "loss (nats per token)",
    "uds": "unlearning depth score",
}
_HIGHER_IS_BETTER = ("loss", "uds")
_LEAST_DISTANCE = (
    0.1  # of a probability or a recall: of full and retain-only that are closer, a few rows decide the share
)
_NO_DISTANCE = 0.02  # relative: if full and retain-only are this close, what was brought back cannot be told


@dataclass(frozen=True)
class StrongestAttack:
    """The attack that brings back the most.

    Attributes:
        name: the attack.
        setting: the setting in which it was the strongest.
        measure: ``probability`` or ``rouge_l_recall``.
        values: the measure for each model under the attack.
        recovered: share of the distance from the retain-only to the full model, both under the same attack; None if
            one of them was not measured.
    """

    name: str
    setting: str
    measure: str
    values: Values
    recovered: float | None


def strongest_attack(results: Sequence[AttackResult]) -> StrongestAttack | None:
    """The attack that recovered the largest share; if no share is known, the one with the largest measured value."""
    attacks = [
        StrongestAttack(result.attack, result.setting, measure, values, _recovered(values, measure))
        for measure in _RANKING_MEASURES
        for result in results
        if result.attack != _SWITCHED_OFF and (values := _values(result, measure)).unlearned is not None
    ]
    told = [attack for attack in attacks if attack.recovered is not None]
    ranked = [attack for attack in told if _distance(attack.values) >= _LEAST_DISTANCE] or told
    if ranked:
        return max(ranked, key=lambda attack: attack.recovered or 0.0)
    return max(
        (attack for attack in attacks if attack.measure == attacks[0].measure),
        key=lambda attack: attack.values.unlearned or 0.0,
        default=None,
    )


def _distance(values: Values) -> float:
    return abs((values.full or 0.0) - (values.retain_only or 0.0))


def switched_off(results: Sequence[AttackResult]) -> float | None:
    """The probability of the forget rows with the negative adapter off, if that was tried."""
    values = [_values(result, "probability").unlearned for result in results if result.attack == _SWITCHED_OFF]
    return max((value for value in values if value is not None), default=None)


def attacks_not_run(results: Sequence[AttackResult]) -> list[str]:
    """The names of the attacks without a number, also of those that were skipped."""
    run = {result.attack for result in results if not result.skipped}
    return [name for name in ATTACKS if name not in run]


def measure_label(measure: str) -> str:
    """A measure's name for people."""
    return _MEASURES.get(measure, measure)


def attacks_section(data: ReportData) -> Markup:
    """A table for each measure, with a row for each attack and setting."""
    heading = "Attacks"
    if not data.attacks:
        note = missing("No attack was run, so it is unknown what an attacker can bring back.", ATTACK)
        return section("attacks", heading, note)
    introduction = element(
        "p", "Each attack tries to bring the forgotten knowledge back. It was run on the unlearned model and, where a "
        "column has values, on the full and the retain-only model. Compare with the retain-only model under the same "
        "attack, because some attacks teach that model too. The column “brought back” is the share of the distance "
        "from the retain-only to the full model. Below 0%, the unlearned model knows less than the retain-only model.",
    )  # fmt: skip
    skipped = [result for result in data.attacks if result.skipped]
    reasons = [element("p", f"The {result.attack} attack was skipped: {result.skipped}.") for result in skipped]
    left = [name for name in attacks_not_run(data.attacks) if name not in {result.attack for result in skipped}]
    note = missing(f"These attacks were not run: {', '.join(left)}.", ATTACK) if left else Markup()
    return section("attacks", heading, introduction, *_tables(data.attacks), *reasons, note)


def _tables(results: Sequence[AttackResult]) -> Iterator[Markup]:
    """One table for each measure, the known measures first."""
    measures = {measure: None for result in results for numbers in _numbers(result) for measure in numbers}
    for measure in dict.fromkeys([*(name for name in _MEASURES if name in measures), *measures]):
        values = [(result, _values(result, measure)) for result in results]
        yield _table(measure, [(result, of_models) for result, of_models in values if of_models != _NOTHING])


def _table(measure: str, rows: list[tuple[AttackResult, Values]]) -> Markup:
    columns = [place for place in range(len(MODELS)) if any(values[place] is not None for _, values in rows)]
    has_every_model = len(columns) == len(MODELS)
    body, explained = [], set()
    for result, values in rows:
        cells = [number(values[column]) for column in columns]
        if has_every_model:
            recovered = _recovered(values, measure)
            cells.append(number(None) if recovered is None else share(recovered))
        body.append([_name(result, is_explained=result.attack in explained), *cells])
        explained.add(result.attack)
    header: list[Cell] = ["attack", *(MODELS[column] for column in columns)]
    header += ["brought back"] if has_every_model else []
    better = "higher is better" if measure in _HIGHER_IS_BETTER else "lower is better"
    direction = f", {better}" if measure in _MEASURES else ""
    caption = f"Forget rows under attack: {measure_label(measure)}{direction}"
    return table(caption, header, body, is_numeric=True)


def _name(result: AttackResult, *, is_explained: bool) -> Markup:
    description = ATTACKS[result.attack].meaning if result.attack in ATTACKS and not is_explained else ""
    return join(
        element("span", result.attack),
        element("code", result.setting) if result.setting else Markup(),
        element("small", description) if description else Markup(),
    )


_NOTHING = Values(None, None, None)


def _numbers(result: AttackResult) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The measures of each model, in the order of ``MODELS``."""
    return result.full or {}, result.unlearned or {}, result.retain_only or {}


def _values(result: AttackResult, measure: str) -> Values:
    return Values(*(numbers.get(measure) for numbers in _numbers(result)))


def _recovered(values: Values, measure: str) -> float | None:
    """The share of the distance from the retain-only to the full model that the attack recovers.

    It is negative if the unlearned model shows less than the retain-only model. It is None if a value is missing, or if
    the full model does not stand out.
    """
    full, unlearned, retain_only = values
    if full is None or unlearned is None or retain_only is None:
        return None
    distance = full - retain_only
    if not math.isfinite(distance) or not math.isfinite(unlearned):
        return None
    is_reversed = (distance > 0) == (measure in _HIGHER_IS_BETTER)
    if is_reversed or abs(distance) < _NO_DISTANCE * max(abs(full), abs(retain_only)):
        return None
    return (unlearned - retain_only) / distance
