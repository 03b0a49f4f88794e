"""Verdicts: each is one more entry, for the adapter whose factors the audit names."""

from __future__ import annotations

from pathlib import Path

from ...errors import DataError
from ...evaluation import read_audit
from ...model import hash_file
from .book import Ledger, extended, read_ledger, replayed
from .entries import Audited, AuditFacts, chained
from .facts import day_of, valid_entry


def record_audit(directory: str | Path, audit: str | Path, *, date: str | None = None) -> Ledger:
    """Enter the verdict on the adapter of an open request, or on the one that was rebuilt of all.

    The audit itself tells which: it holds the hash of the factors of the last adapter in its stack. A verdict that the
    ledger holds already is not entered again.

    Args:
        directory: of the ledger.
        audit: the ``audit.json`` that ``peft-perta audit`` wrote.
        date: the day of the entry, YYYY-MM-DD; by default today.

    Returns:
        The ledger.

    Raises:
        AdapterError: there is no ledger, or a damaged one.
        ConfigError: the date is none.
        DataError: the audit is none, of an adapter at another strength than its own, or of one that the ledger does not
            hold.
        OutputError: another process writes to the ledger, or it cannot be written.
    """
    directory, day, facts = Path(directory), day_of(date), _read_verdict(audit)
    _find_audited(read_ledger(directory), facts, audit)
    with extended(directory, begins=False) as entries:
        request, known = _find_audited(replayed(directory, entries), facts, audit)
        if facts not in known:
            entries.append(chained(valid_entry(Audited(request=request, date=day, audit=facts)), entries))
    return read_ledger(directory)


def _find_audited(ledger: Ledger, facts: AuditFacts, audit: str | Path) -> tuple[str | None, list[AuditFacts]]:
    """The request whose adapter was audited, None for the one of all; and the verdicts on it so far.

    Raises:
        DataError: the ledger holds no such adapter.
    """
    for request in ledger.open:
        if request.added.adapter["factors_sha256"] == facts["factors_sha256"]:
            return request.name, [entry.audit for entry in request.audits]
    served = ledger.served
    if served is not None and served.rebuilt.adapter["factors_sha256"] == facts["factors_sha256"]:
        return None, [entry.audit for entry in served.audits]
    raise DataError(
        f"{audit} is of an adapter that is neither an open request's nor the one that was rebuilt last; audit one of "
        "these, as the last of its stack"
    )


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
