"""One row -> tokenised samples. Only the completion carries loss; of a ``text`` row, every token does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import DataError
from ._chat import check_turns, render, template_options
from .rows import row_kind
from .samples import IGNORED, Sample, checked_sample

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def encode_row(row: Mapping, tokenizer: Any, *, max_length: int = 1024, where: str = "row") -> Sample:
    """Tokenise one row as one sample. It ends with the tokenizer's eos, or as its chat template ends a turn.

    Args:
        row: one of the kinds in ``ROW_KINDS``. ``tools`` and ``chat_template_kwargs`` beside messages go to the chat
            template, as in TRL.
        tokenizer: with an eos token; with a chat template for messages.
        max_length: tokens to keep, counted from the left.
        where: the name of the row in error messages.

    Raises:
        DataError: the row is of no known kind, its completion is empty, the chat template rejects it, or no token of
            the completion is within ``max_length``.
    """
    prompt_ids, completion_ids = _split_tokens(row, tokenizer, where)
    input_ids = torch.tensor(prompt_ids + completion_ids, dtype=torch.long)
    labels = input_ids.clone()
    labels[: len(prompt_ids)] = IGNORED
    return checked_sample(input_ids, labels, max_length, where)


def encode_row_whole(row: Mapping, tokenizer: Any, *, max_length: int = 1024, where: str = "row") -> list[Sample]:
    """Tokenise one row; a longer ``text`` becomes several samples, as equal in length as can be.

    Each begins with the last token of the one before. So every token but the first is predicted, and only once.
    The arguments and errors are those of ``encode_row``.
    """
    if row_kind(row, where) != ("text",):
        return [encode_row(row, tokenizer, max_length=max_length, where=where)]
    _, ids = _split_tokens(row, tokenizer, where)
    predicted = len(ids) - 1
    count = max(1, -(-predicted // max(max_length - 1, 1)))
    bounds = [predicted * index // count for index in range(count + 1)]
    pieces = [torch.tensor(ids[start : end + 1], dtype=torch.long) for start, end in itertools.pairwise(bounds)]
    return [checked_sample(piece, piece.clone(), max_length, where) for piece in pieces]


def encode_prompt(row: Mapping, tokenizer: Any, *, where: str = "row") -> list[int]:
    """The token ids of the row's prompt, after which the model would generate the completion."""
    return _split_tokens(row, tokenizer, where)[0]


def _split_tokens(row: Mapping, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids). The completion begins where the tokens of prompt and completion together differ
    from the tokens of the prompt alone: a token may span both."""
    kind = row_kind(row, where)
    if kind == ("text",):
        return [], [*_tokenise(tokenizer, _text(row, "text", where), where), _eos(tokenizer, where)]
    if kind == ("messages",):
        return _split_chat(row["messages"], row, tokenizer, where)
    if kind == ("question", "answer"):
        question, answer = _text(row, "question", where), _text(row, "answer", where)
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return _split_chat(turns, row, tokenizer, where)
        prompt, completion = f"Question: {question}\nAnswer:", f" {answer}"
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _split_chat([*prompt, *completion], row, tokenizer, where)
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    prompt_ids = _tokenise(tokenizer, prompt, where)
    whole_ids = [*_tokenise(tokenizer, prompt + completion, where), _eos(tokenizer, where)]
    return _divide(prompt_ids, whole_ids)


def _split_chat(messages: Any, row: Mapping, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Split a conversation: the last assistant turn is the completion."""
    turns, options = check_turns(messages, where), template_options(row, where)
    prompt = render(tokenizer, turns[:-1], where, options, ask=True)
    whole = render(tokenizer, turns, where, options, ask=False)
    # The template adds the special tokens.
    prompt_ids, whole_ids = (
        tokenizer(check_characters(text, where), add_special_tokens=False)["input_ids"] for text in (prompt, whole)
    )
    return _divide(prompt_ids, whole_ids)


def _divide(prompt_ids: list[int], whole_ids: list[int]) -> tuple[list[int], list[int]]:
    shared = 0
    while shared < min(len(prompt_ids), len(whole_ids)) and prompt_ids[shared] == whole_ids[shared]:
        shared += 1
    return whole_ids[:shared], whole_ids[shared:]


def check_characters(text: str, where: str) -> str:
    """The text, if it is made of whole characters; ``where`` is its name in the message.

    Raises:
        DataError: it holds half of a surrogate pair, which no tokenizer takes.
    """
    half = _HALF_CHARACTER.search(text)
    if half is not None:
        around = text[max(half.start() - 20, 0) : half.start() + 20]
        raise DataError(
            f"{where}: {half.group()!r} is half of a character (a lone surrogate), found in {around!r}; write the "
            "whole character, or remove the half"
        )
    return text


def _tokenise(tokenizer: Any, text: str, where: str) -> list[int]:
    ids = list(tokenizer(check_characters(text, where))["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; _eos ends samples
        ids.pop()
    return ids


def _eos(tokenizer: Any, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{where}: the tokenizer has no eos token, expected one to end a completion; set tokenizer.eos_token, or "
            "eos_token in the tokenizer's files"
        )
    return tokenizer.eos_token_id


def _text(row: Mapping, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {key!r} as text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty, expected text to take the loss of; drop the row or fill it in")
    return value
