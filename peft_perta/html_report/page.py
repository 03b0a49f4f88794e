"""The page: one file, no network, no script; sections in the order in which a person asks."""

from __future__ import annotations

from pathlib import Path

from ..adapters import PerTAReport
from ..data import write_file
from ..evaluation import Calibration
from ._answers import generations_section
from ._attacks import attacks_section
from ._contents import Evidence
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
    "reference": f"{_EVALUATE} --reference-log JSON --output DIR",
    "strength": "peft-perta unlearn ... --strength auto --report",
    "beside": "peft-perta calibrate ... --forget-adapter DIR --reference-adapter DIR",
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


def write_page(evidence: Evidence, path: str | Path) -> None:
    """Write the page whole or not at all; the same evidence gives the same bytes.

    Raises:
        DataError: the report or the calibration is none of ours.
        OutputError: the file cannot be written.
    """
    write_file(path, render(evidence))


def render(evidence: Evidence) -> str:
    """The whole document.

    Raises:
        DataError: the report or the calibration is none of ours.
    """
    report, calibration = evidence.read_report(), evidence.read_calibration()
    if calibration is None and isinstance(report, PerTAReport) and report.calibration is not None:
        calibration = Calibration.from_dict(report.calibration)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", evidence.title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    main = element(
        "main",
        glance_section(evidence, calibration),
        limits_section(evidence, report),
        removed_section(evidence, report, HOW["removed"]),
        measures_section(evidence, HOW["measures"], HOW["reference"]),
        strength_section(calibration, HOW["strength"], HOW["beside"]),
        layers_section(report, HOW["layers"]),
        generations_section(evidence, HOW["generations"]),
        attacks_section(evidence, HOW["attacks"]),
        commands_section(evidence),
    )
    body = element("body", _header(evidence), main, element("footer", element("p", _made_with(evidence))))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(evidence: Evidence) -> Markup:
    on = join(" with ", element("code", " + ".join(evidence.adapters))) if evidence.adapters else Markup()
    links = (element("li", element("a", text, href=f"#{name}")) for name, text in SECTIONS.items())
    return element(
        "header",
        element("h1", evidence.title, dir="auto"),
        element("p", element("code", evidence.base_model), on, class_="subject"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _made_with(evidence: Evidence) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in evidence.made_with.items())
    return f"Made with {versions or 'peft_perta'}. This file loads nothing and sends nothing."
