"""The HTML report as a whole: one file that loads nothing, runs no script and needs no network."""

from __future__ import annotations

from pathlib import Path

from ..data import write_file
from ._attacks import attacks_section
from ._commands import commands_section
from ._document import document
from ._generations import generations_section
from ._html import Markup, element, join
from ._layers import layers_section
from ._limits import limits_section
from ._metrics import metrics_section
from ._provenance import edit_section
from ._strength import strength_section
from ._summary import summary_section
from .report_data import ReportData

SECTIONS = {  # identifier -> name in the navigation, in page order
    "summary": "Summary",
    "limits": "Limits",
    "edit": "The edit",
    "metrics": "Metrics",
    "strength": "Strength",
    "layers": "Layers",
    "generations": "Answers",
    "attacks": "Attacks",
    "commands": "Commands",
}


def write_html_report(data: ReportData, path: str | Path) -> None:
    """Write the report as one HTML file. The same data give the same bytes.

    Args:
        data: the numbers and texts to show. Sections without data say which command provides them.
        path: the file to write. It is replaced as a whole, or left as it is if writing fails.

    Raises:
        DataError: the provenance in the data is damaged.
        OutputError: the file cannot be written.
    """
    write_file(path, render(data))


def render(data: ReportData) -> str:
    """The whole HTML document.

    Raises:
        DataError: the provenance in the data is damaged.
    """
    provenance, calibration = data.read_provenance(), data.read_calibration()
    main = element(
        "main",
        summary_section(data, calibration),
        limits_section(data, provenance),
        edit_section(data, provenance),
        metrics_section(data),
        strength_section(calibration, provenance),
        layers_section(provenance),
        generations_section(data),
        attacks_section(data),
        commands_section(data),
    )
    footer = element("footer", element("p", _made_with(data)))
    return document(data.header.title, _header(data), main, footer)


def _header(data: ReportData) -> Markup:
    header = data.header
    adapters = join(" with ", element("code", " + ".join(header.adapters))) if header.adapters else Markup()
    links = (element("li", element("a", name, href=f"#{identifier}")) for identifier, name in SECTIONS.items())
    return element(
        "header",
        element("h1", header.title, dir="auto"),
        element("p", element("code", header.base_model), adapters, class_="subject"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _made_with(data: ReportData) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data.made_with.items())
    return f"Made with {versions or 'peft_perta'}. This file loads nothing and sends nothing."
