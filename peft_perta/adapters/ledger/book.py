"""The file of a ledger: read whole and checked, and written with more entries at its end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...data import hold_lock, read_json, write_file
from ...errors import AdapterError
from .entries import BEGINNING, FORMAT, Added, AnyEntry, Audited, Rebuilt, Withdrawn, read_entries

LEDGER_NAME = "perta_ledger.json"
LOCK_NAME = "perta_ledger.lock"  # empty, or the number of the process that writes to the ledger


@dataclass(frozen=True)
class Request:
    """A request as the entries leave it.

    Attributes:
        added: the entry that brought it.
        audits: the verdicts on its adapter, the oldest first.
        withdrawn: the day on which it was taken back; None where it is open.
    """

    added: Added
    audits: tuple[Audited, ...] = ()
    withdrawn: str | None = None

    @property
    def name(self) -> str:
        """The request's name."""
        return self.added.request


@dataclass(frozen=True)
class ServedAdapter:
    """The one adapter that was made of the open requests.

    Attributes:
        rebuilt: the entry that brought it.
        audits: the verdicts on it, the oldest first.
        stale: whether a request came or was taken back since.
    """

    rebuilt: Rebuilt
    audits: tuple[Audited, ...] = ()
    stale: bool = False


@dataclass(frozen=True)
class Ledger:
    """A ledger that was read.

    Attributes:
        directory: where it is; the adapters are below.
        entries: its history.
        requests: every request by its name, in the order in which they came. One that came again after it was taken
            back stands where it came again.
        served: the adapter of all open requests that was rebuilt last; None where none was.
    """

    directory: Path
    entries: list[AnyEntry]
    requests: dict[str, Request]
    served: ServedAdapter | None = None

    @property
    def open(self) -> list[Request]:
        """The requests that were not taken back."""
        return [request for request in self.requests.values() if request.withdrawn is None]

    @property
    def last(self) -> str:
        """The hash of the last entry, which stands for the whole history."""
        return self.entries[-1].sha256 if self.entries else BEGINNING

    def __str__(self) -> str:
        count = len(self.entries)
        return f"{count} {'entry' if count == 1 else 'entries'}; the last is {self.last}"

    def place(self, entry: Added | Rebuilt) -> Path:
        """The directory of an entry's adapter."""
        return self.directory / entry.adapter["path"]


def read_ledger(directory: str | Path) -> Ledger:
    """Read a ledger, and check that each of its entries is as it was written and follows the one before it.

    Args:
        directory: holds ``perta_ledger.json``.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    file = Path(directory) / LEDGER_NAME
    try:
        return replayed(Path(directory), read_entries(read_json(file)))
    except FileNotFoundError as error:
        raise AdapterError(
            f"expected a ledger at {file}, found none; begin one with `peft-perta ledger add`"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged ({error}); take it from a backup") from error


def replayed(directory: Path, entries: Sequence[AnyEntry]) -> Ledger:
    """The ledger that the entries amount to.

    Raises:
        ValueError: an open request comes again; one that is not open is audited or taken back; or an adapter of all
            open requests is rebuilt of none, or audited before it was.
    """
    requests: dict[str, Request] = {}
    served: ServedAdapter | None = None
    for number, entry in enumerate(entries, start=1):
        try:
            if isinstance(entry, Rebuilt) or (isinstance(entry, Audited) and entry.request is None):
                served = _served_after(entry, served, requests)
            else:
                _put_request(entry, requests)
                if served is not None and not isinstance(entry, Audited):
                    served = dataclasses.replace(served, stale=True)
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from error
    in_order = sorted(requests.values(), key=lambda request: entries.index(request.added))
    return Ledger(directory, list(entries), {request.name: request for request in in_order}, served)


def _served_after(
    entry: Rebuilt | Audited, served: ServedAdapter | None, requests: dict[str, Request]
) -> ServedAdapter:
    if isinstance(entry, Rebuilt):
        if all(request.withdrawn for request in requests.values()):
            raise ValueError("no request is open")
        return ServedAdapter(entry)
    if served is None:
        raise ValueError("no adapter of all open requests was rebuilt")
    return dataclasses.replace(served, audits=(*served.audits, entry))


def _put_request(entry: Added | Audited | Withdrawn, requests: dict[str, Request]) -> None:
    """Take the entry of a request into account."""
    assert entry.request is not None
    request = requests.pop(entry.request, None)
    if isinstance(entry, Added) != (request is None or request.withdrawn is not None):
        raise ValueError(f"the request {entry.request!r} is {'open' if isinstance(entry, Added) else 'not open'}")
    if isinstance(entry, Added):
        requests[entry.request] = Request(entry)
        return
    assert request is not None
    if isinstance(entry, Withdrawn):
        request = dataclasses.replace(request, withdrawn=entry.date)
    else:
        request = dataclasses.replace(request, audits=(*request.audits, entry))
    requests[entry.request] = request


@contextmanager
def extended(directory: Path, *, begins: bool) -> Iterator[list[AnyEntry]]:
    """Yield the entries; those that the block puts at the end are written, all or none.

    Args:
        directory: of the ledger.
        begins: whether there may be no ledger yet.

    Raises:
        AdapterError: there is no ledger, or a damaged one.
        OutputError: another process writes to it, or it cannot be written.
    """
    file = directory / LEDGER_NAME
    if not begins:
        read_ledger(directory)
    lock = hold_lock(directory / LOCK_NAME, str(file), "which writes to it; run this again when that has ended")
    try:
        entries = read_ledger(directory).entries if file.exists() or not begins else []
        count = len(entries)
        yield entries
        if len(entries) > count:
            values = {"format": FORMAT, "entries": [dataclasses.asdict(entry) for entry in entries]}
            write_file(file, json.dumps(values, indent=1) + "\n")
    finally:
        if lock is not None:
            lock.truncate(0)
            lock.close()
