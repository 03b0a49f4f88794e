"""What any causal language model, with any stack of adapters, makes of rows: losses, readings, generations, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .borrow import borrowed
from .data import Sample, batches, completion_text, encode_prompt, encode_row
from .errors import DataError, NumericalError
from .losses import TokenScores, sample_losses, token_scores
from .metrics import forget_truth_score, probability, retain_truth_score, rouge_l_recall, truth_ratio
from .targets import base_model


@dataclass(frozen=True)
class Subject:
    """Who is judged: a model with these adapters on (None: as they are), and how it is fed.

    Attributes:
        max_length: tokens kept per row, counted from the left.
    """

    model: nn.Module
    tokenizer: Any
    adapters: Sequence[str] | None = None
    batch_size: int = 32
    max_length: int = 1024
    show_progress_bar: bool = True

    def encode(self, rows: Sequence[Mapping], name: str) -> list[Sample]:
        """The rows as samples; ``name`` is what messages call them.

        Raises:
            DataError: there are none, or one is malformed; the message names the row.
        """
        if not rows:
            raise DataError(f"{name}: expected at least one row to evaluate on, found none")
        return [
            encode_row(row, self.tokenizer, max_length=self.max_length, where=f"{name}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]


@dataclass(frozen=True)
class Reading:
    """One row, read: its completion's mean token loss (nats, with the token that closes it), and every token of the
    completion but that last one, scored."""

    loss: float
    tokens: TokenScores


def read_completions(subject: Subject, rows: Sequence[Mapping], name: str = "rows") -> list[Reading]:
    """A reading of each row's completion, in the order of the rows; the model goes back as it came.

    Raises:
        DataError: there are no rows, or one is malformed.
        NumericalError: a loss is not finite.
    """
    samples = subject.encode(rows, name)
    device = base_model(subject.model).get_input_embeddings().weight.device  # type: ignore[operator]
    readings: dict[int, Reading] = {}
    bar = tqdm(total=len(samples), desc=name, unit="row", disable=not subject.show_progress_bar, leave=False)
    with bar, borrowed(subject.model, subject.adapters), torch.no_grad():
        for batch in batches(samples, subject.batch_size):
            for index, scores in zip(batch.indices, token_scores(subject.model, batch.to(device)), strict=True):
                loss = -float(scores.log_probabilities.mean())
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"{name}, row {index + 1}: the loss is {loss}; evaluate in float32 or bfloat16, or lower the "
                        "strength of the adapters"
                    )
                kept = len(scores.log_probabilities) - 1
                whole = (scores.log_probabilities, scores.standardised, scores.hits)
                readings[index] = Reading(loss, TokenScores(*(part[:kept] for part in whole)))
            bar.update(len(batch.indices))
    return [readings[index] for index in range(len(samples))]


@dataclass(frozen=True)
class SplitScores:
    """One split of rows, judged.

    Attributes:
        loss: mean over rows of the answers' mean token loss, nats.
        probability: mean over rows of exp(-loss).
        rouge_l_recall: mean over the first ``generated`` rows, of greedy generations; None where nothing was generated.
        truth_score: ``forget_truth_score`` on the forget split, ``retain_truth_score`` elsewhere; None where the rows
            hold no false answers.
    """

    rows: int
    loss: float
    probability: float
    rouge_l_recall: float | None
    truth_score: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_split(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping],
    *,
    is_forget: bool,
    adapters: Sequence[str] | None = None,
    generated: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 96,
) -> SplitScores:
    """Judge the model on rows {question, answer[, paraphrased_answer, perturbed_answer]}, with these adapters on.

    Args:
        is_forget: which of the two truth scores is taken.
        adapters: as for ``borrowed``; the model goes back as it came.
        generated: how many rows, from the first, are answered greedily for ROUGE-L.

    Raises:
        DataError: there are no rows, or one is malformed.
    """
    losses = row_losses(model, tokenizer, rows, adapters=adapters, batch_size=batch_size)
    rouge = None
    if generated:
        asked = rows[:generated]
        texts = generate(
            model, tokenizer, asked, adapters=adapters, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        rouge = rouge_l_recall(texts, [completion_text(row) for row in asked])
    judged = [row for row in rows if row.get("perturbed_answer")]
    truth = None
    if judged:
        ratios = _truth_ratios(model, tokenizer, judged, adapters, batch_size)
        truth = forget_truth_score(ratios) if is_forget else retain_truth_score(ratios)
    return SplitScores(
        rows=len(rows),
        loss=float(losses.mean()),
        probability=float(probability(losses).mean()),
        rouge_l_recall=sum(rouge) / len(rouge) if rouge else None,
        truth_score=truth,
    )


def row_losses(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping],
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """The completions' mean token losses, [N], in the order of the rows."""
    samples = [encode_row(row, tokenizer, where=f"row {number}") for number, row in enumerate(rows, start=1)]
    return losses_of(model, samples, adapters=adapters, batch_size=batch_size)


def losses_of(
    model: nn.Module, samples: list[Sample], *, adapters: Sequence[str] | None = None, batch_size: int = 32
) -> Tensor:
    """The samples' losses [N], float32 on the CPU, in their own order.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("expected at least one row to evaluate on, found none")
    device = base_model(model).get_input_embeddings().weight.device  # type: ignore[operator]
    losses = torch.empty(len(samples))
    with borrowed(model, adapters), torch.no_grad():
        for batch in batches(samples, batch_size):
            losses[batch.indices] = sample_losses(model, batch.to(device)).float().cpu()
    return losses


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
    device = base.get_input_embeddings().weight.device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = [""] * len(prompts)
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = [tokenizer.eos_token_id, getattr(base.generation_config, "eos_token_id", None)]
    ends = sorted({i for found in ends if found is not None for i in (found if isinstance(found, list) else [found])})
    bar = tqdm(total=len(prompts), desc=progress, unit="row", disable=progress is None, leave=False)
    with bar, borrowed(model, adapters), torch.no_grad():
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


def _truth_ratios(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping], adapters: Sequence[str] | None, batch_size: int
) -> Tensor:
    for row in rows:
        false = row["perturbed_answer"]
        if "question" not in row or not isinstance(false, list):
            raise DataError(
                "expected perturbed_answer as a list of false answers beside a question, found "
                f"{type(false).__name__} beside {sorted(map(str, row))}"
            )
    true_rows = [{"question": r["question"], "answer": r.get("paraphrased_answer") or r["answer"]} for r in rows]
    false_rows = [{"question": r["question"], "answer": answer} for r in rows for answer in r["perturbed_answer"]]
    losses = row_losses(model, tokenizer, [*true_rows, *false_rows], adapters=adapters, batch_size=batch_size)
    counts = [len(row["perturbed_answer"]) for row in rows]
    return truth_ratio(losses[: len(rows)], list(losses[len(rows) :].split(counts)))
