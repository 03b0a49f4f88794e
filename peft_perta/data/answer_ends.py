"""Where an answer ends: what closes a completion, learned once from the tokenizer and a conversation that its chat
template renders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_QUESTION, _ANSWER, _FOLLOWING = "What is it", "A stone", "And now"  # words that no template has of its own


@dataclass(frozen=True)
class AnswerEnds:
    """What ends an answer, in samples and in what a model writes.

    Attributes:
        closings: token ids, each a way to close a completion: the eos, and what the chat template writes after an
            assistant's last words (ChatML: ``<|im_end|>`` and a line break).
        tokens: a model that writes one of these has ended its answer.
        text: one that writes this has, too; None where a token of the template says so. It is the text in which the
            template closes a turn, or in which it opens the next one where it closes none.
    """

    closings: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    text: str | None = None

    def count(self, completion: Sequence[int]) -> int:
        """How many tokens at the end of a completion close it: part of a closing, where the completion was cut."""
        found = 0
        for closing in self.closings:
            for size in range(1, min(len(closing), len(completion)) + 1):
                if tuple(completion[-size:]) in (closing[:size], closing[-size:]):
                    found = max(found, size)
        return found

    def cut(self, generated: Sequence[int]) -> Sequence[int]:
        """The generated token ids before the first that ends the answer."""
        return generated[: next((place for place, token in enumerate(generated) if token in self.tokens), None)]


def answer_ends(tokenizer: Any) -> AnswerEnds:
    """What ends an answer under this tokenizer.

    The template's own end counts, whatever the tokenizer calls its eos: ``<|im_end|>``, ``<end_of_turn>``,
    ``<|eot_id|>``. A template that refuses every probe leaves the eos alone, with a warning.
    """
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not getattr(tokenizer, "chat_template", None):
        return AnswerEnds((eos,), eos)
    closing = _after_answer(tokenizer, [])
    if closing is None:
        warnings.warn(
            "the chat template renders no conversation of a question and an answer, expected one to learn from what "
            f"ends an answer; only the eos {tokenizer.eos_token!r} counts",
            stacklevel=2,
        )
        return AnswerEnds((eos,), eos)
    # Between two turns stands what ends the first one, if it is written after it or not (GLM-4: the next ``<|user|>``).
    between = _after_answer(tokenizer, [("user", _FOLLOWING)]) or ""
    texts = (closing, between.partition(_FOLLOWING)[0])
    token = next((token for text in texts for token in _marks(tokenizer, text)), None)
    closing_ids = _shared_end(_ids(tokenizer, _ANSWER + closing), _ids(tokenizer, closing))
    return AnswerEnds(
        (eos, closing_ids),
        (*eos, *([] if token is None else [token])),
        _text_before_mark(tokenizer, texts, token),
    )


def _after_answer(tokenizer: Any, following: list[tuple[str, str]]) -> str | None:
    """The text after the answer of a conversation; None if the template renders none.

    Some templates ask for a system turn, and some for content in parts.
    """
    turns = [("user", _QUESTION), ("assistant", _ANSWER), *following]
    for conversation in (turns, [("system", "Be brief"), *turns]):
        for in_parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": words}] if in_parts else words}
                for role, words in conversation
            ]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception:  # whatever the template's own code raises: another form of the probe may do
                continue
            if _ANSWER in text:
                return text[text.rindex(_ANSWER) + len(_ANSWER) :]
    return None


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _marks(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text that its words never become, blanks aside: special and other added ones."""
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return [token for token in _ids(tokenizer, text) if token in added and tokenizer.decode([token]).strip()]


def _shared_end(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens in which both end: a text's first token may be another one where words stand before it."""
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return one[len(one) - shared :]


def _text_before_mark(tokenizer: Any, texts: tuple[str, str], token: int | None) -> str | None:
    """The words, not only blanks, that end a turn before its mark, or in place of one."""
    for text in texts:
        words = text if token is None else text.partition(tokenizer.convert_ids_to_tokens(token))[0]
        if words.strip():
            return words.rstrip()
    return None
