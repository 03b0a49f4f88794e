"""The section on the commands that produced the page's numbers."""

from __future__ import annotations

from ._elements import missing, scrolling, section
from ._html import Markup, element
from .report_data import ReportData


def commands_section(data: ReportData) -> Markup:
    """The exact commands."""
    heading = "Commands"
    if not data.header.commands:
        note = missing("No command is on record: the numbers come from a Python program.")
        return section("commands", heading, note)
    lines = element("pre", element("code", "\n".join(data.header.commands)))
    return section("commands", heading, scrolling(lines, "Commands"))
