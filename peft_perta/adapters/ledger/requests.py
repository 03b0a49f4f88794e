"""Requests come in, are audited and are taken back: each is one more entry."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...data import read_as, read_json, read_rows, row_kind
from ...errors import AdapterError, ConfigError, DataError
from ...evaluation import read_audit
from ...model import (
    CONFIG_NAME,
    check_adapter_files,
    compare_bases,
    compare_names,
    find_adapter,
    hash_factors,
    hash_file,
    identify_base_files,
    recorded_base,
)
from .book import Ledger, Request, extended, read_ledger, replayed
from .entries import AdapterFacts, Added, Audited, AuditFacts, BaseFacts, Entry, Withdrawn, chained, hash_row

_Kind = TypeVar("_Kind", bound=Entry)


def add_request(
    directory: str | Path,
    name: str,
    *,
    adapter: str | Path | None = None,
    forget: str | Path | Sequence[Mapping[str, Any]] | None = None,
    audit: str | Path | None = None,
    date: str | None = None,
) -> Ledger:
    """Enter a request with its adapter and its rows, or a verdict on one that is open. The first one begins the ledger.

    What the ledger holds already is not entered again, so that a call which was killed can be repeated.

    Args:
        directory: of the ledger.
        name: of the request.
        adapter: the directory of the adapter that meets it, below ``directory``; None for an open request.
        forget: the request's rows, or a file of them; None for an open request. The ledger keeps their hashes.
        audit: the ``audit.json`` of an audit of the adapter, if there is one.
        date: the day of the entry, YYYY-MM-DD; by default today.

    Returns:
        The ledger.

    Raises:
        AdapterError: the adapter is no plain LoRA, is not below the directory, is of another base than the others or
            that of another open request; the request is open with another adapter or other rows, or an audit comes
            for one that is not open; or the ledger is damaged.
        ConfigError: the name or the date is none, or something is missing.
        DataError: a row is malformed or in another open request, or the audit is none or of another adapter.
        OutputError: another process writes to the ledger, or it cannot be written.
    """
    if (adapter is None) != (forget is None) or (adapter is None and audit is None):
        raise ConfigError(
            f"request {name!r}: expected an adapter and the rows to forget, or an audit of an open request; give "
            "--adapter and --forget, or --audit"
        )
    directory, day = Path(directory), _day(date)
    request, verdict = None, None
    if adapter is not None and forget is not None:
        facts = _describe(directory, adapter)
        request = _valid(Added(request=name, date=day, adapter=facts, forget=_hashes(forget)))
    if audit is not None:
        verdict = _valid(Audited(request=name, date=day, audit=_read_verdict(audit)))
    with extended(directory, begins=request is not None) as entries:
        if request is not None and _is_new(request, replayed(directory, entries)):
            entries.append(chained(request, entries))
        if verdict is not None and _is_new_verdict(verdict, replayed(directory, entries)):
            entries.append(chained(verdict, entries))
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
    directory, day = Path(directory), _day(date)
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


def _is_new_verdict(verdict: Audited, ledger: Ledger) -> bool:
    """Whether the verdict is to be entered; not where it was.

    Raises:
        AdapterError: the request is not open.
        DataError: the audit is of another adapter.
    """
    request = _known_request(ledger, verdict.request)
    if request.withdrawn is not None:
        raise AdapterError(f"the request {request.name!r} was withdrawn on {request.withdrawn}; add it again first")
    if request.added.adapter["factors_sha256"] != verdict.audit["factors_sha256"]:
        raise DataError(
            f"the audit is of another adapter than that of the request {request.name!r}; audit "
            f"{ledger.place(request)}, as the last of its stack"
        )
    return verdict.audit not in [entry.audit for entry in request.audits]


def _read_verdict(audit: str | Path) -> AuditFacts:
    """The facts of an ``audit.json``.

    Raises:
        DataError: it is none, or of an adapter at another strength than its own.
    """
    result = read_audit(audit)
    strength = list(result.adapters.values())[-1]
    if strength != 1:
        raise DataError(f"{audit} is of the adapter at {strength:g} times its strength; audit the adapter as it is")
    return {
        "file_sha256": hash_file(Path(audit)),
        "factors_sha256": result.factors[-1],
        "verdict": result.verdict,
        "because": result.because,
        "yardstick": result.yardstick,
        "rows": result.rows,
    }


def _describe(directory: Path, adapter: str | Path) -> AdapterFacts:
    """What the ledger keeps of an adapter.

    Raises:
        AdapterError: it is no plain LoRA, does not lie below the directory, or the record beside it is damaged.
    """
    check_adapter_files(adapter)
    place = find_adapter(adapter)
    own, above = place.resolve(), directory.resolve()
    if above not in own.parents:
        raise AdapterError(
            f"{adapter} does not lie below {directory}, expected the adapters of a ledger there; copy it"
        )
    recorded = recorded_base(place) or {}
    named = recorded.get("name") or read_json(place / CONFIG_NAME).get("base_model_name_or_path")
    parts = {key: recorded.get(key) for key in ("weights_sha256", "embeddings_sha256", "files")}
    try:
        base = read_as(BaseFacts, {"name": named, **parts})
    except ValueError as error:
        raise AdapterError(f"{adapter}: what it says of its base is damaged ({error}); make it again") from error
    if base["files"] is None and base["name"]:
        base["files"] = identify_base_files(base["name"])
    return {
        "path": own.relative_to(above).as_posix(),
        "factors_sha256": hash_factors(place),
        "config_sha256": hash_file(place / CONFIG_NAME),
        "base": base,
    }


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


def _day(date: str | None) -> str:
    """The day, by default today.

    Raises:
        ConfigError: it is none.
    """
    try:
        day = datetime.date.fromisoformat(date) if date is not None else datetime.date.today()
    except ValueError as error:
        raise ConfigError(f"date: expected a day as YYYY-MM-DD, found {date!r}") from error
    return day.isoformat()


def _valid(entry: _Kind) -> _Kind:
    """The entry.

    Raises:
        ConfigError: a field is not what it must be, such as a name of several lines.
    """
    try:
        return chained(entry, [])
    except ValueError as error:
        raise ConfigError(f"request {entry.request!r}: {error}; choose another name") from error
