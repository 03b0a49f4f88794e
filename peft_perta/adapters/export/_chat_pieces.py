"""A chat template (Jinja) as what it writes around the messages, which is what a Modelfile (Go) can say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError

_SYSTEM, _USER, _ANSWER, _SECOND = "Qsystem7", "Quser7", "Qanswer7", "Qsecond7"  # stand for messages


@dataclass(frozen=True)
class Pieces:
    """What stands around messages.

    Attributes:
        before_system, after_system: around the system message.
        before_user: before a user's message.
        before_answer, after_answer: around an answer; the prompt ends with the first.
        default_system: the system message where none is given; None if the template writes none.
        stops: what ends an answer.
        has_system: the template takes a system message.
    """

    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str
    default_system: str | None
    stops: list[str]
    has_system: bool

    def prompt(self, messages: list[tuple[str, str]]) -> str:
        """The prompt of (role, content) pairs, as ``go_template`` writes it."""
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, ""),
            "assistant": (self.before_answer, self.after_answer),
        }
        return "".join(content.join(around[role]) for role, content in messages) + self.before_answer

    def go_template(self) -> str:
        """The TEMPLATE of a Modelfile."""
        content = "{{ .Content }}"
        system = f'{{{{ if eq .Role "system" }}}}{self.before_system}{content}{self.after_system}{{{{ else if '
        user = f'eq .Role "user" }}}}{self.before_user}{content}{{{{ else if '
        answer = f'eq .Role "assistant" }}}}{self.before_answer}{content}{self.after_answer}{{{{ end }}}}{{{{ end }}}}'
        start = "{{ range .Messages }}" + (system if self.has_system else "{{ if ")
        return f"{start}{user}{answer}{self.before_answer}{{{{ .Response }}}}"


def read_pieces(tokenizer: Any) -> Pieces:
    """What the tokenizer's chat template writes around messages.

    Raises:
        ConfigError: it does more than that.
    """
    eos = tokenizer.eos_token
    if not tokenizer.chat_template:
        return Pieces("", "", "", "", "", None, [eos] if eos else [], has_system=False)
    user, dialogue = [("user", _USER)], [("user", _USER), ("assistant", _ANSWER), ("user", _SECOND)]
    first, talk = _render(tokenizer, user), _render(tokenizer, dialogue)
    if first is None or talk is None:
        raise _refusal(tokenizer)
    start, before_answer = first.split(_USER)
    end_of_answer = talk.partition(_ANSWER)[2].partition(_SECOND)[0]
    with_system = _render(tokenizer, [("system", _SYSTEM), *user]) or ""
    before_system, after_system, default = "", "", None
    has_system = _SYSTEM in with_system
    if has_system:
        before_system, _, rest = with_system.partition(_SYSTEM)
        after_system = rest.partition(_USER)[0]
        if before_system and start.startswith(before_system) and start.endswith(after_system):
            default = start[len(before_system) : len(start) - len(after_system)]
    before_user = _common_end([start, end_of_answer, *([after_system] if has_system else [])])
    after_answer, after_system = (text.removesuffix(before_user) for text in (end_of_answer, after_system))
    stops = dict.fromkeys([_special(after_answer or end_of_answer, tokenizer), eos])
    around = (before_system, after_system, before_user, before_answer, after_answer)
    pieces = Pieces(*around, default, [text for text in stops if text], has_system)
    _check(pieces, tokenizer, dialogue)
    return pieces


def _check(pieces: Pieces, tokenizer: Any, dialogue: list[tuple[str, str]]) -> None:
    """
    Raises:
        ConfigError: the pieces do not make the prompts of the template.
    """
    default = [("system", pieces.default_system)] if pieces.default_system is not None else []
    talks = [[*default, *dialogue], [*default, dialogue[0]]]
    expected = [_render(tokenizer, dialogue), _render(tokenizer, dialogue[:1])]
    if pieces.has_system:
        given = [("system", _SYSTEM), *dialogue]
        talks.append(given)
        expected.append(_render(tokenizer, given))
    texts = [text for text in vars(pieces).values() if isinstance(text, str)]
    if [pieces.prompt(talk) for talk in talks] != expected or any("{{" in text or "}}" in text for text in texts):
        raise _refusal(tokenizer)


def _render(tokenizer: Any, messages: list[tuple[str, str]]) -> str | None:
    """The prompt, without the token that runtimes put in front themselves; None if the template refuses it."""
    dicts = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template raises what it likes
        return None
    return text.removeprefix(tokenizer.bos_token) if _adds_start(tokenizer) else text


def _adds_start(tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _common_end(texts: list[str]) -> str:
    """The longest text with which all of these end."""
    shortest = min(texts, key=len)
    ends = (shortest[start:] for start in range(len(shortest) + 1))
    return next(end for end in ends if all(text.endswith(end) for text in texts))


def _special(text: str, tokenizer: Any) -> str | None:
    """The first special token in a text; it ends the answer."""
    found = [(text.find(token), token) for token in tokenizer.all_special_tokens if token in text]
    return min(found)[1] if found else None


def _refusal(tokenizer: Any) -> ConfigError:
    return ConfigError(
        f"the chat template of {tokenizer.name_or_path} does more than a Modelfile can say; export to gguf, and write "
        "the Modelfile yourself"
    )
