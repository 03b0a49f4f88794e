"""How a set of rows is named: ``PATH_OR_NAME[:CONFIG][[SPLIT]][?OURS=THEIRS,...]``, or ``default``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError

DEFAULT = "default"  # names the general rows that ship; a file of that name is ./default
SELF = "self"  # names rows that the full model writes, where a command can let it
GENERAL = Path(__file__).parent / "general"  # TOFU's real authors and world facts, and passages of books

_PLACE = re.compile(r"(?P<place>[^\[]+?)(:(?P<config>[^:/\[\]]+))?(\[(?P<split>.+)\])?", re.DOTALL)


@dataclass(frozen=True)
class RowSource:
    """What the name of a set of rows says.

    Attributes:
        place: a file, a directory, or ORG/NAME on the Hugging Face Hub.
        config: the configuration of a data set, where it has several.
        split: the split, and the part of it to take, as ``datasets`` writes it (``train[:20]``).
        columns: our name of a column -> the name in the file.
    """

    place: str
    config: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> RowSource:
        """Read the name. What exists under the whole text, or under all but its columns, is that file or directory.

        Raises:
            DataError: the columns are not written as OURS=THEIRS.
        """
        if text == DEFAULT:
            return cls(str(GENERAL))
        if os.path.exists(text):
            return cls(text)
        rest, mark, listed = text.partition("?")
        columns = _columns(listed) if mark else {}
        match = None if os.path.exists(rest) else _PLACE.fullmatch(rest)
        return cls(rest, columns=columns) if match is None else cls(**match.groupdict(), columns=columns)


def _columns(text: str) -> dict[str, str]:
    """Our names of columns -> theirs, from ``OURS=THEIRS,OURS=THEIRS``.

    Raises:
        DataError: the text is written otherwise, or names one of our columns twice.
    """
    columns: dict[str, str] = {}
    for pair in text.split(","):
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if not ours or not theirs or ours in columns:
            raise DataError(
                "columns: expected OURS=THEIRS, each of ours once, such as question=prompt,answer=response, found "
                f"{text!r}"
            )
        columns[ours] = theirs
    return columns
