"""A conversation as text, by the tokenizer's chat template. What the template cannot render is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError
from .json_files import parse_json
from .limits import SECONDS, time_limit
from .rows import TEMPLATE_KEYS, content_text

_PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")  # what a template prints that takes parts for a text
_ENDLESS = (
    f"the tokenizer's chat template takes more than {SECONDS:g} s for this conversation, expected milliseconds; give "
    "the tokenizer another template"
)
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def check_turns(messages: Any, where: str) -> list[Mapping]:
    """The turns of a conversation that ends with a text of the assistant.

    Raises:
        DataError: the messages are no such conversation.
    """
    if not (isinstance(messages, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in messages)):
        raise DataError(f"{where}: expected messages as a list of {{role, content}}, found {messages!r:.80}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: expected at least two messages, the last one the assistant's")
    for number, turn in enumerate(messages, start=1):
        content = turn.get("content")
        if content is not None and content_text(content) is None:
            raise DataError(
                f"{where}, message {number}: expected content as text, or as parts {{type: text, text: ...}}, found "
                f"{content!r:.80}; only text can be forgotten or retained"
            )
    if not (content_text(messages[-1].get("content")) or "").strip():
        call = " (it only calls a tool)" if messages[-1].get("tool_calls") else ""
        raise DataError(f"{where}: the assistant's last turn is empty{call}, expected a completion to take the loss of")
    return messages


def template_options(row: Mapping, where: str) -> dict[str, Any]:
    """What the row gives its chat template beside the messages: ``tools`` (a list, or one as JSON text), and the
    entries of ``chat_template_kwargs``.

    Raises:
        DataError: they have another form.
    """
    tools, options = (row.get(key) for key in TEMPLATE_KEYS)
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"{where}: 'tools' is not JSON ({error}); expected a list of function schemas") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: expected 'tools' as a list of function schemas, found {tools!r:.80}")
    if options is not None and not isinstance(options, Mapping):
        raise DataError(f"{where}: expected 'chat_template_kwargs' as a mapping, found {options!r:.80}")
    return {"tools": tools or None, **(options or {})}  # a template would announce an empty list of tools


def render(tokenizer: Any, turns: Sequence[Mapping], where: str, options: Mapping[str, Any], *, ask: bool) -> str:
    """The conversation as the template writes it.

    Args:
        tokenizer: has the template.
        turns: the conversation.
        where: the name of the row in error messages.
        options: what ``template_options`` gives.
        ask: whether the text ends with the beginning of the assistant's next turn.

    Raises:
        DataError: there is no template, or it rejects the conversation or prints a content that it does not know.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion rows instead")

    # A key that is null (the content of a tool call) is a missing one to a template, as in newer transformers.
    present = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    try:
        with time_limit(DataError(f"{where}: {_ENDLESS}")):
            text = tokenizer.apply_chat_template(present, tokenize=False, add_generation_prompt=ask, **options)
    except DataError:
        raise
    except _TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{where}: the tokenizer's chat template rejects this conversation ({type(error).__name__}: {reason}); "
            "change its roles or contents, or give the tokenizer another template"
        ) from error
    if not _knows_parts(turns, text):
        raise DataError(
            f"{where}: the tokenizer's chat template does not know content that is a list of parts; write the content "
            "as one text, or give the tokenizer another template"
        )
    return text


def _knows_parts(turns: Sequence[Mapping], text: str) -> bool:
    """Whether the template wrote the text of every part, and not the parts as they stand in Python or JSON."""
    contents = [turn.get("content") for turn in turns]
    parts = [part["text"] for content in contents if isinstance(content, list) for part in content]
    plain = [content for content in contents if isinstance(content, str)]
    own = sum(len(_PART.findall(written)) for written in (*parts, *plain))
    return not parts or (len(_PART.findall(text)) <= own and all(part.strip() in text for part in parts))
