"""HTML in which a text is escaped unless it is markup already: no caller can forget to."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"br", "col", "link", "meta", "wbr"})


# What no HTML text may hold: control characters (tabs and line ends aside), halves of surrogate pairs, noncharacters.
# And what would turn the order of letters around, so that a text reads as what it is not.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """HTML, as it goes into the page."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """The text as HTML; what is unfit is spelled out, as Python would."""
    return Markup(html.escape(_UNFIT.sub(_spelled, text), quote=True))


def join(*parts: str) -> Markup:
    """The parts one after the other, texts escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """``<name attributes>content</name>``. In an attribute's name a last ``_`` goes, others are ``-``; None: none."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    closing = "" if name in _VOID else f"{join(*content)}</{name}>"
    return Markup(f"<{name}{written}>{closing}")


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
