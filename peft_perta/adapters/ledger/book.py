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
from .entries import BEGINNING, FORMAT, Added, AnyEntry, Audited, Withdrawn, read_entries

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
class Ledger:
    """A ledger that was read.

    Attributes:
        directory: where it is; the adapters are below.
        entries: its history.
        requests: every request by its name, in the order in which they came. One that came again after it was taken
            back stands where it came again.
    """

    directory: Path
    entries: list[AnyEntry]
    requests: dict[str, Request]

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

    def place(self, request: Request) -> Path:
        """The directory of a request's adapter."""
        return self.directory / request.added.adapter["path"]


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
        ValueError: an open request comes again, or one that is not open is audited or taken back.
    """
    requests: dict[str, Request] = {}
    for number, entry in enumerate(entries, start=1):
        request = requests.pop(entry.request, None)
        if isinstance(entry, Added) != (request is None or request.withdrawn is not None):
            state = "open" if isinstance(entry, Added) else "not open"
            raise ValueError(f"entry {number}: the request {entry.request!r} is {state}")
        if isinstance(entry, Added):
            requests[entry.request] = Request(entry)
            continue
        assert request is not None
        if isinstance(entry, Withdrawn):
            request = dataclasses.replace(request, withdrawn=entry.date)
        else:
            request = dataclasses.replace(request, audits=(*request.audits, entry))
        requests[entry.request] = request
    in_order = sorted(requests.values(), key=lambda request: entries.index(request.added))
    return Ledger(directory, list(entries), {request.name: request for request in in_order})


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
