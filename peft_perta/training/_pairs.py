"""Both sets as one stream of pairs: a forget sample, its refusal where one is asked for, and a retain sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import ROW_KINDS, Sample, encode_row, load_samples, padded, read_rows
from ..errors import DataError

SETS = ("forget", "retain", "refusal")


Pair = dict[str, Sample]


class Pairs(Dataset):
    """(index of a forget sample, index of a retain sample) -> name of a set -> sample.

    Raises:
        DataError: a sample is in both sets.
    """

    def __init__(self, forget: list[Sample], retain: list[Sample], refusals: list[Sample] | None = None) -> None:
        self.forget, self.retain, self.refusals = forget, retain, refusals
        _refuse_shared(forget, retain)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: tuple[int, int]) -> Pair:
        forget, retain = index
        pair = {"forget": self.forget[forget], "retain": self.retain[retain]}
        return pair if self.refusals is None else {**pair, "refusal": self.refusals[forget]}


class PairSampler(Sampler):
    """Both sets shuffled over and over, each sample of a set as often as another, in an order that the seed gives.

    An epoch is the forget set once, filled up to whole global batches from the next shuffle: every step is of as many
    samples, however they are dealt out to processes and micro-batches.

    Args:
        steps_done: how many global batches were trained on; what is drawn is of the epoch that this falls into. (Where
            a run goes on within an epoch, no ``set_epoch`` comes through what accelerate wraps a sampler in.)
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
        size, order, shuffled = self.sizes[which], -1, []
        for place in range(start, start + self.length):
            if place // size != order:
                order = place // size
                generator = torch.Generator().manual_seed((self.seed * 2 + which) * 2**24 + order)
                shuffled = torch.randperm(size, generator=generator).tolist()
            yield shuffled[place % size]


def collate(pairs: Sequence[Pair]) -> dict[str, dict[str, Tensor]]:
    """Name of a set -> ``input_ids``, ``attention_mask`` and ``labels``, each [N, T]."""
    found = {}
    for name in pairs[0]:
        batch = padded([pair[name] for pair in pairs], list(range(len(pairs))))
        found[name] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }
    return found


def load_refusals(data: Any, tokenizer: Any, refusals: Sequence[str], *, max_length: int = 1024) -> list[Sample]:
    """The forget set's prompts with a refusal for a completion, row after row; data as for ``load_samples``.

    Raises:
        DataError: a row has no prompt, or is tokenised already.
    """
    if isinstance(data, (str, Path)):
        data = read_rows(data)
    assert isinstance(data, Iterable)
    rows = (
        _refused(row, refusals[index % len(refusals)], f"the forget set, row {index + 1}")
        for index, row in enumerate(data)
    )
    return load_samples(
        [_as_item(encode_row(row, tokenizer, max_length=max_length, where="a refusal")) for row in rows],
        max_length=max_length,
        name="refusals",
    )


def _refused(row: Mapping, refusal: str, where: str) -> dict[str, Any]:
    kind = next((kind for kind in ROW_KINDS if all(row.get(key) is not None for key in kind)), None)
    if kind is None or kind == ("text",):
        raise DataError(
            f"{where}: the loss 'dpo' answers prompts by refusals; expected question/answer, prompt/completion or "
            f"messages, found the keys {sorted(map(str, row))}"
        )
    key = kind[-1]
    value = row[key]
    if isinstance(value, str):
        leading = value[: len(value) - len(value.lstrip())]
        return {**{k: row[k] for k in kind}, key: leading + refusal}
    return {**{k: row[k] for k in kind}, key: [*value[:-1], {**value[-1], "content": refusal}]}


def _as_item(sample: Sample) -> dict[str, Tensor]:
    return {"input_ids": sample.input_ids, "labels": sample.labels}


def _refuse_shared(forget: list[Sample], retain: list[Sample]) -> None:
    def key(sample: Sample) -> tuple:
        return tuple(sample.input_ids.tolist()), tuple(sample.labels.tolist())

    known = {key(sample) for sample in forget}
    shared = [number for number, sample in enumerate(retain, start=1) if key(sample) in known]
    if len(shared) == len(retain):
        raise DataError("the retain set is the forget set, or a part of it; nothing tells what to keep")
    if shared:
        raise DataError(
            f"row {shared[0]} of the retain set is in the forget set, too ({len(shared)} such rows); expected two sets "
            "without a row in common: take it out of one"
        )
