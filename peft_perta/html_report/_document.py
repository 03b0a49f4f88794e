"""The frame of every page: one file that loads nothing, runs no script and needs no network."""

from __future__ import annotations

from pathlib import Path

from ._html import Markup, element

STYLE = Path(__file__).with_name("style.css")

# The policy forbids the browser to load anything, whatever markup a generated text may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def document(title: str, *body: Markup) -> str:
    """The whole HTML document.

    Args:
        title: of the page, as text.
        body: what it shows: header, main and footer.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{element('html', head, element('body', *body), lang='en')}\n"
