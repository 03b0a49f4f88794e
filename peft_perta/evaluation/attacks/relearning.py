"""Relearning attack: train for a few steps and measure whether the forget rows come back.

Knowledge that was only hidden comes back quickly, also by training on something else. The retain-only model, trained in
the same way, tells how much the training rows reveal about the others by themselves.

Reference: Hu et al. 2024, arXiv 2406.13356; on other data, Lucki et al. 2024, arXiv 2409.18025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data import Sample, batches, spread
from ...errors import ConfigError, NumericalError
from ...model import base_model, input_device, preserved, sample_losses
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import likelihood
from .projections import Projection, projections

RANK = 16

SCALING = 2.0  # lora_alpha = 2 * rank

_TRAINING_BATCH = 8  # the most rows per forward and backward


def check_rows(victims: Victims, settings: AttackSettings) -> None:
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
    """One training run of each model for each number of forget rows, and one for the largest of these numbers of retain
    and of unrelated rows, where there are some; measured before it and after each number of steps."""
    runs = [on_forget_rows(victims, settings, count) for count in sorted(set(settings.relearning_rows))]
    others = {"retain": victims.retain, "unrelated": victims.unrelated}
    for kind, rows in others.items():
        if rows:
            training = spread(list(rows), max(settings.relearning_rows))
            measured = attacked_rows(victims, settings)
            runs.append(Lesson(training, measured, f"{counted(len(training), f'{kind} row')}, read on the forget rows"))
    return [
        result
        for lesson in runs
        for result in compare("relearning", victims, partial(relearn, fresh_adapter, lesson, settings))
    ]


ATTACK = Attack("relearning", "Train for a few steps on a few rows, then ask the others.", check_rows, run)


class Lesson(NamedTuple):
    """What a model is trained on, what it is then asked, and both in words."""

    training: Sequence[dict]
    measured: Sequence[dict]
    words: str


def on_forget_rows(victims: Victims, settings: AttackSettings, count: int) -> Lesson:
    """Training on ``count`` of the forget rows, drawn by the seed; the others are asked."""
    rows = attacked_rows(victims, settings)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    training, others = ([rows[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    if not others:
        return Lesson(training, training, "all rows, read on the same")
    return Lesson(training, others, f"{counted(count, 'row')}, read on the other {len(others)}")


def relearn(
    trainable: Callable[[nn.Module, int], AbstractContextManager[list[Tensor]]],
    lesson: Lesson,
    settings: AttackSettings,
    subject: Subject,
    name: str,
    learning_rate: float | None = None,
) -> dict[str, Measured]:
    """setting -> numbers on the rows that are asked. A step is one AdamW update on the mean loss of all training rows.

    Args:
        trainable: (model, seed) -> a context within which the model has parameters to train, which it yields.
        lesson: the rows.
        settings: the steps, the seed, and the learning rate if none is given.
        subject: the model.
        name: its name on progress bars.
        learning_rate: constant.
    """
    samples = subject.encode(lesson.training, name)
    steps = {0, *settings.relearning_steps}
    numbers = {}
    bar = tqdm(total=max(steps), desc=name, unit="step", disable=not subject.show_progress_bar, leave=False)
    # The trained adapter is not part of the model, so that ``preserved`` restores everything.
    with (
        bar,
        preserved(subject.model, subject.adapters, checkpointing=True),
        trainable(subject.model, settings.seed) as parameters,
    ):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate or settings.learning_rate, weight_decay=0.0)
        for step in range(max(steps) + 1):
            if step:
                _update(subject, samples, optimizer, f"{name}, step {step}")
                bar.update()
            if step in steps:
                numbers[f"{counted(step, 'step')} on {lesson.words}"] = likelihood(subject, lesson.measured, name)
    return numbers


def counted(count: int, noun: str) -> str:
    """A number of things in words."""
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

    def factors(projection: Projection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs, inputs = projection.shape
        A, B = torch.empty(RANK, inputs, dtype=dtype), torch.zeros(outputs, RANK, dtype=dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return A, B

    with added(model, factors, _product) as parameters:
        yield parameters


@contextmanager
def with_factors(model: nn.Module, factors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, add the adapter with these factors, as ``fresh_adapter`` yielded them."""
    pairs = iter(zip(factors[::2], factors[1::2], strict=True))
    with added(model, lambda projection, dtype: next(pairs), _product):
        yield


def _product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return SCALING * (x @ A.T @ B.T)


@contextmanager
def added(
    model: nn.Module,
    parameters_of: Callable[[Projection, torch.dtype], tuple[Tensor, ...]],
    product: Callable[..., Tensor],
) -> Iterator[list[Tensor]]:
    """Within the block, add product(x, *parameters) to the output of every linear layer but the head, by hooks.

    Args:
        model: the model.
        parameters_of: (layer, dtype) -> its new parameters, on the host.
        product: (x [..., I], *parameters) -> [..., O].

    Yields:
        The parameters of all layers, which require a gradient.

    Raises:
        UnsupportedLayerError: the model has no linear layer.
    """
    trained: list[Tensor] = []

    def adding(parameters: tuple[Tensor, ...]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0].to(parameters[0].dtype)
            return output + product(x, *(parameter.to(x.device) for parameter in parameters)).to(output.dtype)

        return add

    with ExitStack() as hooks:
        embeddings: nn.Module = base_model(model).get_input_embeddings()  # type: ignore[operator]
        # Gradient checkpointing passes gradients to a block's parameters only where the block's input requires one.
        hooks.callback(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()).remove)
        for projection in projections(model):
            weight: Tensor = projection.layer.weight  # type: ignore[assignment]
            dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
            device = "cpu" if weight.is_meta else weight.device  # an offloaded layer has its weight only while it runs
            own = tuple(parameter.to(device).requires_grad_() for parameter in parameters_of(projection, dtype))
            hooks.callback(projection.layer.register_forward_hook(adding(own)).remove)
            trained += own
        yield trained
