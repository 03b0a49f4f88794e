"""Numbers as readers see them; the exact value stays in the ``value`` attribute of the ``<data>`` element."""

from __future__ import annotations

import math

from ._html import Markup, element

EN_DASH, MINUS = "\u2013", "\u2212"


def rounded(value: float) -> str:
    """The number with three decimals or four digits, whichever is shorter; two digits if it is tiny or huge."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = abs(value)
    if not size:
        return "0"
    decimals = 3 if size < 10 else 2 if size < 100 else 1
    text = f"{value:.{decimals}f}" if 0.001 <= size < 1e5 else f"{value:.2g}"
    return text.replace("-", MINUS)


def number(value: float | None) -> Markup:
    """The rounded number, or a dash for None, which screen readers announce as "not measured"."""
    if value is None:
        spoken = element("span", "not measured", class_="spoken")
        return element("span", spoken, element("span", EN_DASH, aria_hidden="true"), class_="none")
    return element("data", rounded(value), value=repr(float(value)))


def difference(value: float | None, other: float | None) -> Markup:
    """``value - other`` with its sign; "0.000" if it is negligible beside the two; a dash if either is None."""
    if value is None or other is None:
        return number(None)
    change = value - other
    is_negligible = math.isfinite(change) and abs(change) < 0.0005 < max(abs(value), abs(other))
    text = "0.000" if is_negligible else ("+" if change > 0 else "") + rounded(change)
    return element("data", text, value=repr(float(change)))


def percent(share: float) -> str:
    """A share of 1 as a whole percentage."""
    return f"{share:.0%}".replace("-", MINUS)


def share(value: float) -> Markup:
    """A share of 1 as a percentage with one decimal. It reads 100% only if nothing is missing."""
    text = f"{value:.1%}" if value >= 1 or value < 0.9995 else "99.9%"
    return element("data", text.replace("-", MINUS), value=repr(float(value)))
