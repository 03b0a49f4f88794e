"""What every section is built of: numbers, tables that scroll in their own box, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ._markup import Markup, element, join

Cell = str | Markup


DASH, MINUS = "\u2013", "\u2212"


def shown(value: float) -> str:
    """The number for people: three decimals or four digits, whichever is less, or what it takes."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = abs(value)
    if not size:
        return "0"
    decimals = 3 if size < 10 else 2 if size < 100 else 1
    text = f"{value:.{decimals}f}" if 0.001 <= size < 1e5 else f"{value:.2g}"
    return text.replace("-", MINUS)


def number(value: float | None) -> Markup:
    """Rounded for people, exact in its markup."""
    if value is None:
        spoken = element("span", "not measured", class_="spoken")
        return element("span", spoken, element("span", DASH, aria_hidden="true"), class_="none")
    return element("data", shown(value), value=repr(float(value)))


def difference(value: float, other: float) -> Markup:
    """``value - other`` with its sign; a thousandth of what is compared is nothing to look at."""
    found = value - other
    is_small = math.isfinite(found) and abs(found) < 0.0005 < max(abs(value), abs(other))
    text = "0.000" if is_small else ("+" if found > 0 else "") + shown(found)
    return element("data", text, value=repr(float(found)))


def percent(share: float) -> str:
    return f"{share:.0%}".replace("-", MINUS)


def share(value: float) -> Markup:
    """A share of 1, as a percentage; 100 % only where nothing is missing."""
    text = f"{value:.1%}" if value >= 1 or value < 0.9995 else "99.9%"
    return element("data", text.replace("-", MINUS), value=repr(float(value)))


def section(identifier: str, heading: str, *content: str) -> Markup:
    return element(
        "section",
        element("h2", heading, id=f"{identifier}-heading"),
        *content,
        id=identifier,
        aria_labelledby=f"{identifier}-heading",
    )


def table(
    caption: str,
    header: Sequence[Cell],
    rows: Iterable[Sequence[Cell]],
    *,
    is_numbers: bool = False,
    is_named: bool = False,
) -> Markup:
    """A row's first cell is its heading; a cell is text, what stands in it, or the whole cell.

    Args:
        is_numbers: columns of one width, to the right.
        is_named: a heading above says what it is; the caption is for those who hear it.
    """
    wide = sum(isinstance(cell, Markup) for cell in header)
    head = element("tr", *(_cell(cell, "th", scope="col") for cell in header))
    body = [
        element("tr", _cell(row[0], "th", scope="row"), *(_cell(cell, "td", scope=None) for cell in row[1:]))
        for row in rows
    ]
    written = element(
        "table",
        element("caption", caption, class_="spoken" if is_named else None),
        element("thead", head),
        element("tbody", *body),
        class_="numbers" if is_numbers else None,
        style=f"--columns: {len(header) - 1 - wide}; --wide: {wide}" if is_numbers else None,
    )
    return scrolling(written, caption)


def scrolling(content: Markup, label: str) -> Markup:
    """A box that scrolls by itself, by keyboard too."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def absent(what: str, command: str | None = None) -> Markup:
    """What was not measured, and how to get it."""
    lead = element("strong", "Not measured.")
    if command is None:
        return element("p", lead, " ", what, class_="absent")
    words = [join(" " if place else "", element("span", word)) for place, word in enumerate(command.split())]
    return element("p", lead, " ", what, " To get it: ", element("code", *words, class_="command"), class_="absent")


def facts(pairs: Iterable[tuple[str, Cell]]) -> Markup:
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value, dir="auto")) for name, value in pairs),
        class_="facts",
    )


def _cell(content: Cell, name: str, scope: str | None) -> Markup:
    if isinstance(content, Markup) and content.startswith(("<td", "<th")):
        return content
    return element(name, content, scope=scope)
