"""Answers to prompts, under any stack of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import encode_prompt
from ..errors import DataError
from ..model import base_model, input_device, preserved


def generate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping],
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 96,
    prefixes: Sequence[Sequence[int]] | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> list[str]:
    """Answers to the rows' prompts, in their order: left-padded, batched by length, with the KV cache.

    Args:
        prefixes: token ids, a row, with which the answer begins; they are not given back.
        temperature: greedy where None; else sampled from the whole distribution, with ``seed``. What is sampled depends
            on the batch size.
        progress: shows a bar of that name.

    Raises:
        DataError: a row is malformed, or has no prompt to answer.
    """
    prompts = [encode_prompt(row, tokenizer, where=f"row {number}") for number, row in enumerate(rows, start=1)]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(
                f"row {number} has no prompt to answer; expected question/answer, prompt/completion or messages"
            )
    if prefixes is not None:
        prompts = [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    base: Any = base_model(model)  # with its adapters; PeftModel's own generate would leave an attribute on the model
    device = input_device(model)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = [""] * len(prompts)
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = [tokenizer.eos_token_id, getattr(base.generation_config, "eos_token_id", None)]
    ends = sorted({i for found in ends if found is not None for i in (found if isinstance(found, list) else [found])})
    bar = tqdm(total=len(prompts), desc=progress, unit="row", disable=progress is None, leave=False)
    with bar, preserved(model, adapters), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            length = len(prompts[chosen[0]])
            input_ids = torch.full((len(chosen), length), padding, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(chosen):
                input_ids[row, length - len(prompts[index]) :] = torch.tensor(prompts[index])
                attention_mask[row, length - len(prompts[index]) :] = 1
            output = base.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                eos_token_id=ends or None,
                **how,
            )
            for row, index in enumerate(chosen):
                texts[index] = tokenizer.decode(output[row, length:], skip_special_tokens=True).strip()
            bar.update(len(chosen))
    return texts
