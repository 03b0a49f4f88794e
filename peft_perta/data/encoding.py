"""One row -> one tokenised sample. Only the completion carries loss; of a ``text`` row, every token does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import DataError
from .rows import row_kind
from .samples import IGNORED, Sample, checked_sample


def encode_row(row: Mapping, tokenizer: Any, *, max_length: int = 1024, where: str = "row") -> Sample:
    """Tokenise one row. The sample ends with the tokenizer's eos, or as its chat template ends a turn.

    Args:
        row: one of the kinds in ``ROW_KINDS``.
        tokenizer: with an eos token; with a chat template for messages.
        max_length: tokens to keep, counted from the left.
        where: the name of the row in error messages.

    Raises:
        DataError: the row is of no known kind, its completion is empty, or no token of it is within ``max_length``.
    """
    prompt_ids, completion_ids = _split_tokens(row, tokenizer, where)
    input_ids = torch.tensor(prompt_ids + completion_ids, dtype=torch.long)[:max_length]
    labels = input_ids.clone()
    labels[: len(prompt_ids)] = IGNORED
    return checked_sample(input_ids, labels, max_length, where)


def encode_prompt(row: Mapping, tokenizer: Any, *, where: str = "row") -> list[int]:
    """The token ids of the row's prompt, after which the model would generate the completion."""
    return _split_tokens(row, tokenizer, where)[0]


def _split_tokens(row: Mapping, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids). The completion begins where the tokens of prompt and completion together differ
    from the tokens of the prompt alone: a token may span both."""
    kind = row_kind(row, where)
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
    """Split a conversation: the last assistant turn is the completion."""
    if not (isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages)):
        raise DataError(f"{where}: expected messages as a list of {{role, content}}, found {messages!r:.80}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: expected at least two messages, the last one the assistant's")
    if not str(messages[-1].get("content") or "").strip():
        raise DataError(f"{where}: the assistant's last turn is empty, expected a completion to take the loss of")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion rows instead")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    # The template adds the special tokens.
    prompt_ids, whole_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    return _divide(prompt_ids, whole_ids)


def _divide(prompt_ids: list[int], whole_ids: list[int]) -> tuple[list[int], list[int]]:
    shared = 0
    while shared < min(len(prompt_ids), len(whole_ids)) and prompt_ids[shared] == whole_ids[shared]:
        shared += 1
    return whole_ids[:shared], whole_ids[shared:]


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; _eos ends samples
        ids.pop()
    return ids


def _eos(tokenizer: Any, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{where}: the tokenizer has no eos token, expected one to end a completion; set tokenizer.eos_token"
        )
    return tokenizer.eos_token_id


def _text(row: Mapping, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {key!r} as text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty, expected text to take the loss of; drop the row or fill it in")
    return value
