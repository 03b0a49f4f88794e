"""What the user should know, although nothing is wrong: a line on standard error."""

from __future__ import annotations

import functools
import os
import sys

from tqdm.auto import tqdm


def visible(text: str) -> str:
    """A text of others for a terminal or a page: what moves a cursor, changes colours or turns the direction of writing
    is shown as an escape sequence. Line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def note(line: str) -> None:
    """Say a line, once, above any progress bar. Of several processes only the main one says it."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(visible(line), file=sys.stderr)
