"""HTML building blocks that escape every text, so that no caller can forget to."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"br", "col", "link", "meta", "wbr"})

# Characters that HTML text must not contain: control characters other than tab and newline, lone surrogates and
# noncharacters. Also the bidirectional controls, which can reorder letters and make a text read as something else.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """A string that already is HTML and is not escaped again."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """The text as HTML. Unsafe characters become their Python escapes, such as ``\\x00``."""
    return Markup(html.escape(_UNSAFE.sub(_python_escape, text), quote=True))


def join(*parts: str) -> Markup:
    """Concatenate the parts; escape those that are not Markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """``<name attributes>content</name>``.

    In attribute names a trailing ``_`` is dropped and every other ``_`` becomes ``-`` (``class_``, ``aria_label``). An
    attribute whose value is None is left out.
    """
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    closing = "" if name in _VOID else f"{join(*content)}</{name}>"
    return Markup(f"<{name}{attribute_text}>{closing}")


def _python_escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
