"""Requests come in and are taken back: each is one more entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data import read_rows, row_kind
from ...errors import AdapterError, DataError
from ...model import compare_bases, compare_names
from .book import Ledger, Request, extended, read_ledger, replayed
from .entries import Added, BaseFacts, Withdrawn, chained, hash_row
from .facts import day_of, describe_adapter, valid_entry


def add_request(
    directory: str | Path,
    name: str,
    *,
    adapter: str | Path,
    forget: str | Path | Sequence[Mapping[str, Any]],
    date: str | None = None,
) -> Ledger:
    """Enter a request with its adapter and its rows. The first one begins the ledger.

    What the ledger holds already is not entered again, so that a call which was killed can be repeated.

    Args:
        directory: of the ledger.
        name: of the request.
        adapter: the directory of the adapter that meets it, below ``directory``.
        forget: the request's rows, or a file of them. The ledger keeps their hashes.
        date: the day of the entry, YYYY-MM-DD; by default today.

    Returns:
        The ledger.

    Raises:
        AdapterError: the adapter is no plain LoRA, is not below the directory, is of another base than the others or
            that of another open request; the request is open with another adapter or other rows; or the ledger is
            damaged.
        ConfigError: the name or the date is none.
        DataError: a row is malformed or in another open request.
        OutputError: another process writes to the ledger, or it cannot be written.
    """
    directory, day = Path(directory), day_of(date)
    facts = describe_adapter(directory, adapter)
    request = valid_entry(Added(request=name, date=day, adapter=facts, forget=_hashes(forget)))
    with extended(directory, begins=True) as entries:
        if _is_new(request, replayed(directory, entries)):
            entries.append(chained(request, entries))
    return read_ledger(directory)


def withdraw_request(directory: str | Path, name: str, *, date: str | None = None) -> Ledger:
    """Take a request back. Its adapter and its entries stay; ``rebuild_adapter`` leaves it out from then on.

    One that was taken back is not taken back again, so that a call which was killed can be repeated.

    Args:
        directory: of the ledger.
        name: of the request.
        date: the day, YYYY-MM-DD; by default today.

    Returns:
        The ledger.

    Raises:
        AdapterError: there is no such request, or no ledger, or a damaged one.
        ConfigError: the date is none.
        OutputError: another process writes to the ledger, or it cannot be written.
    """
    directory, day = Path(directory), day_of(date)
    _known_request(read_ledger(directory), name)
    with extended(directory, begins=False) as entries:
        if _known_request(replayed(directory, entries), name).withdrawn is None:
            entries.append(chained(Withdrawn(request=name, date=day), entries))
    return read_ledger(directory)


def list_requests(directory: str | Path) -> list[Request]:
    """Every request in the order in which they came, with its adapter, its verdicts and whether it is open.

    Args:
        directory: of the ledger.

    Raises:
        AdapterError: there is no ledger, or a damaged one.
    """
    return list(read_ledger(directory).requests.values())


def _known_request(ledger: Ledger, name: str) -> Request:
    """
    Raises:
        AdapterError: the ledger holds no such request.
    """
    if name not in ledger.requests:
        held = ", ".join(map(repr, ledger.requests)) or "none"
        raise AdapterError(f"{ledger.directory} holds no request {name!r}; expected one of {held}")
    return ledger.requests[name]


def _is_new(request: Added, ledger: Ledger) -> bool:
    """Whether the request is to be entered; not where it is open with the same adapter and rows.

    Raises:
        AdapterError: the adapter is of another base, or stands for another open request too; or the request is open
            with another adapter or other rows.
        DataError: a row is in another open request.
    """
    name, adapter = request.request, request.adapter
    known = ledger.requests.get(name)
    if known is not None and known.withdrawn is None:
        if (known.added.adapter, known.added.forget) == (adapter, request.forget):
            return False
        raise AdapterError(
            f"the request {name!r} is open with another adapter or other rows; withdraw it first, or choose another "
            "name"
        )
    if ledger.entries:
        fault = _other_base(adapter["base"], next(iter(ledger.requests.values())).added.adapter["base"])
        if fault:
            raise AdapterError(f"{adapter['path']} was made on {fault}; keep one ledger for each base")
    for other in ledger.open:
        if other.added.adapter["factors_sha256"] == adapter["factors_sha256"]:
            raise AdapterError(
                f"{adapter['path']} holds the factors of the open request {other.name!r}, and its delta would be added "
                "twice; expected an adapter of its own for each request"
            )
        shared = [number for number, row in enumerate(request.forget, start=1) if row in set(other.added.forget)]
        if shared:
            raise DataError(
                f"row {shared[0]} of the request {name!r} is in the open request {other.name!r} too "
                f"({len(shared)} such rows); expected each row in one request: leave them out of one"
            )
    return True


def _other_base(one: BaseFacts, other: BaseFacts) -> str | None:
    """Why two bases are not the same; None where they are, by their weights where both tell, else by their names."""
    same = compare_bases(one, other).get("weights")
    if same is None:
        return compare_names(one["name"], other["name"])
    return None if same else f"{one['name']!r}, and the ledger is of {other['name']!r}, whose weights differ"


def _hashes(forget: str | Path | Sequence[Mapping[str, Any]]) -> list[str]:
    """The hash of each row.

    Raises:
        DataError: there is none, or one is malformed or given twice.
    """
    where = f"{forget}" if isinstance(forget, (str, Path)) else "the forget rows"
    rows = read_rows(forget) if isinstance(forget, (str, Path)) else list(forget)
    if not rows:
        raise DataError(f"{where}: expected at least one row, found none")
    hashes: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        row_kind(row, f"{where}, row {number}")
        first = hashes.setdefault(hash_row(row), number)
        if first != number:
            raise DataError(f"{where}: row {number} is row {first} again; expected each row once")
    return list(hashes)
