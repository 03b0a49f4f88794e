"""The one adapter of all open requests: their exact sum, at the one strength that meets a goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from ...data import Sample
from ...errors import AdapterError, NumericalError
from ...evaluation import Goal, calibrate
from ...model import compare_bases, identify_base, remove_adapter
from ..emitted import EmittedAdapter
from ..fuse import combine_adapters
from .book import Ledger, extended, read_ledger, replayed
from .entries import Rebuilt, chained
from .facts import day_of, describe_adapter, valid_entry

_SUM = "perta_rebuilt"


def rebuild_adapter(
    model: PeftModel,
    directory: str | Path,
    goal: Goal,
    forget: list[Sample],
    retain: list[Sample],
    with_adapters: Sequence[str] = (),
    rank: int | None = None,
) -> EmittedAdapter:
    """s sum_k B_k A_k over the open requests, with the one strength s that meets the goal on all their rows together.

    Adapters that are each right by themselves forget too much together, because each also forgets some of the others'
    rows (docs/fidelity.md); so their sum is searched for its own strength. Of one open request it is its adapter, as
    ``calibrate`` alone would scale it.

    Args:
        model: the base with the adapters of ``open_adapters`` on it. It is left as it was.
        directory: of the ledger.
        goal: the forget loss to meet, or the accepted rise of the retain loss.
        forget: the samples of ``open_rows``.
        retain: retain samples; take samples that no gradient was taken of.
        with_adapters: adapters that are on during the search, such as the task adapter.
        rank: truncate the sum to this rank, at an error that the provenance holds; by default it is exact.

    Returns:
        The adapter. Its provenance names the requests, with the SHA-256 of their factors, and holds the search.

    Raises:
        AdapterError: no request is open, an adapter is not on the model, or the model is another base.
        ConfigError: the sum of the ranks is above what servers accept and no rank is given.
        DataError: a set is empty, or a sample is in both sets.
        NumericalError: no strength meets the goal.
    """
    ledger = read_ledger(directory)
    labels = {f"request_{number}": request.name for number, request in enumerate(ledger.open, start=1)}
    if not labels:
        raise AdapterError(f"{directory} holds no open request, so that there is nothing to rebuild; add one")
    if compare_bases(ledger.open[0].added.adapter["base"], identify_base(model)).get("weights") is False:
        raise AdapterError(f"the model has other weights than the base of {directory}; load the base of its adapters")
    combine_adapters(model, dict.fromkeys(labels, 1.0), rank=rank, labels=labels).add_to(model, _SUM)
    try:
        calibration = calibrate(model, goal, forget, retain, adapter_name=_SUM, with_adapters=with_adapters)
    finally:
        remove_adapter(model, _SUM)
    if not calibration.strength:
        raise NumericalError(
            "the adapters of the open requests forget nothing within the goal; allow more, or check them"
        )
    strengths = dict.fromkeys(labels, calibration.strength)
    return combine_adapters(model, strengths, rank=rank, labels=labels).with_calibration(calibration)


def record_rebuilt(directory: str | Path, adapter: str | Path, *, seen: str, date: str | None = None) -> Ledger:
    """Enter the adapter that ``rebuild_adapter`` made as the one that is served for all open requests.

    The same adapter of the same requests is not entered again.

    Args:
        directory: of the ledger.
        adapter: the directory of the adapter, below ``directory``.
        seen: ``Ledger.last`` as it was when the adapter was made.
        date: the day of the entry, YYYY-MM-DD; by default today.

    Returns:
        The ledger.

    Raises:
        AdapterError: requests came or were taken back since, the adapter is no plain LoRA or does not lie below the
            directory, or the ledger is damaged.
        ConfigError: the date is none.
        OutputError: another process writes to the ledger, or it cannot be written.
    """
    directory, day = Path(directory), day_of(date)
    rebuilt = valid_entry(Rebuilt(date=day, adapter=describe_adapter(directory, adapter)))
    with extended(directory, begins=False) as entries:
        ledger = replayed(directory, entries)
        then = next((count for count, entry in enumerate(entries, start=1) if entry.sha256 == seen), 0)
        if [request.added for request in replayed(directory, entries[:then]).open] != [
            request.added for request in ledger.open
        ]:
            raise AdapterError(f"requests came to {directory} or were taken back while {adapter} was made; rebuild it")
        served = ledger.served
        if served is None or served.stale or served.rebuilt.adapter != rebuilt.adapter:
            entries.append(chained(rebuilt, entries))
    return read_ledger(directory)
