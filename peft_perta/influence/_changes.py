"""Find the rows of the training set that change, and what they become; refuse rows that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import (
    ROW_KINDS,
    TEMPLATE_KEYS,
    Sample,
    completion_text,
    encode_row,
    fingerprint,
    load_samples,
    note_left_out,
)
from ..errors import DataError

Pair = tuple[Mapping, Mapping]  # a training row, and the row that replaces it


@dataclass(frozen=True)
class TrainingChange:
    """A training set, and the change of it.

    Attributes:
        training: all n samples that the adapter was trained on.
        changed: those of them that change, every copy, in the order of the training set.
        new: their replacements, one for each; empty where the rows are removed.
        unchanged: the other samples of the training set.
    """

    training: list[Sample]
    changed: list[Sample]
    new: list[Sample]
    unchanged: list[Sample]


def removal(training: Any, forget: Any, tokenizer: Any, max_length: int) -> TrainingChange:
    """The forget rows, every copy of them, leave the training set.

    Raises:
        DataError: a forget row is not in the training set, or no other row is.
    """
    training_samples = load_samples(training, tokenizer, max_length=max_length, name="the training set")
    forget_samples = load_samples(forget, tokenizer, max_length=max_length, name="the forget set")
    change = _find(training_samples, forget_samples, None, "the forget set")
    if not change.unchanged:
        raise DataError(
            f"the forget set is the whole training set ({len(training_samples)} rows), expected a part of it; to "
            "remove everything that an adapter learned, switch the adapter off"
        )
    return change


def query_change(training: Any, changed: Sequence[Pair], tokenizer: Any, max_length: int) -> TrainingChange:
    """Queries change; their completions stay.

    Raises:
        DataError: a pair changes its completion, or does not change its query; or its row is not in the training set,
            or occurs again with another query.
    """
    name = "the modified queries"
    pairs = _check_pairs(changed, name)
    samples = _encode(pairs, tokenizer, max_length, name)
    for number, (old, new) in enumerate(pairs, start=1):
        if completion_text(old) != completion_text(new):
            raise DataError(
                f"{name}, pair {number}: expected the same completion in both rows, found two; use correct_responses "
                "to change a completion"
            )
    return _replacement(training, samples, tokenizer, max_length, name)


def response_change(training: Any, changed: Sequence[Pair], tokenizer: Any, max_length: int) -> TrainingChange:
    """Completions change; their queries stay.

    Raises:
        DataError: a pair changes its query, or does not change its completion; or its row is not in the training set,
            or occurs again with another completion.
    """
    name = "the corrected responses"
    pairs = _check_pairs(changed, name)
    samples = _encode(pairs, tokenizer, max_length, name)
    for number, (old, new) in enumerate(pairs, start=1):
        if _query(old) != _query(new):
            raise DataError(
                f"{name}, pair {number}: expected the same query in both rows, found two; use modify_queries to change "
                "a query"
            )
    return _replacement(training, samples, tokenizer, max_length, name)


def _check_pairs(pairs: Any, name: str) -> list[Pair]:
    if isinstance(pairs, (str, bytes, Mapping)) or not isinstance(pairs, Sequence) or not pairs:
        raise DataError(f"{name}: expected a list of (old row, new row), found {pairs!r:.80}")
    for number, pair in enumerate(pairs, start=1):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(row, Mapping) for row in pair)
        kinds = {_kind(row) for row in pair} if is_pair else set()
        if len(kinds) != 1 or not kinds <= set(ROW_KINDS) - {("text",)}:
            raise DataError(
                f"{name}, pair {number}: expected (old row, new row), both question/answer, both prompt/completion or "
                f"both messages, found {pair!r:.120}"
            )
    return [(old, new) for old, new in pairs]


def _kind(row: Mapping) -> tuple[str, ...] | None:
    return next((kind for kind in ROW_KINDS if all(row.get(key) is not None for key in kind)), None)


def _query(row: Mapping) -> list:
    kind = _kind(row)
    asked = [row["messages"][:-1]] if kind == ("messages",) else [row[key] for key in (kind or ())[:-1]]
    return [*asked, *(row.get(key) for key in TEMPLATE_KEYS)]


def _encode(pairs: list[Pair], tokenizer: Any, max_length: int, name: str) -> list[tuple[Sample, Sample]]:
    encoded = []
    for number, pair in enumerate(pairs, start=1):
        where = f"{name}, pair {number}"
        old, new = (encode_row(row, tokenizer, max_length=max_length, where=where) for row in pair)
        if _key(old) == _key(new):
            raise DataError(f"{where}: expected two different rows, found the same tokens twice")
        encoded.append((old, new))
    note_left_out([new for _, new in encoded], name, max_length)
    return encoded


def _replacement(
    training: Any, pairs: list[tuple[Sample, Sample]], tokenizer: Any, max_length: int, name: str
) -> TrainingChange:
    training_samples = load_samples(training, tokenizer, max_length=max_length, name="the training set")
    first_pair: dict[str, tuple[int, str]] = {}  # old row -> the first pair with it, and that pair's new row
    for number, (old, new) in enumerate(pairs, start=1):
        first, first_new = first_pair.setdefault(_key(old), (number, _key(new)))
        if first_new != _key(new):
            raise DataError(
                f"{name}, pair {number}: its old row is that of pair {first}, expected one new row for it, found two; "
                "every copy of a row changes alike"
            )
    return _find(training_samples, [old for old, _ in pairs], [new for _, new in pairs], name)


def _find(training: list[Sample], old: list[Sample], new: list[Sample] | None, name: str) -> TrainingChange:
    """The training set with its old samples replaced by the new ones, or removed where ``new`` is None."""
    replacements: dict[str, Sample | None] = {}
    for number, sample in enumerate(old):
        replacements.setdefault(_key(sample), new[number] if new else None)
    keys = [_key(sample) for sample in training]
    present = set(keys)
    missing = next((number for number, sample in enumerate(old, start=1) if _key(sample) not in present), None)
    if missing is not None:
        raise DataError(
            f"{name}, row {missing}: expected a row of the training set, token by token, found no such row among its "
            f"{len(training)} rows; give the rows exactly as the adapter was trained on them"
        )
    keyed = list(zip(keys, training, strict=True))
    changed = [(sample, replacements[key]) for key, sample in keyed if key in replacements]
    return TrainingChange(
        training=training,
        changed=[sample for sample, _ in changed],
        new=[sample for _, sample in changed if sample is not None],
        unchanged=[sample for key, sample in keyed if key not in replacements],
    )


def _key(sample: Sample) -> str:
    return fingerprint([sample])
