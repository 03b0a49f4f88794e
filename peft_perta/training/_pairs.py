"""Both sets as one dataset of pairs: a forget sample (with its refusal, if a loss needs one) and a retain sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import (
    ROW_KINDS,
    TEMPLATE_KEYS,
    Sample,
    check_disjoint,
    encode_row,
    load_samples,
    note_left_out,
    padded,
    read_rows,
)
from ..errors import DataError
from .settings import UnlearningSettings


@dataclass(frozen=True)
class RefusedSample(Sample):
    """A forget sample, and the sample with the same prompt whose completion is a refusal."""

    refusal: Sample


Pair = dict[str, Sample]  # 'forget', 'retain' and, if the forget samples are refused, 'refusal'


class Pairs(Dataset):
    """(index of a forget sample, index of a retain sample) -> the pair.

    Args:
        forget: the forget samples; ``RefusedSample`` if the forget loss needs refusals.
        retain: the retain samples.

    Raises:
        DataError: a sample is in both sets.
    """

    def __init__(self, forget: list[Sample], retain: list[Sample]) -> None:
        self.forget, self.retain = forget, retain
        check_disjoint(forget, retain)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: tuple[int, int]) -> Pair:
        forget, retain = self.forget[index[0]], self.retain[index[1]]
        pair = {"forget": forget, "retain": retain}
        return {**pair, "refusal": forget.refusal} if isinstance(forget, RefusedSample) else pair


class PairSampler(Sampler):
    """Shuffled passes over both sets, one after the other, in an order that depends on the seed alone.

    An epoch is one pass over the forget set, filled up to whole global batches from the next pass. Every step thus has
    the same number of samples, however they are split into micro-batches and among processes.

    Args:
        pairs: the dataset.
        global_batch: samples of each set per step.
        seed: the seed of both orders.
        steps_done: returns the number of steps done so far. It determines which epoch is drawn: when training resumes
            within an epoch, accelerate's wrapper passes no ``set_epoch`` on.
    """

    def __init__(self, pairs: Pairs, global_batch: int, seed: int, steps_done: Callable[[], int]) -> None:
        self.sizes = len(pairs.forget), len(pairs.retain)
        self.steps = -(-len(pairs) // global_batch)
        self.length = self.steps * global_batch
        self.seed, self.steps_done = seed, steps_done

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.steps_done() // self.steps * self.length
        yield from zip(*(self._stream(which, start) for which in (0, 1)), strict=True)

    def _stream(self, which: int, start: int) -> Iterator[int]:
        """One epoch of indices into one set: 0 is the forget set, 1 the retain set."""
        size, shuffled_pass, shuffled = self.sizes[which], -1, []
        for position in range(start, start + self.length):
            if position // size != shuffled_pass:
                shuffled_pass = position // size
                generator = torch.Generator().manual_seed((self.seed * 2 + which) * 2**24 + shuffled_pass)
                shuffled = torch.randperm(size, generator=generator).tolist()
            yield shuffled[position % size]


def collate(pairs: Sequence[Pair]) -> dict[str, dict[str, Tensor]]:
    """'forget', 'retain' (and 'refusal') -> ``input_ids``, ``attention_mask`` and ``labels``, each [N, T]."""
    collated = {}
    for name in pairs[0]:
        batch = padded([pair[name] for pair in pairs], list(range(len(pairs))))
        collated[name] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }
    return collated


def load_pairs(forget: Any, retain: Any, tokenizer: Any, settings: UnlearningSettings, *, max_length: int) -> Pairs:
    """Load both sets; samples of an earlier ``load_pairs`` or ``load_samples`` are used as they are.

    Args:
        forget: a list of samples, or anything that ``load_samples`` takes.
        retain: the same of the retain set.
        tokenizer: for rows; tokenised data does without it.
        settings: they tell whether each forget sample needs a refusal, and which ones there are.
        max_length: the most tokens of a sample.

    Raises:
        DataError: a set is empty or malformed, the sets share a row, or a forget row has no prompt to refuse.
    """
    refusals = settings.used_refusals
    if not _is_loaded(forget, Sample):
        forget = load_forget(forget, tokenizer, refusals, max_length=max_length)
    elif refusals and not _is_loaded(forget, RefusedSample):
        raise DataError(
            f"the forget set: the loss {settings.forget_loss!r} needs a refusal for each sample; expected rows, found "
            "samples that are tokenised already"
        )
    if not _is_loaded(retain, Sample):
        retain = load_samples(retain, tokenizer, max_length=max_length, name="the retain set")
    return Pairs(forget, retain)


def load_held_out(data: Any, pairs: Pairs, tokenizer: Any, *, max_length: int) -> list[Sample]:
    """The retain rows to evaluate on: held-out ones, or else as many of the retain set as there are forget samples.

    Args:
        data: a list of samples, anything that ``load_samples`` takes, or None.
        pairs: both sets of the training.
        tokenizer: for rows; tokenised data does without it.
        max_length: the most tokens of a sample.

    Raises:
        DataError: the set is empty or malformed, or shares a row with a set that is trained on.
    """
    if data is None:
        return pairs.retain[: len(pairs.forget)]
    name = "the held-out set"
    samples = data if _is_loaded(data, Sample) else load_samples(data, tokenizer, max_length=max_length, name=name)
    check_disjoint(pairs.forget, samples, name)
    check_disjoint(pairs.retain, samples, name, "the retain set")
    return samples


def load_forget(data: Any, tokenizer: Any, refusals: Sequence[str] = (), *, max_length: int = 1024) -> list[Sample]:
    """The forget samples; with refusals, each is a ``RefusedSample``. The refusals are assigned to the rows in turn.

    Raises:
        DataError: the set is empty or malformed, or a row to refuse has no prompt or is tokenised already.
    """
    name = "the forget set"
    if isinstance(data, (str, Path)):
        name, data = f"{name} ({data})", read_rows(data)
    if not refusals or not isinstance(data, Iterable):
        return load_samples(data, tokenizer, max_length=max_length, name=name)
    rows = list(data)  # it may be an iterator, and is read twice
    samples = load_samples(rows, tokenizer, max_length=max_length, name=name)
    wheres = [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
    answered = [_with_completion(row, refusals[index % len(refusals)], wheres[index]) for index, row in enumerate(rows)]
    refused: list[RefusedSample] = []
    for sample, row, where in zip(samples, answered, wheres, strict=True):  # no row is a text, so each is one sample
        refusal = encode_row(row, tokenizer, max_length=max_length, where=f"{where}, with a refusal")
        refused.append(RefusedSample(sample.input_ids, sample.labels, refusal, row=sample.row))
    note_left_out([sample.refusal for sample in refused], f"{name}, with refusals", max_length)
    return [*refused]


def _is_loaded(data: Any, kind: type[Sample]) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(item, kind) for item in data)


def _with_completion(row: Mapping, completion: str, where: str) -> dict[str, Any]:
    """The row with another completion. White space before the old completion is kept."""
    kind = next((kind for kind in ROW_KINDS if all(row.get(key) is not None for key in kind)), None)
    if kind is None or kind == ("text",):
        raise DataError(
            f"{where}: a refusal needs a prompt to answer; expected question/answer, prompt/completion or messages, "
            f"found the keys {sorted(map(str, row))}"
        )
    key = kind[-1]
    value = row[key]
    kept = {k: row[k] for k in (*kind, *TEMPLATE_KEYS) if k in row}
    if isinstance(value, str):
        leading = value[: len(value) - len(value.lstrip())]
        return {**kept, key: leading + completion}
    return {**kept, key: [*value[:-1], {"role": value[-1]["role"], "content": completion}]}
