"""Which rows change, and to what: found in the training set, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import ROW_KINDS, Sample, completion_text, encode_row, fingerprint, load_samples
from ..errors import DataError

Pair = tuple[Mapping, Mapping]  # a training row, and what it should have been


@dataclass(frozen=True)
class Problem:
    """A training set, and the change of it.

    Attributes:
        training: all n samples that the adapter was trained on.
        before: those of them that change, every copy; in their order.
        after: what they become, as many; empty where they are erased.
        kept: the rest of the training set.
    """

    training: list[Sample]
    before: list[Sample]
    after: list[Sample]
    kept: list[Sample]


def erasure(training_rows: Any, erased_rows: Any, tokenizer: Any, max_length: int) -> Problem:
    """The rows to erase, every copy of them, leave the training set.

    Raises:
        DataError: one of them is not in it, or nothing else is.
    """
    training = load_samples(training_rows, tokenizer, max_length=max_length, name="the training set")
    erased = load_samples(erased_rows, tokenizer, max_length=max_length, name="the rows to erase")
    problem = _changed(training, erased, None, "the rows to erase")
    if not problem.kept:
        raise DataError(
            f"the rows to erase are the whole training set ({len(training)} rows), expected a part of it; to be rid of "
            "everything that an adapter learned, leave it away"
        )
    return problem


def modification(training_rows: Any, pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> Problem:
    """Queries change, their completions stay.

    Raises:
        DataError: a pair changes its completion, or not its query; its row is not in the training set, or comes again
            with another query.
    """
    name = "the modified queries"
    checked = _pairs(pairs, name)
    samples = _encoded(checked, tokenizer, max_length, name)
    for number, (old, new) in enumerate(checked, start=1):
        if completion_text(old) != completion_text(new):
            raise DataError(
                f"{name}, pair {number}: expected one completion in both rows, found another; use "
                "correct_responses for that"
            )
    return _replaced(training_rows, samples, tokenizer, max_length, name)


def correction(training_rows: Any, pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> Problem:
    """Completions change, their queries stay.

    Raises:
        DataError: a pair changes its query, or not its completion; its row is not in the training set, or comes again
            with another completion.
    """
    name = "the corrected responses"
    checked = _pairs(pairs, name)
    samples = _encoded(checked, tokenizer, max_length, name)
    for number, (old, new) in enumerate(checked, start=1):
        if _query(old) != _query(new):
            raise DataError(
                f"{name}, pair {number}: expected one query in both rows, found another; use modify_queries for that"
            )
    return _replaced(training_rows, samples, tokenizer, max_length, name)


def _pairs(pairs: Any, name: str) -> list[Pair]:
    if isinstance(pairs, (str, bytes, Mapping)) or not isinstance(pairs, Sequence) or not pairs:
        raise DataError(f"{name}: expected a list of (old row, new row), found {pairs!r:.80}")
    for number, pair in enumerate(pairs, start=1):
        whole = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(row, Mapping) for row in pair)
        kinds = {_kind(row) for row in pair} if whole else set()
        if len(kinds) != 1 or not kinds <= set(ROW_KINDS) - {("text",)}:
            raise DataError(
                f"{name}, pair {number}: expected (old row, new row), both question/answer, prompt/completion or "
                f"messages, found {pair!r:.120}"
            )
    return [(old, new) for old, new in pairs]


def _kind(row: Mapping) -> tuple[str, ...] | None:
    return next((kind for kind in ROW_KINDS if all(row.get(key) is not None for key in kind)), None)


def _query(row: Mapping) -> list:
    kind = _kind(row)
    return row["messages"][:-1] if kind == ("messages",) else [row[key] for key in (kind or ())[:-1]]


def _encoded(pairs: list[Pair], tokenizer: Any, max_length: int, name: str) -> list[tuple[Sample, Sample]]:
    found = []
    for number, pair in enumerate(pairs, start=1):
        where = f"{name}, pair {number}"
        old, new = (encode_row(row, tokenizer, max_length=max_length, where=where) for row in pair)
        if _key(old) == _key(new):
            raise DataError(f"{where}: expected two different rows, found the same tokens twice")
        found.append((old, new))
    return found


def _replaced(
    training_rows: Any, pairs: list[tuple[Sample, Sample]], tokenizer: Any, max_length: int, name: str
) -> Problem:
    training = load_samples(training_rows, tokenizer, max_length=max_length, name="the training set")
    becomes: dict[str, tuple[int, str]] = {}
    for number, (old, new) in enumerate(pairs, start=1):
        first, other = becomes.setdefault(_key(old), (number, _key(new)))
        if other != _key(new):
            raise DataError(
                f"{name}, pair {number}: its old row is that of pair {first}, expected one new row for it, found two; "
                "every copy of a row changes alike"
            )
    return _changed(training, [old for old, _ in pairs], [new for _, new in pairs], name)


def _changed(training: list[Sample], old: list[Sample], new: list[Sample] | None, name: str) -> Problem:
    becomes: dict[str, Sample | None] = {}
    for number, sample in enumerate(old):
        becomes.setdefault(_key(sample), new[number] if new else None)
    keys = [_key(sample) for sample in training]
    there = set(keys)
    missing = next((number for number, sample in enumerate(old, start=1) if _key(sample) not in there), None)
    if missing is not None:
        raise DataError(
            f"{name}, row {missing}: expected a row of the training set, token by token, found none such among its "
            f"{len(training)} rows; give the rows as the adapter was trained on them"
        )
    pairs = zip(keys, training, strict=True)
    before = [(sample, becomes[key]) for key, sample in pairs if key in becomes]
    kept = [sample for key, sample in zip(keys, training, strict=True) if key not in becomes]
    after = [sample for _, sample in before if sample is not None]
    return Problem(training, [sample for sample, _ in before], after, kept)


def _key(sample: Sample) -> str:
    return fingerprint([sample])
