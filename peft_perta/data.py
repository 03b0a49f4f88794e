"""Rows -> samples -> batches.

A row may be ``{"question", "answer"}``, ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"text"}``; other keys are
ignored. Only the completion carries loss (for text: all of it). One tokenisation serves training, gradients and
evaluation, so that all three see the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

IGNORED = -100  # the label that carries no loss, as in transformers
ROW_KINDS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True)
class Sample:
    """One tokenised row: ``input_ids`` [T] and ``labels`` [T], the latter ``IGNORED`` where no loss is taken."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded samples: three [N, T] tensors, and where each sample stands in the list that it came from."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: list[int]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.indices)


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSON-lines file.

    Raises:
        DataError: the file is missing, empty, or a line is not a JSON object; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a JSON-lines file at {path}, found none; check the path")
    rows = []
    try:
        # Not splitlines, which also cuts at characters that may stand inside a JSON string (U+2028, U+0085).
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected one JSON object per line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object per line")
    return rows


def spread(rows: list[Any], count: int) -> list[Any]:
    """``count`` of the rows at even distances, the first and the last among them; all, where there are no more."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]


def load_samples(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int = 1024,
    max_samples: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> list[Sample]:
    """Tokenised samples of whatever a user holds.

    Args:
        data: a path to JSON lines, a list of rows, a ``datasets.Dataset`` (of rows, or tokenised with ``input_ids`` and
            ``labels`` or ``completion_mask``), or a dataloader of ``{input_ids, labels[, attention_mask]}`` batches.
        tokenizer: needed for rows; tokenised data goes without.
        max_length: tokens kept per sample, counted from the left.
        max_samples: draw at most so many, with ``seed``; the draw keeps the order of the rows.
        name: what messages call this set.

    Raises:
        DataError: the set is empty or a row is malformed; the message names the row.
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
    for index, item in enumerate(data):
        where = f"{name}, row {index + 1}"
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: expected a mapping, found {type(item).__name__}; see peft_perta.data for rows")
        if "input_ids" in item:
            samples.extend(_tokenised(item, max_length, where))
        else:
            if tokenizer is None:
                raise DataError(f"{where} is text, which needs a tokenizer; pass tokenizer=...")
            samples.append(encode_row(item, tokenizer, max_length=max_length, where=where))
    if not samples:
        raise DataError(f"{name} is empty; expected at least one row")
    if max_samples is not None and len(samples) > max_samples:
        generator = torch.Generator().manual_seed(seed)
        kept = sorted(torch.randperm(len(samples), generator=generator)[:max_samples].tolist())
        samples = [samples[i] for i in kept]
    return samples


def encode_row(row: Mapping, tokenizer: Any, *, max_length: int = 1024, where: str = "row") -> Sample:
    """One row as a sample; ends in the tokenizer's eos, or as its chat template ends a turn.

    Raises:
        DataError: the row is of no known kind, its completion is empty, or ``max_length`` cuts the completion away.
    """
    prompt_ids, completion_ids = _split_tokens(row, tokenizer, where)
    input_ids = torch.tensor(prompt_ids + completion_ids, dtype=torch.long)[:max_length]
    labels = input_ids.clone()
    labels[: len(prompt_ids)] = IGNORED
    return _checked(input_ids, labels, max_length, where)


def encode_prompt(row: Mapping, tokenizer: Any, *, where: str = "row") -> list[int]:
    """The token ids after which the model would write the row's completion."""
    return _split_tokens(row, tokenizer, where)[0]


def completion_text(row: Mapping) -> str:
    """What the row's completion says, as plain text."""
    kind = _row_kind(row, "row")
    value = row[kind[-1]]
    return value if isinstance(value, str) else value[-1]["content"]


