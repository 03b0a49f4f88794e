"""Rows that a model writes itself about things near those that must go: what to keep, where nobody has listed it.

Two kinds of question are asked. The model writes questions of its own: it is shown what stands before a question, and
nothing else. And the forget rows' questions are asked about the names that those hold. The model answers all of them.

Reference: arXiv 2406.08464 (Magpie) for questions out of nothing; the questions about other names are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..data import TEMPLATE_KEYS, completion_text, encode_prompt, prompt_text, row_kind, spread
from ..errors import DataError
from .attacks.asking import reasked
from .attacks.measures import with_prompt
from .attacks.names import names_in, names_of, without_name
from .generation import generate
from .subject import Subject

MOST_OWN, MOST_NEAR = 256, 128  # questions of each kind: what they stand for, and not their number, keeps
_TEMPERATURE = 0.7  # at 1 a small model writes no questions; towards 0 it writes the same one
_QUESTION_TOKENS, _ANSWER_TOKENS = 64, 96
_LEAST = 2
_REPEATED = 8  # words in a row that a forget answer has too
_MARK = "Whatever"  # stands for a question, to see what the tokenizer's template writes around it


def own_rows(subject: Subject, forget: Sequence[Mapping], *, seed: int = 0) -> list[dict]:
    """Let the model write rows near the forget rows, and of the same kind.

    It writes twice as many questions as there are forget rows (at most ``MOST_OWN``), at temperature 0.7, and is asked
    each forget question (at most ``MOST_NEAR``) about another name. It answers greedily. A row is left out if its
    question is there already, or if it holds a name of the forget rows, a word of more than two letters of a name that
    a forget question holds, 8 words in a row of a forget answer, or the whole of a shorter one. The same model, rows,
    seed and batch size give the same rows.

    Args:
        subject: the full model.
        forget: the forget rows.
        seed: of the questions.

    Raises:
        DataError: no forget row asks anything, or the model wrote fewer than two rows that can be used.
    """
    asking = [_alone(row) for row in with_prompt(subject, forget)]
    if not asking:
        raise DataError(
            "rows of the model's own: expected forget rows with a prompt (question/answer, prompt/completion or "
            "messages), found only texts; name retain rows, or 'default', the general rows that ship"
        )
    forgotten = _Forgotten(asking)
    own = _answered(subject, _own_questions(subject, asking, seed), forgotten)
    names = [name for name in dict.fromkeys(names_of(own)) if name is not None]
    near = _answered(subject, list(_about(asking, names)), forgotten)
    rows = list({prompt_text(row): row for row in [*own, *near]}.values())
    if len(rows) < _LEAST:
        raise DataError(
            f"rows of the model's own: expected at least {_LEAST} that repeat nothing of the forget rows, found "
            f"{len(rows)}; name retain rows, or 'default', the general rows that ship"
        )
    return rows


class _Forgotten:
    """What the forget rows say, to tell whether another row says it too."""

    def __init__(self, rows: Sequence[Mapping]) -> None:
        texts = [f"{prompt_text(row)}\n{completion_text(row)}" for row in rows]
        names = {name for text in texts for name in names_in(text)}
        names |= {word for name in names_of(rows) if name is not None for word in name.split() if len(word) > 2}
        self._names = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(names)) or r"(?!)")
        self._runs = {run for row in rows for run in _runs(completion_text(row))}
        self._questions = {prompt_text(row).strip() for row in rows}

    def is_in(self, row: Mapping) -> bool:
        """Whether the row asks or says what the forget rows do."""
        question, answer = prompt_text(row), completion_text(row)
        if question.strip() in self._questions or self._names.search(f"{question}\n{answer}"):
            return True
        words = _words(answer)
        return any(
            tuple(words[start : start + size]) in self._runs
            for size in range(1, _REPEATED + 1)
            for start in range(len(words) - size + 1)
        )


def _runs(answer: str) -> Iterator[tuple[str, ...]]:
    """All runs of as many words as tell an answer; of a shorter answer, the whole."""
    words = _words(answer)
    size = min(len(words), _REPEATED)
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1) if size)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _alone(row: Mapping) -> dict:
    """The row without keys of other uses, and without earlier turns, which may hold anything."""
    kind = row_kind(row, "row")
    kept = {key: row[key] for key in (*kind, *TEMPLATE_KEYS) if key in row}
    if isinstance(kept[kind[0]], list):
        last = 2 if kind == ("messages",) else 1
        turns = kept[kind[0]]
        kept[kind[0]] = [*(turn for turn in turns[:-last] if turn["role"] == "system"), *turns[-last:]]
    return kept


def _own_questions(subject: Subject, asking: Sequence[Mapping], seed: int) -> list[dict]:
    """Questions that the model writes after what stands before one."""
    framed = ((row, *_around(row, subject.tokenizer)) for row in asking)
    row, before, after = next((found for found in framed if found[1]), (asking[0], "", ""))
    if not before:
        return []
    opened = [{"prompt": before, "completion": " ?"}] * min(2 * len(asking), MOST_OWN)
    written = generate(
        subject, opened, max_new_tokens=_QUESTION_TOKENS, temperature=_TEMPERATURE, seed=seed, name="own questions"
    )
    questions = [text.partition(after)[0].strip() if after else text for text in written]
    return [reasked(row, question) for question in dict.fromkeys(questions) if question]


def _around(row: Mapping, tokenizer: Any) -> tuple[str, str]:
    """The texts before and after what the row asks, as the model reads it; ('', '') where nothing stands before."""
    before, mark, after = tokenizer.decode(encode_prompt(reasked(row, _MARK), tokenizer)).partition(_MARK)
    before = before.rstrip(" ")
    if tokenizer.bos_token and tokenizer(before)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        before = before.removeprefix(tokenizer.bos_token)  # the tokenizer writes it, and so did the template
    return (before, after.strip()) if mark and before.strip() else ("", "")


def _about(asking: Sequence[Mapping], names: Sequence[str]) -> Iterator[dict]:
    """The questions about other names, each name in turn."""
    of_rows = [(row, name) for row, name in zip(asking, names_of(asking), strict=True) if name is not None]
    for number, (row, name) in enumerate(spread(of_rows, MOST_NEAR) if names else []):
        yield reasked(row, without_name(prompt_text(row), name, names[number % len(names)]))


def _answered(subject: Subject, asked: Sequence[Mapping], forgotten: _Forgotten) -> list[dict]:
    """The rows with the model's answers; those that say what must go are left out."""
    texts = generate(subject, asked, max_new_tokens=_ANSWER_TOKENS, name="own answers") if asked else []
    rows = [reasked(row, prompt_text(row), text) for row, text in zip(asked, texts, strict=True) if text]
    return [row for row in rows if not forgotten.is_in(row)]
