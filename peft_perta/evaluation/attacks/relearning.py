"""A few steps on a few forget rows: does the rest come back?

What is only hidden comes back after a nudge. A model is trained on some of the forget rows and read on the others; one
that never saw any, trained alike, tells how much of the others the shown rows give away by themselves.

Reference: Hu et al. 2024, arXiv 2406.13356.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data import Sample, batches
from ...errors import ConfigError, NumericalError
from ...model import base_model, input_device, preserved, sample_losses
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import likelihood
from .projections import projections

RANK = 16


SCALING = 2.0  # lora_alpha = 2 * rank


_ROWS_AT_ONCE = 8  # through forward and backward


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        ConfigError: more rows are to be relearned than there are.
        UnsupportedLayerError: a model has no linear layer to train.
    """
    check_victims(victims, settings)
    found, wanted = len(attacked_rows(victims, settings)), max(settings.relearning_rows)
    if wanted > found:
        raise ConfigError(
            f"relearning_rows: expected at most {found}, as many as there are forget rows, found {wanted}"
        )
    for _, subject in victims.subjects():
        projections(subject.model)


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """For each number of rows one run of each model, read on the way: before, and after each number of steps."""
    rows = attacked_rows(victims, settings)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    results = []
    for count in sorted(set(settings.relearning_rows)):
        shown, others = ([rows[i] for i in sorted(part)] for part in (drawn[:count], drawn[count:]))
        results += compare("relearning", victims, partial(_relearn, shown, others, settings))
    return results


ATTACK = Attack("relearning", "Train for a few steps on a few forget rows, then ask the others.", check, run)


def _relearn(
    shown: list[dict], others: list[dict], settings: AttackSettings, subject: Subject, name: str
) -> dict[str, Numbers]:
    """Setting -> numbers. A step is one update of AdamW on the mean loss of all rows that are shown."""
    where = (
        f"{_counted(len(shown), 'row')}, read on the other {len(others)}" if others else "all rows, read on the same"
    )
    samples = subject.encode(shown, name)
    steps = {0, *settings.relearning_steps}
    numbers = {}
    bar = tqdm(total=max(steps), desc=name, unit="step", disable=not subject.show_progress_bar, leave=False)
    # The trained adapter is no part of the model, so that borrowing it is all that there is to undo.
    with (
        bar,
        preserved(subject.model, subject.adapters, checkpointing=True),
        fresh_adapter(subject.model, settings.seed) as parameters,
    ):
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        for step in range(max(steps) + 1):
            if step:
                _update(subject, samples, optimizer, f"{name}, step {step}")
                bar.update()
            if step in steps:
                setting = f"{_counted(step, 'step')} on {where}"
                numbers[setting] = likelihood(subject, others or shown, name)
    return numbers


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _update(subject: Subject, samples: list[Sample], optimizer: torch.optim.Optimizer, name: str) -> None:
    device = input_device(subject.model)
    optimizer.zero_grad()
    total = 0.0
    with torch.enable_grad():
        for batch in batches(samples, min(subject.batch_size, _ROWS_AT_ONCE)):
            loss = sample_losses(subject.model, batch.to(device)).sum() / len(samples)
            loss.backward()
            total += float(loss.detach())
    if not math.isfinite(total):
        raise NumericalError(f"{name}: the loss is {total}; lower the learning rate, or load the model in bfloat16")
    optimizer.step()


@contextmanager
def fresh_adapter(model: nn.Module, seed: int) -> Iterator[list[Tensor]]:
    """Within the block every linear layer but the head also adds a LoRA adapter's s * B @ A, at first zero; yields its
    factors, which can be trained.

    By hooks on the layers' outputs, and not as one of PEFT's adapters: that would wrap layers that carry none so far,
    and be noted in the model's record, both of which outlast its removal. A is drawn as PEFT draws it.

    Raises:
        UnsupportedLayerError: the model has no linear layer.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    with ExitStack() as hooks:
        embeddings: nn.Module = base_model(model).get_input_embeddings()  # type: ignore[operator]
        # A checkpointed block passes no gradient to what it holds, unless what enters it wants one too.
        hooks.callback(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()).remove)
        for projection in projections(model):
            outputs, inputs = projection.shape
            weight: Tensor = projection.layer.weight  # type: ignore[assignment]
            dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
            A, B = torch.empty(RANK, inputs, dtype=dtype), torch.zeros(outputs, RANK, dtype=dtype)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            device = "cpu" if weight.is_meta else weight.device  # an offloaded layer has its weight only while it runs
            A, B = (factor.to(device).requires_grad_() for factor in (A, B))
            hooks.callback(projection.layer.register_forward_hook(_adding(A, B)).remove)
            factors += [A, B]
        yield factors


def _adding(A: Tensor, B: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].to(A.dtype)
        return output + (SCALING * (x @ A.T.to(x.device) @ B.T.to(x.device))).to(output.dtype)

    return add
