"""Relearning attack: train for a few steps on a few forget rows and measure whether the others come back.

Knowledge that was only hidden comes back quickly. The retain-only model, trained in the same way, tells how much the
training rows reveal about the others by themselves.

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
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import likelihood
from .projections import projections

RANK = 16

SCALING = 2.0  # lora_alpha = 2 * rank

_TRAINING_BATCH = 8  # the most rows per forward and backward


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        ConfigError: ``relearning_rows`` asks for more rows than there are.
        UnsupportedLayerError: a model has no linear layer to train.
    """
    check_victims(victims, settings)
    available, wanted = len(attacked_rows(victims, settings)), max(settings.relearning_rows)
    if wanted > available:
        raise ConfigError(
            f"relearning_rows: expected at most {available}, the number of forget rows, found {wanted}; take fewer"
        )
    for _, subject in victims.subjects():
        projections(subject.model)


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """One training run of each model for each number of rows, measured before it and after each number of steps."""
    rows = attacked_rows(victims, settings)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    results = []
    for count in sorted(set(settings.relearning_rows)):
        training, others = ([rows[i] for i in sorted(part)] for part in (order[:count], order[count:]))
        results += compare("relearning", victims, partial(_relearn, training, others, settings))
    return results


ATTACK = Attack("relearning", "Train for a few steps on a few forget rows, then ask the others.", check, run)


def _relearn(
    training: list[dict], others: list[dict], settings: AttackSettings, subject: Subject, name: str
) -> dict[str, Measured]:
    """setting -> numbers on the other rows. A step is one AdamW update on the mean loss of all training rows."""
    where = (
        f"{_counted(len(training), 'row')}, read on the other {len(others)}" if others else "all rows, read on the same"
    )
    samples = subject.encode(training, name)
    steps = {0, *settings.relearning_steps}
    numbers = {}
    bar = tqdm(total=max(steps), desc=name, unit="step", disable=not subject.show_progress_bar, leave=False)
    # The trained adapter is not part of the model, so that ``preserved`` restores everything.
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
                numbers[setting] = likelihood(subject, others or training, name)
    return numbers


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _update(subject: Subject, samples: list[Sample], optimizer: torch.optim.Optimizer, name: str) -> None:
    device = input_device(subject.model)
    optimizer.zero_grad()
    total = 0.0
    with torch.enable_grad():
        for batch in batches(samples, min(subject.batch_size, _TRAINING_BATCH)):
            loss = sample_losses(subject.model, batch.to(device)).sum() / len(samples)
            loss.backward()
            total += float(loss.detach())
    if not math.isfinite(total):
        raise NumericalError(f"{name}: the loss is {total}; lower the learning rate, or load the model in bfloat16")
    optimizer.step()


@contextmanager
def fresh_adapter(model: nn.Module, seed: int) -> Iterator[list[Tensor]]:
    """Within the block, add a fresh LoRA adapter s B A to every linear layer but the head; yields the factors.

    The adapter consists of hooks on the layers' outputs. A PEFT adapter would wrap layers that have none so far and
    enter the model's configuration, and both would outlast its removal. A [R, I] is drawn as PEFT draws it; B [O, R]
    is zero.

    Raises:
        UnsupportedLayerError: the model has no linear layer.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    with ExitStack() as hooks:
        embeddings: nn.Module = base_model(model).get_input_embeddings()  # type: ignore[operator]
        # Gradient checkpointing passes gradients to a block's parameters only where the block's input requires one.
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
