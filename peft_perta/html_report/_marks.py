"""The mark of each model in drawings, and the key that explains marks."""

from __future__ import annotations

from collections.abc import Iterable

from ._html import Markup, element
from .report_data import FULL, RETAIN_ONLY, UNLEARNED

_KEY_WIDTH, _KEY_HEIGHT = 24, 20
KEY_CENTRE = (_KEY_WIDTH // 2, _KEY_HEIGHT // 2)


def full_mark(x: float, y: float) -> Markup:
    """A square: the full model."""
    return element("rect", x=pixels(x - 5), y=pixels(y - 5), width=10, height=10, class_=FULL)


def unlearned_mark(x: float, y: float) -> Markup:
    """A disc: the unlearned model."""
    return element("circle", cx=pixels(x), cy=pixels(y), r=5, class_=UNLEARNED)


def retain_only_mark(x: float, y: float) -> Markup:
    """A diamond: the retain-only model."""
    return element("path", d=f"M{pixels(x)} {pixels(y - 8)}l8 8l-8 8l-8 -8Z", class_=RETAIN_ONLY)


MARKS = {FULL: full_mark, UNLEARNED: unlearned_mark, RETAIN_ONLY: retain_only_mark}


def key(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """A list of marks, drawn around ``KEY_CENTRE``, and their meanings."""
    return element(
        "ul",
        *(
            element("li", element("svg", mark, viewBox=f"0 0 {_KEY_WIDTH} {_KEY_HEIGHT}", aria_hidden="true"), meaning)
            for mark, meaning in entries
        ),
        class_="key",
    )


def pixels(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
