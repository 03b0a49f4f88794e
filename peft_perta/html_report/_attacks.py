"""What was tried to bring the knowledge back, and how much of it came."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._contents import ReportData
from ._markup import Markup, element, join
from ._parts import Cell, absent, number, section, share, table

MEANINGS = {
    "relearning": "A few steps of training on a few forget rows; the others are asked.",
    "requantization": "The merged model, rounded to fewer bits.",
    "paraphrase": "The same questions in other words.",
    "prefix": "The beginning of the answer is given.",
    "sampling": "Asked again and again, the best answer counting.",
    "switched-off": "Whoever holds base and adapter apart can switch the edit off.",
}


SWITCHED_OFF = "switched-off"


_NO_WAY = 0.02  # reference and full model this close, relative to them, cannot tell what came back


_WORDS = {"probability": "probability", "rouge_l_recall": "ROUGE-L recall", "loss": "loss (nats per token)"}


_MODELS = {"full": "before", "unlearned": "after", "retain-only": "retain-only"}  # as the page calls them


@dataclass(frozen=True)
class Strongest:
    """The attack that brings back the most, by probability or ROUGE-L recall.

    Attributes:
        came_back: the share of the way from the retain-only model to the model that knows, both under the same attack; None
            where one of them was not measured.
    """

    attack: str
    setting: str
    measure: str
    unlearned: float
    retain_only: float | None
    full: float | None
    came_back: float | None


def strongest(report_data: ReportData) -> Strongest | None:
    """By the share that came back; where none is known, by what is known. Switching off apart: it is no trial."""
    found = [
        Strongest(row["attack"], row["setting"], measure, came_back=_came_back(values, measure), **values)
        for measure in ("probability", "rouge_l_recall")
        for row in report_data.attacks
        if row["attack"] != SWITCHED_OFF and (values := _values(row, measure))["unlearned"] is not None
    ]
    known = [attack for attack in found if attack.came_back is not None]
    if known:
        return max(known, key=lambda attack: attack.came_back or 0.0)
    return max(
        (attack for attack in found if attack.measure == found[0].measure),
        key=lambda attack: attack.unlearned,
        default=None,
    )


def switched_off(report_data: ReportData) -> float | None:
    """The probability of the forget rows with the edit switched off, where that was tried."""
    tried = [_values(row, "probability")["unlearned"] for row in report_data.attacks if row["attack"] == SWITCHED_OFF]
    return max((value for value in tried if value is not None), default=None)


def _values(row: dict[str, Any], measure: str) -> dict[str, Any]:
    return {model: (row.get(model) or {}).get(measure) for model in _MODELS}


def _came_back(values: dict[str, float | None], measure: str) -> float | None:
    """Of what lies between the retain-only model and the model that knows; below 0 where less is left than in the retain-only model.

    None where a value is missing, or where the model that knows does not stand out.
    """
    full, unlearned, retain_only = (values[model] for model in _MODELS)
    if unlearned is None or retain_only is None or full is None:
        return None
    way = full - retain_only
    if not math.isfinite(way) or not math.isfinite(unlearned):
        return None
    if (way > 0) == (measure == "loss") or abs(way) < _NO_WAY * max(abs(full), abs(retain_only)):
        return None
    return (unlearned - retain_only) / way


def words_of(measure: str) -> str:
    return _WORDS.get(measure, measure)


def attacks_section(report_data: ReportData, how: str) -> Markup:
    heading = "Attempts to bring it back"
    run = {row["attack"] for row in report_data.attacks}
    left = [name for name in MEANINGS if name not in run]
    if not run:
        return section(
            "attacks", heading, absent("No attack was run: what a determined person gets back is not known.", how)
        )
    intro = element(
        "p", "Each attack was run on the model after the edit and, where a column is filled, on the retain-only model and on "
        "the model before. What counts is the distance to the retain-only model under the same attack: relearning teaches the "
        "reference too. What came back is a share of the way from there to the model before; "
        "below 0, less is left than in the retain-only model.",
    )  # fmt: skip
    rest = absent(f"Attacks that were not run: {', '.join(left)}.", how) if left else Markup()
    return section("attacks", heading, intro, *_tables(report_data.attacks), rest)


def _tables(rows: list[dict[str, Any]]) -> Iterator[Markup]:
    """One for each thing that was measured."""
    measures = {key: None for row in rows for model in _MODELS for key in row.get(model) or {}}
    for measure in sorted(measures, key=lambda key: list(_WORDS).index(key) if key in _WORDS else len(_WORDS)):
        with_it = [row for row in rows if any(value is not None for value in _values(row, measure).values())]
        models = [model for model in _MODELS if any(_values(row, measure)[model] is not None for row in with_it)]
        header: list[Cell] = ["attack", *(_MODELS[model] for model in models)]
        body, explained = [], set()
        for row in with_it:
            values = _values(row, measure)
            cells = [number(values[model]) for model in models]
            if len(models) == len(_MODELS):
                back = _came_back(values, measure)
                cells.append(number(None) if back is None else share(back))
            body.append([_name(row, row["attack"] not in explained), *cells])
            explained.add(row["attack"])
        header += ["came back"] if len(models) == len(_MODELS) else []
        better = "higher is better" if measure == "loss" else "lower is better"
        known = f", {better}" if measure in _WORDS else ""
        yield table(f"Forget rows under attack: {words_of(measure)}{known}", header, body, is_numbers=True)


def _name(row: dict[str, Any], is_first: bool) -> Markup:
    meaning = MEANINGS.get(row["attack"], "") if is_first else ""
    return join(element("span", row["attack"]), element("code", row["setting"]) if row["setting"] else Markup(),
                element("small", meaning) if meaning else Markup())  # fmt: skip
