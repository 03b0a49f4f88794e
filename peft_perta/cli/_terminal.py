"""Tables as a person at a terminal sees them, drawn by rich; elsewhere the plain text, as it always was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..adapters import Check
from ..data import visible

_MARKS = {"green": r"^pass$|goal met|The goal was met\.|every check passed", "bold red": r"FAIL(ED)?|NOT met|CHANGED"}


def at_terminal() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def console() -> Console:
    """Standard output as it is now. Nothing in a text is taken for markup; NO_COLOR is honoured."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def show(plain: str, *drawn: RenderableType) -> None:
    """Print a text.

    Args:
        plain: the text.
        drawn: what is shown in its place at a terminal.
    """
    if not at_terminal():
        print(plain)
        return
    for part in drawn:
        console().print(part)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> Table:
    """A table whose first ``texts`` columns hold texts, and the others numbers."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, title in enumerate(header):
        drawn.add_column(Text(title), justify="left" if place < texts else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(marked, row))
    return drawn


def grid(rows: Iterable[Sequence[str]]) -> Table:
    """Columns without a header, the last of which takes the width that is left."""
    drawn = Table.grid(padding=(0, 2))
    for row in rows:
        drawn.add_row(*map(marked, row))
    for column in drawn.columns:
        column.overflow = "fold"
    return drawn


def named(lines: Mapping[str, str]) -> Table:
    """Texts, each behind its name."""
    drawn = grid(lines.items())
    drawn.columns[0].style, drawn.columns[0].no_wrap = "bold", True
    return drawn


def checked(checks: Iterable[Check]) -> Table:
    """Checks, one in a row."""
    return grid((check.mark, check.name, check.found) for check in checks)


def marked(text: str) -> Text:
    """The text, with what passed in green and what failed in red."""
    drawn = Text(visible(text))
    for style, words in _MARKS.items():
        drawn.highlight_regex(words, style)
    return drawn
