"""Losses and token scores of completions, under any stack of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import IGNORED, Batch, Sample, answer_frame, batches
from ..errors import DataError, NumericalError
from ..model import TokenScores, input_device, preserved, sample_losses, token_scores
from .subject import Subject

_ROWS_A_THREAD = 4  # more rows leave a CPU's caches, and take longer


@dataclass(frozen=True)
class ScoredCompletion:
    """The completion of one row, scored.

    Attributes:
        loss: mean token loss over the whole completion, nats.
        whole: the scores of every token of the completion.
        words: where the answer's own words stand in it: what closes the completion does not belong to them (the eos, or
            what the chat template writes after an answer), nor does what the template opens an answer with.
    """

    loss: float
    whole: TokenScores
    words: slice

    @property
    def tokens(self) -> TokenScores:
        """The scores of the answer's own words."""
        whole = self.whole
        columns = (whole.log_probabilities, whole.standardised, whole.hits)
        return TokenScores(*(column[self.words] for column in columns))


def score_completions(subject: Subject, rows: Sequence[Mapping], name: str = "rows") -> list[ScoredCompletion]:
    """Score each row's completion, in the order of the rows. The model is left as it was.

    Args:
        subject: the model with its adapters.
        rows: rows of any kind.
        name: the set's name on the progress bar and in messages.

    Raises:
        DataError: there are no rows, or one is malformed.
        NumericalError: a loss is not finite.
    """

    frame = answer_frame(subject.tokenizer)
    samples = subject.encode(rows, name)

    def score(batch: Batch) -> list[ScoredCompletion]:
        scores = zip(batch.indices, token_scores(subject.model, batch), strict=True)
        return [
            _completion(tokens, frame.words(completion_ids(samples[index])), f"{name}, row {index + 1}")
            for index, tokens in scores
        ]

    return forward_batches(
        subject.model,
        samples,
        score,
        adapters=subject.adapters,
        batch_size=subject.batch_size,
        progress=name if subject.show_progress_bar else None,
    )


def score_false_answers(subject: Subject, rows: Sequence[Mapping], name: str) -> list[list[ScoredCompletion]]:
    """Score each row's false answers (``perturbed_answer``); the arguments and errors are those of
    ``score_completions``."""
    false_rows = [{"question": row["question"], "answer": answer} for row in rows for answer in row["perturbed_answer"]]
    scored = iter(score_completions(subject, false_rows, f"{name}: false answers"))
    return [[next(scored) for _ in row["perturbed_answer"]] for row in rows]


def completion_ids(sample: Sample) -> list[int]:
    """The tokens of the sample's completion that something predicts: all but the first of a text."""
    return sample.input_ids[1:][sample.labels[1:] != IGNORED].tolist()


def _completion(scores: TokenScores, words: slice, where: str) -> ScoredCompletion:
    loss = -float(scores.log_probabilities.mean())
    if not math.isfinite(loss):
        raise NumericalError(
            f"{where}: the loss is {loss}; evaluate in float32 or bfloat16, or lower the strength of the adapters"
        )
    return ScoredCompletion(loss, scores, words)


def losses_of(
    model: nn.Module, samples: list[Sample], *, adapters: Sequence[str] | None = None, batch_size: int = 32
) -> Tensor:
    """The mean token loss of each sample's completion, nats: [N], float32 on the CPU. The model is left as it was.

    Args:
        model: a causal language model.
        samples: N tokenised rows, such as ``peft_perta.data.load_samples`` gives.
        adapters: names of the adapters that are on; None leaves the model's own choice.
        batch_size: the most samples per forward, as in ``forward_batches``.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("expected at least one row to evaluate on, found none")
    losses = forward_batches(
        model,
        samples,
        lambda batch: sample_losses(model, batch).float().cpu(),
        adapters=adapters,
        batch_size=batch_size,
    )
    return torch.stack(losses)


def forward_batches(
    model: nn.Module,
    samples: list[Sample],
    compute: Callable[[Batch], Iterable[Any]],
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[Any]:
    """Run ``compute`` on batches of the samples, without gradients; the results in the order of the samples.

    Args:
        model: the model that ``compute`` calls; it is left as it was.
        samples: N samples.
        compute: batch of n samples, on the model's device -> n results.
        adapters: names of the adapters that are on; None leaves the model's own choice.
        batch_size: the most samples per batch. On a CPU there are at most ``_ROWS_A_THREAD`` for each thread.
        progress: the name of a progress bar; None shows none.
    """
    device = input_device(model)
    results: dict[int, Any] = {}
    bar = tqdm(total=len(samples), desc=progress, unit="row", disable=progress is None, leave=False)
    with bar, preserved(model, adapters), torch.no_grad():
        if device.type == "cpu":
            batch_size = min(batch_size, _ROWS_A_THREAD * torch.get_num_threads())
        for batch in batches(samples, batch_size):
            results.update(zip(batch.indices, compute(batch.to(device)), strict=True))
            bar.update(len(batch.indices))
    return [results[index] for index in range(len(samples))]
