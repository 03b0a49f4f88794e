"""Elements that several sections share: the section itself, tables, lists of facts and notes on what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ._html import Markup, element, join

Cell = str | Markup


def section(identifier: str, heading: str, *content: str) -> Markup:
    """A section that the navigation links to by its identifier."""
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
    is_numeric: bool = False,
    hides_caption: bool = False,
) -> Markup:
    """A table in a box that scrolls sideways.

    Args:
        caption: what the table shows.
        header: the column headings: text, or a whole ``<th>`` for a wide column.
        rows: the cells of each row: text, inner markup, or a whole ``<td>``. The first cell names the row.
        is_numeric: align the columns to the right, all of one width.
        hides_caption: keep the caption for screen readers alone, where a heading above already says it.
    """
    wide_columns = sum(isinstance(cell, Markup) for cell in header)
    head = element("tr", *(_cell(cell, "th", scope="col") for cell in header))
    body = [
        element("tr", _cell(row[0], "th", scope="row"), *(_cell(cell, "td", scope=None) for cell in row[1:]))
        for row in rows
    ]
    content = element(
        "table",
        element("caption", caption, class_="spoken" if hides_caption else None),
        element("thead", head),
        element("tbody", *body),
        class_="numbers" if is_numeric else None,
        style=f"--columns: {len(header) - 1 - wide_columns}; --wide: {wide_columns}" if is_numeric else None,
    )
    return scrolling(content, caption)


def scrolling(content: Markup, label: str) -> Markup:
    """A box that scrolls sideways on its own, also by keyboard."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def facts(pairs: Iterable[tuple[str, Cell]]) -> Markup:
    """A list of names and values."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value, dir="auto")) for name, value in pairs),
        class_="facts",
    )


def missing(reason: str, command: str | None = None) -> Markup:
    """A note that something is missing, with the command that adds it."""
    lead = element("strong", "Missing.")
    if command is None:
        return element("p", lead, " ", reason, class_="missing")
    words = [join(" " if place else "", element("span", word)) for place, word in enumerate(command.split())]
    code = element("code", *words, class_="command")
    return element("p", lead, " ", reason, " To add it, run ", code, class_="missing")


def _cell(content: Cell, name: str, scope: str | None) -> Markup:
    if isinstance(content, Markup) and content.startswith(("<td", "<th")):
        return content
    return element(name, content, scope=scope)
