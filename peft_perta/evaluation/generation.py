"""Answers to prompts, under any stack of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..data import IGNORED, AnswerFrame, answer_frame, encode_row
from ..errors import DataError
from ..model import base_model, fitting_new_tokens, input_device, preserved
from .completions import completion_ids
from .subject import Subject

_UNCUT = 2**30  # the length of a row that is not cut


def generate(
    subject: Subject,
    rows: Sequence[Mapping],
    *,
    max_new_tokens: int = 96,
    prefixes: Sequence[Sequence[int]] | None = None,
    temperature: float | None = None,
    seed: int = 0,
    name: str = "answers",
) -> list[str]:
    """Answer the rows' prompts, in the order of the rows. The model is left as it was.

    Prompts are left-padded and batched by length; generation uses the KV cache. Nothing of the model's own
    generation_config counts (a repetition penalty, suppressed tokens) but its eos tokens. An answer begins after
    what the chat template opens it with, and ends where the tokenizer, the model or the template says so
    (``peft_perta.data.answer_frame``).

    Args:
        subject: the model with its adapters.
        rows: rows with a prompt.
        max_new_tokens: the most tokens of an answer.
        prefixes: for each row the token ids that its answer starts with; they are not part of the returned text.
        temperature: None decodes greedily; a number samples from the whole distribution at that temperature. The
            samples depend on ``seed`` and on the batch size.
        seed: of the samples.
        name: the set's name on the progress bar.

    Raises:
        DataError: a row is malformed, or has no prompt to answer.
    """
    base: Any = base_model(subject.model)  # PeftModel's own generate would leave an attribute on the model
    frame = _frame(subject.tokenizer, base)
    prompts = _prompts(subject.tokenizer, rows, frame, prefixes)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    max_new_tokens = fitting_new_tokens(subject.model, prompts, max_new_tokens)
    device = input_device(subject.model)
    config = _generation_config(subject.tokenizer, frame, max_new_tokens, temperature)
    texts = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=name, unit="row", disable=not subject.show_progress_bar, leave=False)
    with bar, preserved(subject.model, subject.adapters), only_generation_config(base, config), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), subject.batch_size):
            chosen = order[start : start + subject.batch_size]
            input_ids, attention_mask = _left_padded([prompts[index] for index in chosen], config.pad_token_id)
            output = base.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                tokenizer=subject.tokenizer,
            )
            for row, index in enumerate(chosen):
                texts[index] = _text(subject.tokenizer, output[row, input_ids.shape[1] :].tolist(), frame)
            bar.update(len(chosen))
    return texts


def stream(subject: Subject, row: Mapping, show: Callable[[str], object], *, max_new_tokens: int = 96) -> None:
    """Answer one row greedily, and show each piece of the answer once it is written.

    The pieces add up to what ``generate`` returns; its notes and errors hold.

    Args:
        subject: the model with its adapters.
        row: a row with a prompt.
        show: takes a piece.
        max_new_tokens: the most tokens of the answer.
    """
    base: Any = base_model(subject.model)
    frame = _frame(subject.tokenizer, base)
    prompts = _prompts(subject.tokenizer, [row], frame, None)
    max_new_tokens = fitting_new_tokens(subject.model, prompts, max_new_tokens)
    config = _generation_config(subject.tokenizer, frame, max_new_tokens)
    input_ids = torch.tensor(prompts, device=input_device(subject.model))
    with preserved(subject.model, subject.adapters), only_generation_config(base, config), torch.no_grad():
        base.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            tokenizer=subject.tokenizer,
            streamer=_Pieces(subject.tokenizer, frame, show),
        )


class _Pieces(BaseStreamer):
    """Shows an answer word by word: an unfinished word may still be a part of what ends the answer."""

    def __init__(self, tokenizer: Any, frame: AnswerFrame, show: Callable[[str], object]) -> None:
        self.tokenizer, self.frame, self.show = tokenizer, frame, show
        self.generated: list[int] | None = None
        self.shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then each token."""
        if self.generated is None:
            self.generated = []
            return
        self.generated += value.flatten().tolist()
        self._show(_text(self.tokenizer, self.generated, self.frame).rpartition(" ")[0])

    def end(self) -> None:
        """Show the rest."""
        self._show(_text(self.tokenizer, self.generated or [], self.frame))

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.show(text[len(self.shown) :])
            self.shown = text


def _prompts(
    tokenizer: Any, rows: Sequence[Mapping], frame: AnswerFrame, prefixes: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """The token ids that each answer follows: the row's prompt, what opens its answer, and the answer's beginning."""
    prompts = []
    for number, row in enumerate(rows, start=1):
        sample = encode_row(row, tokenizer, max_length=_UNCUT, where=f"row {number}")
        completion = completion_ids(sample)
        prompt = sample.input_ids[: len(sample.input_ids) - len(completion)].tolist()
        if int(sample.labels[0]) != IGNORED:
            raise DataError(
                f"row {number} has no prompt to answer; expected question/answer, prompt/completion or messages"
            )
        prompts.append([*prompt, *completion[: frame.words(completion).start]])
    if prefixes is not None:
        prompts = [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
    return prompts


@contextmanager
def only_generation_config(base: Any, config: GenerationConfig) -> Iterator[None]:
    """Within the block this is the model's generation_config.

    transformers fills in what a given config leaves at None from the model's own, and None is how most settings are
    off (suppressed tokens, forced ones, bad words): a config given to ``generate`` cannot turn them off.
    """
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


def plain_generation_config(tokenizer: Any, base: Any) -> GenerationConfig:
    """Greedy decoding without any processing of the logits, with the tokens that pad and end an answer.

    For callers that stop at texts of their own.
    """
    return _generation_config(tokenizer, replace(_frame(tokenizer, base), end_text=None))


def _generation_config(
    tokenizer: Any, frame: AnswerFrame, max_new_tokens: int | None = None, temperature: float | None = None
) -> GenerationConfig:
    decoding: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    padding = next((token for token in (tokenizer.pad_token_id, *frame.end_tokens) if token is not None), 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        eos_token_id=sorted(frame.end_tokens) or None,
        stop_strings=frame.end_text,
        **decoding,
    )


def _frame(tokenizer: Any, base: Any) -> AnswerFrame:
    """What stands around an answer of this model, which may declare eos tokens of its own."""
    frame = answer_frame(tokenizer)
    declared = base.generation_config.eos_token_id
    more = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return replace(frame, end_tokens=tuple(dict.fromkeys((*frame.end_tokens, *more))))


def _text(tokenizer: Any, generated: Sequence[int], frame: AnswerFrame) -> str:
    """The words of an answer, up to its end."""
    text = tokenizer.decode(frame.until_end(generated), skip_special_tokens=True)
    return (text.partition(frame.end_text)[0] if frame.end_text else text).strip()


def _left_padded(prompts: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts [N, T], the longest of which stands first."""
    length = len(prompts[0])
    input_ids = torch.full((len(prompts), length), padding, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids, attention_mask
