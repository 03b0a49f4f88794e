"""Training arguments: our defaults, overridden by the user's, overridden by what a function sets itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from ..errors import ConfigError

Arguments = TypeVar("Arguments", bound=TrainingArguments)


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
