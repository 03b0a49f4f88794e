"""Training arguments: our defaults, overridden by the user's, overridden by what a function sets itself; and which of
them an unlearning trainer takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import SchedulerType, TrainingArguments

from ..errors import ConfigError

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU)


def default_arguments() -> dict[str, Any]:
    """Fields of ``TrainingArguments`` that suit a few hundred rows."""
    on_gpu = torch.cuda.is_available()
    defaults = {
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "bf16": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "use_cpu": not on_gpu,
    }
    return defaults | {"gradient_checkpointing": True} if on_gpu else defaults


def training_arguments(
    kind: type[Arguments], caller: str, defaults: Mapping[str, Any], users: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Arguments:
    """The training arguments of one run.

    Args:
        kind: the class to make.
        caller: the public function, for messages.
        defaults: fields that the user may override.
        users: the user's fields.
        fixed: fields that ``caller`` sets itself.

    Raises:
        ConfigError: the user sets a fixed field, an unknown one, or one to a bad value.
    """
    refused = sorted(set(users) & set(fixed))
    if refused:
        raise ConfigError(f"training settings: {refused[0]!r} is set by {caller} itself; leave it out")
    try:
        return kind(**{**default_arguments(), **defaults, **users, **fixed})
    except (TypeError, ValueError) as error:
        package = kind.__module__.partition(".")[0]
        raise ConfigError(f"training settings: {error}; expected fields of {package}.{kind.__name__}") from error


def global_batch(args: TrainingArguments) -> int:
    """Samples per step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_warmup(args: TrainingArguments, samples: int) -> None:
    """Check that training on so many samples is more than the first step of a warm-up, whose learning rate is 0.

    Raises:
        ConfigError: it would change nothing.
    """
    of_epochs = math.ceil(args.num_train_epochs * math.ceil(samples / global_batch(args)))
    steps = args.max_steps if args.max_steps > 0 else of_epochs
    if steps == 1 and args.get_warmup_steps(1) and args.lr_scheduler_type not in _WITHOUT_WARMUP:
        raise ConfigError(
            f"warmup_steps: expected 0 where training is a single step, found {args.warmup_steps:g}: the learning rate "
            "of that step would be 0; train for more epochs, or without warm-up"
        )


def check_supported(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Check that ``UnlearningTrainer`` can do what its arguments and further options ask for.

    Raises:
        ConfigError: it cannot.
    """
    unsupported = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "fsdp": bool(args.fsdp),
        "deepspeed": bool(args.deepspeed),
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    refused = next((name for name, is_set in unsupported.items() if is_set), None)
    if refused is not None:
        raise ConfigError(
            f"{refused}={getattr(args, refused)!r} is not supported for unlearning; leave it out (a retain_tolerance "
            "takes the last evaluation within it, and accelerate launch splits the data among processes that each hold "
            "the whole model)"
        )
    if options.get("compute_metrics") is not None:
        raise ConfigError(
            "compute_metrics: expected None, since an evaluation measures both losses and hands over no predictions; "
            "measure more in a callback's on_evaluate"
        )


def adjust_arguments(args: TrainingArguments, model: PeftModel) -> None:
    """Set what the trainer depends on, in place, and make gradient checkpointing work over a frozen base."""
    args.remove_unused_columns = False
    if args.n_gpu > 1:  # a Trainer would multiply the batch by it and wrap the model in DataParallel
        args._n_gpu = 1
    if args.gradient_checkpointing:
        options: Any = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        args.gradient_checkpointing_kwargs = options
        if options.get("use_reentrant"):  # no gradient would flow through a block whose input requires none
            model.enable_input_require_grads()  # type: ignore[operator]
