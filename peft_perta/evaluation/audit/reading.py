"""The result of an audit, read back from its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ...data import read_as, read_json
from ...errors import DataError
from .verdict import FORGOTTEN, STILL_THERE, SUPPRESSED

_VERDICTS = "|".join((FORGOTTEN, STILL_THERE, SUPPRESSED))


@dataclass(frozen=True)
class AuditResult:
    """What ``audit.json`` says of an audit; its evidence is left in the file.

    Attributes:
        verdict: one of ``FORGOTTEN``, ``SUPPRESSED`` and ``STILL_THERE``.
        because: the verdict with what decided it.
        yardstick: what stood for 'never learned': 'retain-only', or 'origin'.
        rows: the number of forget rows that were attacked.
        adapters: each adapter of the stack and the strength that it had, the one in question last.
        factors: SHA-256 of the factors of each, in the same order.
    """

    verdict: Annotated[str, Field(pattern=f"^({_VERDICTS})$")]
    because: str
    yardstick: Annotated[str, Field(pattern="^(retain-only|origin)$")]
    rows: Annotated[int, Field(ge=1)]
    adapters: Annotated[dict[str, float], Field(min_length=1)]
    factors: Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(min_length=1)]


def read_audit(path: str | Path) -> AuditResult:
    """Read the ``audit.json`` of ``peft-perta audit``.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        return read_as(AuditResult, read_json(path))
    except FileNotFoundError as error:
        raise DataError(f"expected the audit.json of an audit at {path}, found none; check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no result of an audit ({error}); make the audit again") from error
