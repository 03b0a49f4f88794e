"""The page: one file, no network, no script; sections in the order in which a person asks."""

from __future__ import annotations

from pathlib import Path

from ..adapters import PerTAProvenance
from ..data import write_file
from ..evaluation import Calibration
from ._answers import generations_section
from ._attacks import attacks_section
from ._contents import ReportData
from ._glance import glance_section, limits_section
from ._markup import Markup, element, join
from ._record import commands_section, layers_section, removed_section, strength_section
from ._results import measures_section

STYLE = Path(__file__).with_name("style.css")


# The policy keeps a browser from loading anything, whatever a generated text may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


_EVALUATE = "peft-perta evaluate --model M --adapter DIR --suite NAME=PATH --report"


HOW = {  # what to run for a part that is missing
    "removed": "peft-perta unlearn ... --report",
    "measures": f"{_EVALUATE} --output DIR",
    "retain-only": f"{_EVALUATE} --retain-only-log JSON --output DIR",
    "strength": "peft-perta unlearn ... --strength auto --report",
    "beside": "peft-perta calibrate ... --forget-adapter DIR --retain-only-adapter DIR",
    "layers": "peft-perta unlearn ... --report",
    "generations": f"{_EVALUATE} --output DIR",
    "attacks": f"{_EVALUATE} --attacks all --output DIR",
}


SECTIONS = {
    "glance": "At a glance",
    "limits": "Not shown",
    "removed": "What was removed",
    "measures": "Before and after",
    "strength": "How strong",
    "layers": "Layers",
    "generations": "Answers",
    "attacks": "Attacks",
    "commands": "Commands",
}


def write_html_report(report_data: ReportData, path: str | Path) -> None:
    """Write the page whole or not at all; the same evidence gives the same bytes.

    Raises:
        DataError: the report or the calibration is none of ours.
        OutputError: the file cannot be written.
    """
    write_file(path, render(report_data))


def render(report_data: ReportData) -> str:
    """The whole document.

    Raises:
        DataError: the report or the calibration is none of ours.
    """
    report, calibration = report_data.read_provenance(), report_data.read_calibration()
    if calibration is None and isinstance(report, PerTAProvenance) and report.calibration is not None:
        calibration = Calibration.from_dict(report.calibration)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report_data.title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    main = element(
        "main",
        glance_section(report_data, calibration),
        limits_section(report_data, report),
        removed_section(report_data, report, HOW["removed"]),
        measures_section(report_data, HOW["measures"], HOW["retain-only"]),
        strength_section(calibration, HOW["strength"], HOW["beside"]),
        layers_section(report, HOW["layers"]),
        generations_section(report_data, HOW["generations"]),
        attacks_section(report_data, HOW["attacks"]),
        commands_section(report_data),
    )
    body = element("body", _header(report_data), main, element("footer", element("p", _made_with(report_data))))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(report_data: ReportData) -> Markup:
    on = join(" with ", element("code", " + ".join(report_data.adapters))) if report_data.adapters else Markup()
    links = (element("li", element("a", text, href=f"#{name}")) for name, text in SECTIONS.items())
    return element(
        "header",
        element("h1", report_data.title, dir="auto"),
        element("p", element("code", report_data.base_model), on, class_="subject"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _made_with(report_data: ReportData) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report_data.made_with.items())
    return f"Made with {versions or 'peft_perta'}. This file loads nothing and sends nothing."
