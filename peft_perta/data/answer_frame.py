"""What stands around an answer: learned once from the tokenizer and a conversation that its chat template renders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_QUESTION, _ANSWER, _FOLLOWING = "What is it", "A stone", "And now"  # words that no template has of its own


@dataclass(frozen=True)
class AnswerFrame:
    """What stands around the words of an answer, in samples and in what a model writes.

    Attributes:
        opening: token ids that the chat template writes before the words, after the prompt that asks for them: an empty
            ``<think>`` block of Qwen3, the channel of GPT-OSS. Empty for most.
        closings: token ids, each a way to close a completion: the eos, and what the chat template writes after an
            assistant's last words (ChatML: ``<|im_end|>`` and a line break).
        end_tokens: a model that writes one of these has ended its answer.
        end_text: one that writes this has, too; None where a token of the template says so. It is the text in which the
            template closes a turn, or in which it opens the next one where it closes none.
    """

    opening: tuple[int, ...]
    closings: tuple[tuple[int, ...], ...]
    end_tokens: tuple[int, ...]
    end_text: str | None = None

    def words(self, completion: Sequence[int]) -> slice:
        """Where the words stand among a completion's tokens; a completion that was cut may hold part of a closing."""
        closing = 0
        for ids in self.closings:
            for size in range(1, min(len(ids), len(completion)) + 1):
                if tuple(completion[-size:]) in (ids[:size], ids[-size:]):
                    closing = max(closing, size)
        stop = len(completion) - closing
        start = len(self.opening)
        return slice(start if start <= stop and tuple(completion[:start]) == self.opening else 0, stop)

    def until_end(self, generated: Sequence[int]) -> Sequence[int]:
        """The generated token ids before the first that ends the answer."""
        return generated[: next((place for place, token in enumerate(generated) if token in self.end_tokens), None)]


def answer_frame(tokenizer: Any) -> AnswerFrame:
    """What stands around an answer under this tokenizer.

    The template's own end counts, whatever the tokenizer calls its eos: ``<|im_end|>``, ``<end_of_turn>``,
    ``<|eot_id|>``. A template that refuses every probe leaves the eos alone, with a warning.
    """
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not getattr(tokenizer, "chat_template", None):
        return AnswerFrame((), (eos,), eos)
    whole = _rendered(tokenizer, [_QUESTION, _ANSWER])
    if whole is None:
        warnings.warn(
            "the chat template renders no conversation of a question and an answer, expected one to learn from what "
            f"ends an answer; only the eos {tokenizer.eos_token!r} counts",
            stacklevel=2,
        )
        return AnswerFrame((), (eos,), eos)
    before, closing = _around(whole)
    # Between two turns stands what ends the first one, if it is written after it or not (GLM-4: the next ``<|user|>``).
    longer = _rendered(tokenizer, [_QUESTION, _ANSWER, _FOLLOWING]) or whole
    texts = (closing, _around(longer)[1].partition(_FOLLOWING)[0])
    token = next((token for text in texts for token in _marks(tokenizer, text)), None)
    return AnswerFrame(
        _opening(tokenizer, before),
        (eos, _shared_end(_ids(tokenizer, _ANSWER + closing), _ids(tokenizer, closing))),
        eos if token is None else (*eos, token),
        _text_before_mark(tokenizer, texts, token),
    )


def _rendered(tokenizer: Any, turns: Sequence[str]) -> str | None:
    """A conversation of a user and an assistant, a question alone with the prompt for its answer; None if the template
    renders none that holds all these words.

    Some templates ask for a system turn, and some for content in parts.
    """
    conversation = list(zip(("user", "assistant", "user"), turns, strict=False))
    for roles_and_words in (conversation, [("system", "Be brief"), *conversation]):
        for in_parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": words}] if in_parts else words}
                for role, words in roles_and_words
            ]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(turns) == 1)
            except Exception:  # whatever the template's own code raises: another form of the probe may do
                continue
            if all(words in text for words in turns):
                return text
    return None


def _around(text: str) -> tuple[str, str]:
    """The text before and after the answer's words."""
    before, _, after = text.rpartition(_ANSWER)
    return before, after


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _opening(tokenizer: Any, before: str) -> tuple[int, ...]:
    """The tokens before the answer that the prompt for it does not hold, unless they are blank."""
    asked = _rendered(tokenizer, [_QUESTION])
    if asked is None:
        return ()
    held, all_before = _ids(tokenizer, asked), _ids(tokenizer, before)
    shared = 0
    while shared < min(len(held), len(all_before)) and held[shared] == all_before[shared]:
        shared += 1
    opening = all_before[shared:]
    return opening if tokenizer.decode(list(opening)).strip() else ()


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
    mark = "" if token is None else tokenizer.convert_ids_to_tokens(token)
    for text in texts:
        words = text.partition(mark)[0] if mark else text
        if words.strip():
            return words.rstrip()
        if mark and mark in text:
            return None
    return None
