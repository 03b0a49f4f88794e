"""What the user should know, although nothing is wrong: a line on standard error."""

from __future__ import annotations

import functools
import os
import sys

from tqdm.auto import tqdm


@functools.cache
def note(line: str) -> None:
    """Say a line, once, above any progress bar. Of several processes only the main one says it."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