def batches(samples: list[Sample], batch_size: int) -> Iterator[Batch]:
    """Batches of samples of similar length, right-padded; every sample is in exactly one.

    Sorting by length wastes no compute on padding. The longest come first, so that a batch too large for the memory
    fails at once.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield padded(samples, order[start : start + batch_size])


def padded(samples: list[Sample], indices: list[int]) -> Batch:
    """Those of the samples as one batch, in this order."""
    length = max(len(samples[index].input_ids) for index in indices)
    input_ids = torch.zeros(len(indices), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, index in enumerate(indices):
        size = len(samples[index].input_ids)
        input_ids[row, :size] = samples[index].input_ids
        attention_mask[row, :size] = 1
        labels[row, :size] = samples[index].labels
    return Batch(input_ids, attention_mask, labels, indices)


def fingerprint(samples: list[Sample]) -> str:
    """SHA-256 of the samples' tokens and labels, in order: tells whether two runs saw the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.input_ids, sample.labels):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _row_kind(row: Mapping, where: str) -> tuple[str, ...]:
    for kind in ROW_KINDS:
        if all(row.get(key) is not None for key in kind):
            return kind
    kinds = " or ".join("/".join(kind) for kind in ROW_KINDS)
    raise DataError(f"{where}: expected {kinds}, found the keys {sorted(map(str, row))}")


def _split_tokens(row: Mapping, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids): they part where the tokens of the prompt alone and of the whole diverge."""
    kind = _row_kind(row, where)
    if kind == ("text",):
        return [], [*_tokenise(tokenizer, _text(row, "text", where)), _eos(tokenizer, where)]
    if kind == ("messages",):
        return _split_chat(row["messages"], tokenizer, where)
    if kind == ("question", "answer"):
        question, answer = _text(row, "question", where), _text(row, "answer", where)
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return _split_chat(turns, tokenizer, where)
        prompt, completion = f"Question: {question}\nAnswer:", f" {answer}"
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _split_chat([*prompt, *completion], tokenizer, where)
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    prompt_ids = _tokenise(tokenizer, prompt)
    whole_ids = [*_tokenise(tokenizer, prompt + completion), _eos(tokenizer, where)]
    return _divide(prompt_ids, whole_ids)


def _split_chat(messages: Any, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """The last assistant turn is the completion."""
    if not (isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages)):
        raise DataError(f"{where}: expected messages as a list of {{role, content}}, found {messages!r:.80}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: expected messages that end in an assistant's turn after another's")
    if not str(messages[-1].get("content") or "").strip():
        raise DataError(f"{where}: the assistant's last turn is empty; a sample needs a completion to take a loss on")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion rows instead")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731 - the template adds them
    return _divide(encode(prompt), encode(whole))


def _divide(prompt_ids: list[int], whole_ids: list[int]) -> tuple[list[int], list[int]]:
    shared = 0
    while shared < min(len(prompt_ids), len(whole_ids)) and prompt_ids[shared] == whole_ids[shared]:
        shared += 1
    return whole_ids[:shared], whole_ids[shared:]


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; we end samples ourselves
        ids.pop()
    return ids


def _eos(tokenizer: Any, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(f"{where}: the tokenizer has no eos token to end a completion with; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def _text(row: Mapping, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {key!r} as text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty; a sample needs a {key} to take a loss on")
    return value


def _tokenised(item: Mapping, max_length: int, where: str) -> Iterator[Sample]:
    """The samples of a tokenised row [T] or batch [N, T], without their padding."""
    if "position_ids" in item or "cu_seq_lens_q" in item:
        raise DataError(f"{where}: packed batches hold several samples in one row; turn packing and padding_free off")
    if "labels" not in item and "completion_mask" not in item:
        raise DataError(f"{where}: expected 'labels' (or 'completion_mask') beside 'input_ids' to know the completion")
    input_ids = torch.atleast_2d(torch.as_tensor(item["input_ids"], dtype=torch.long)).cpu()
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
            f"{tuple(mask.shape)} must have one shape"
        )
    for row in range(len(input_ids)):
        kept = mask[row].bool()
        yield _checked(input_ids[row][kept][:max_length], labels[row][kept][:max_length], max_length, where)


def _checked(input_ids: Tensor, labels: Tensor, max_length: int, where: str) -> Sample:
    if not bool((labels[1:] != IGNORED).any()):
        raise DataError(
            f"{where}: no token of the completion is left within max_length={max_length}; "
            "raise max_length, or shorten the prompt"
        )
    return Sample(input_ids, labels)
