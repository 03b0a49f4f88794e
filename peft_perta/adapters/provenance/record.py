"""What every kind of provenance shares: its form in the file, and the pieces of a model card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict

from ...data import read_as, visible
from ...evaluation import Calibration
from .shapes import Base

_Record = TypeVar("_Record", bound="Record")


class Record:
    """The base of every kind of provenance. A kind is a dataclass whose annotations say which JSON its fields hold.

    Attributes:
        KEY: the key of this kind in the provenance file; None where the fields stand at the top level.
        base_model: describes the base model; its 'name' is None where the model has no name or path.
    """

    KEY: ClassVar[str | None]
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    base_model: Base

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON. Wall times (``seconds``) are left out, so that two equal runs write the same bytes."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        values.pop("seconds", None)
        return values if self.KEY is None else {self.KEY: values}

    @classmethod
    def from_dict(cls: type[_Record], values: dict[str, Any]) -> _Record:
        """The record that ``to_dict`` returned as ``values``.

        Raises:
            ValueError: ``values`` is not a record of this kind; the message names the first field that is not.
        """
        return read_as(cls, values if cls.KEY is None else values[cls.KEY])

    @property
    def base_name(self) -> str:
        """The base model's name, as the model card shows it."""
        return self.base_model["name"] or "the base model"

    @property
    def base_code(self) -> str:
        """The same as code in Markdown."""
        return code_span(self.base_name)

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        raise NotImplementedError


def code_span(text: Any) -> str:
    """A name of others as code in Markdown: it ends neither the span nor the table's cell that it stands in."""
    text = visible(" ".join(str(text).split())).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text[:1] + text[-1:] else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def named_hash(adapter: Mapping[str, Any]) -> str:
    """An adapter's name and the start of its SHA-256, in Markdown."""
    return f"{code_span(adapter['name'])}, SHA-256 `{adapter['sha256'][:16]}`"


def searched_on(calibration: Calibration) -> list[str]:
    """The lines that say for which form of the base the strength was set; none where it is not on record."""
    if calibration.measured_on is None:
        return []
    return [
        f"The strength was set for a base in {code_span(calibration.measured_on)}. On a base in another form it "
        "forgets another amount: measure again, or calibrate anew.",
        "",
    ]


def data_table(data: Mapping[str, Mapping[str, Any]], heading: str) -> list[str]:
    """A Markdown table of data sets: name, number of samples and the start of the SHA-256 of their tokens."""
    rows = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in data.items()]
    return [f"| {heading} | samples | SHA-256 |", "|---|---|---|", *rows]
