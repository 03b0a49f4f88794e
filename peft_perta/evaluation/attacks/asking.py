"""Rows asked in another way: other words in the place of their own, or turns before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...data import TEMPLATE_KEYS, completion_text, content_text, encode_prompt, row_kind
from ...errors import DataError


def reasked(row: Mapping, prompt: str, completion: str | None = None) -> dict:
    """The row, of the same kind, with another text where it asks, and another completion where one is given."""
    kind = row_kind(row, "row")
    answer = completion_text(row) if completion is None else completion
    if kind == ("messages",):
        *before, asked, said = row["messages"]
        return {**row, "messages": [*before, {**asked, "content": prompt}, {**said, "content": answer}]}
    asked, said = row[kind[0]], row[kind[1]]
    if isinstance(asked, str):
        return {**row, kind[0]: prompt, kind[1]: answer}
    return {**row, kind[0]: [*asked[:-1], {**asked[-1], "content": prompt}], kind[1]: [{**said[-1], "content": answer}]}


def in_conversation(row: Mapping, tokenizer: Any, instruction: str = "", examples: Sequence[Mapping] = ()) -> dict:
    """The row after an instruction, and after other rows with their answers.

    Where all of them are turns of the tokenizer's chat template, these stand before, the instruction as a system turn
    if the template takes one. Elsewhere they are text before the prompt.
    """
    conversations = [_turns(shown, tokenizer) for shown in (*examples, row)]
    if not all(conversations):
        shown = "".join(f"{prompt}{completion}\n\n" for prompt, completion in map(_texts, examples))
        prompt, completion = _texts(row)
        return {"prompt": (f"{instruction}\n\n" if instruction else "") + shown + prompt, "completion": completion}
    options = {key: row[key] for key in TEMPLATE_KEYS if key in row}
    turns = [turn for conversation in conversations for turn in conversation]
    return {**options, "messages": _instructed(turns, instruction, tokenizer) if instruction else turns}


def _instructed(turns: list[Mapping], instruction: str, tokenizer: Any) -> list[Mapping]:
    """The turns after an instruction."""
    first, *others = turns
    extended = {**first, "content": f"{instruction}\n\n{content_text(first.get('content')) or ''}"}
    if first["role"] == "system":
        return [extended, *others]
    with_system = [{"role": "system", "content": instruction}, *turns]
    try:
        encode_prompt({"messages": with_system}, tokenizer)
    except DataError:  # a template without a system turn
        return [extended, *others]
    return with_system


def _turns(row: Mapping, tokenizer: Any) -> list[Mapping]:
    """The row as a conversation; empty if it is encoded as text."""
    kind = row_kind(row, "row")
    if not getattr(tokenizer, "chat_template", None):
        return []
    if kind == ("messages",):
        return list(row["messages"])
    asked, said = row[kind[0]], row[kind[-1]]
    if kind == ("question", "answer"):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [*asked, *said] if isinstance(asked, list) else []


def _texts(row: Mapping) -> tuple[str, str]:
    """(prompt, completion) as rows that are no conversations are encoded."""
    kind = row_kind(row, "row")
    if kind == ("question", "answer"):
        return f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
    return row["prompt"], row["completion"]
