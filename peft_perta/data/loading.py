"""Data in any accepted form -> tokenised samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from .encoding import encode_row_whole
from .rows import read_rows
from .samples import IGNORED, Sample, checked_sample, note_left_out

_PACKED_KEYS = ("position_ids", "cu_seq_lens_q", "seq_lengths", "seq_idx")  # of TRL and transformers


def load_samples(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int = 1024,
    max_samples: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> list[Sample]:
    """Load data in any accepted form as tokenised samples.

    A ``text`` row that is longer than ``max_length`` becomes several samples. A longer row of another kind is cut, and
    a line on standard error says how many tokens are left out. Packed rows are refused where they can be told: TRL's
    packing strategy "wrapped" leaves no mark on rows that carry ``labels``.

    Args:
        data: a name that ``read_rows`` takes, a list of rows, a ``datasets.Dataset`` (of rows, or tokenised with
            ``input_ids`` and ``labels`` or ``completion_mask``), or a dataloader of batches ``{input_ids, labels[,
            attention_mask]}``.
        tokenizer: required for rows; tokenised data needs none.
        max_length: the most tokens of a sample.
        max_samples: if the set is larger, draw this many samples at random, in their original order.
        seed: the seed of that draw.
        name: the name of the set in error messages.

    Raises:
        DataError: the set is empty, or a row is malformed. The message names the row, of a dataloader by its batch and
            its place there.
    """
    if isinstance(data, (str, Path)):
        name = f"{name} ({data})"
        data = read_rows(data)
    if data is None:
        raise DataError(f"{name}: expected a data set, found None")
    if not isinstance(data, Iterable):
        raise DataError(
            f"{name}: expected a path, a list of rows, a datasets.Dataset or a dataloader, found {type(data).__name__}"
        )
    samples: list[Sample] = []
    rows = 0
    for number, item in enumerate(data, start=1):
        where = f"{name}, row {number}"
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}: expected a mapping, found {type(item).__name__}; see load_samples for the accepted forms"
            )
        if "input_ids" in item:
            of_item = ([sample] for sample in _tokenised(item, max_length, name, number))
        elif tokenizer is None:
            raise DataError(f"{where} is text, which needs a tokenizer, found None; pass tokenizer=...")
        else:
            of_item = [encode_row_whole(item, tokenizer, max_length=max_length, where=where)]
        for of_row in of_item:
            rows += 1
            samples.extend(replace(sample, row=rows) for sample in of_row)
    if not samples:
        raise DataError(f"{name} is empty; expected at least one row")
    note_left_out(samples, name, max_length)
    return drawn(samples, max_samples, seed)


def drawn(samples: list[Sample], max_samples: int | None, seed: int) -> list[Sample]:
    """At most ``max_samples`` of the samples, drawn at random with the seed, in their order; all if it is None."""
    if max_samples is None or len(samples) <= max_samples:
        return samples
    generator = torch.Generator().manual_seed(seed)
    return [samples[i] for i in sorted(torch.randperm(len(samples), generator=generator)[:max_samples].tolist())]


def _tokenised(item: Mapping, max_length: int, name: str, number: int) -> Iterator[Sample]:
    """The samples of a tokenised row [T] or batch [N, T], without padding; ``number`` is its place in the set."""
    given = torch.as_tensor(item["input_ids"], dtype=torch.long).cpu()
    is_batch = given.ndim > 1
    where = f"{name}, {'batch' if is_batch else 'row'} {number}"
    if any(item.get(key) is not None for key in _PACKED_KEYS):
        raise _packed(where)
    if "labels" not in item and "completion_mask" not in item:
        raise DataError(f"{where}: expected 'labels' or 'completion_mask' beside 'input_ids', found neither")
    input_ids = torch.atleast_2d(given)
    if "labels" in item:
        labels = torch.atleast_2d(torch.as_tensor(item["labels"], dtype=torch.long)).cpu()
    else:
        completion = torch.atleast_2d(torch.as_tensor(item["completion_mask"])).cpu()
        labels = torch.where(completion.bool(), input_ids, IGNORED)
    mask = torch.ones_like(input_ids)
    if item.get("attention_mask") is not None:
        mask = torch.atleast_2d(torch.as_tensor(item["attention_mask"], dtype=torch.long)).cpu()
    if not input_ids.shape == labels.shape == mask.shape:
        raise DataError(
            f"{where}: input_ids {tuple(input_ids.shape)}, labels {tuple(labels.shape)} and attention_mask "
            f"{tuple(mask.shape)} must have the same shape"
        )
    if bool((mask > 1).any()):  # a mask that numbers the samples of a row
        raise _packed(where)
    for row in range(len(input_ids)):
        is_token = mask[row].bool()
        of_row = labels[row][is_token]
        place = f"{where}, row {row + 1}" if is_batch else where
        if "labels" not in item and _completions(of_row) > 1:
            raise _packed(place)
        yield checked_sample(input_ids[row][is_token], of_row, max_length, place)


def _completions(labels: torch.Tensor) -> int:
    """How many runs of tokens with loss there are. In a row with a completion mask, each is a sample's completion."""
    has_loss = labels != IGNORED
    return int(has_loss[:1].sum() + (has_loss[1:] & ~has_loss[:-1]).sum())


def _packed(where: str) -> DataError:
    return DataError(
        f"{where}: packed batches and rows hold several samples per row, expected one; turn packing and padding_free "
        "off, and give the dataset as it was before trl.pack_dataset"
    )
