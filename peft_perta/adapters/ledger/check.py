"""Check a ledger against the disk: its own history, the adapters and the base that it names, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import read_rows
from ...errors import AdapterError, DataError
from ...model import (
    CONFIG_NAME,
    check_adapter_files,
    compare_bases,
    find_adapter,
    hash_factors,
    hash_file,
    identify_base_files,
)
from ..verify import Check
from .book import Ledger, Request, ServedAdapter, read_ledger
from .entries import Added, Rebuilt, hash_row


def check_ledger(
    directory: str | Path,
    *,
    forget: Sequence[str | Path] = (),
    base: str | None = None,
    revision: str | None = None,
    seen: str | None = None,
) -> list[Check]:
    """Check that no entry was changed, and that the adapters of the open requests are as they were added.

    Args:
        directory: of the ledger.
        forget: files of the rows of all open requests; none for no check of the rows.
        base: the base model, where it is no longer at its recorded name.
        revision: revision of a hub model.
        seen: the hash of the last entry as it was seen before: the history up to there must be in the ledger still.

    Returns:
        The checks, passed or failed; neither where the base's files are not on this machine.
    """
    try:
        ledger = read_ledger(directory)
    except AdapterError as error:
        return [Check("the ledger", False, str(error))]
    checks = [Check("the ledger", True, f"whole: {ledger}")]
    if seen is not None:
        kept = seen in [entry.sha256 for entry in ledger.entries]
        checks.append(Check("the history seen before", kept, "is kept" if kept else "is not in this ledger"))
    checks += [_check_adapter(ledger, request) for request in ledger.open]
    if ledger.served is not None:
        checks.append(_check_served(ledger, ledger.served))
    if ledger.open:
        checks.append(_check_base(ledger, base, revision))
    if forget:
        checks.append(_check_rows(ledger, forget))
    return checks


def open_adapters(directory: str | Path) -> dict[str, Path]:
    """The adapters of the open requests, under names that a model takes, in the order of the requests.

    Raises:
        AdapterError: no request is open, an adapter is gone or not as it was added, or the ledger is damaged.
    """
    ledger = read_ledger(directory)
    if not ledger.open:
        raise AdapterError(f"{directory} holds no open request, so that there is nothing to rebuild; add one")
    for check in (_check_adapter(ledger, request) for request in ledger.open):
        if check.failed:
            raise AdapterError(f"{check.name}: {check.found}; put it back as it was, or withdraw the request")
    return {f"request_{number}": ledger.place(request.added) for number, request in enumerate(ledger.open, start=1)}


def open_rows(directory: str | Path, files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The rows of the open requests, in the ledger's order, whatever the order of the files and in them.

    Args:
        directory: of the ledger.
        files: rows of the open requests, all of them and no others.

    Raises:
        AdapterError: there is no ledger, or a damaged one.
        DataError: a file is missing or malformed, a row is of no open request, or one is missing.
    """
    return _rows(read_ledger(directory), files)


def _rows(ledger: Ledger, files: Sequence[str | Path]) -> list[dict[str, Any]]:
    wanted = {row: request for request in ledger.requests.values() for row in request.added.forget}
    wanted |= {row: request for request in ledger.open for row in request.added.forget}
    given: dict[str, dict[str, Any]] = {}
    for file in files:
        for number, row in enumerate(read_rows(file), start=1):
            request = wanted.get(hash_row(row))
            if request is None or request.withdrawn is not None:
                of = "no request" if request is None else f"the request {request.name!r}, which was withdrawn"
                raise DataError(f"{file}, row {number} is of {of}; give the rows of the open requests alone")
            given[hash_row(row)] = row
    for request in ledger.open:
        missing = [row for row in request.added.forget if row not in given]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(request.added.forget)} rows of the request {request.name!r} are in no "
                "file; give all rows of the open requests, as they were when they were added"
            )
    return [given[row] for request in ledger.open for row in request.added.forget]


def _check_rows(ledger: Ledger, files: Sequence[str | Path]) -> Check:
    try:
        count = len(_rows(ledger, files))
    except DataError as error:
        return Check("the rows", False, str(error))
    return Check("the rows", True, f"all {count} of the open requests, and no other")


def _check_adapter(ledger: Ledger, request: Request) -> Check:
    """Whether the adapter of a request is as it was entered, and of no other request too."""
    check = _check_files(ledger, request.added, f"request {request.name}")
    own = request.added.adapter["factors_sha256"]
    same = [other.name for other in ledger.open if other.added.adapter["factors_sha256"] == own]
    if check.passed and len(same) > 1:
        found = f"{ledger.place(request.added)} counts twice: the requests {' and '.join(same)} have the same factors"
        return Check(check.name, False, found)
    return check


def _check_served(ledger: Ledger, served: ServedAdapter) -> Check:
    """Whether the adapter of all open requests is as it was entered, and the open requests are still those."""
    check = _check_files(ledger, served.rebuilt, "the adapter of all")
    if check.passed and served.stale:
        place = ledger.place(served.rebuilt)
        found = f"requests came or were taken back since {place} was made; rebuild it, or serve none"
        return Check(check.name, False, found)
    return check


def _check_files(ledger: Ledger, entry: Added | Rebuilt, name: str) -> Check:
    """Whether the files of an adapter are as they were entered."""
    recorded, place = entry.adapter, ledger.place(entry)
    if not place.is_dir():
        return Check(name, False, f"{place} is gone")
    try:
        check_adapter_files(place)
    except AdapterError as error:
        return Check(name, False, str(error))
    if hash_factors(find_adapter(place)) != recorded["factors_sha256"]:
        return Check(name, False, f"{place} holds other factors than those that were entered")
    if hash_file(find_adapter(place) / CONFIG_NAME) != recorded["config_sha256"]:
        return Check(name, False, f"{place / CONFIG_NAME} is not as it was entered")
    return Check(name, True, f"{place} is as it was entered")


def _check_base(ledger: Ledger, base: str | None, revision: str | None) -> Check:
    """Whether the files of the base are those that the adapters were made on."""
    recorded = ledger.open[0].added.adapter["base"]
    where = base or recorded["name"]
    files = identify_base_files(where, revision) if where else None
    same = compare_bases(recorded, {"files": files}).get("weights")
    if same is None:
        return Check("the base", None, f"{where!r} is not on this machine, or has no weights to compare")
    return Check("the base", same, f"{where!r} has {'the weights of the adapters' if same else 'other weights'}")
