"""Reports of a training to trackio, wandb, tensorboard, ...: transformers' own callbacks, made before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from ..errors import ConfigError


def check_reporter(name: str) -> None:
    """Check that a report can be sent to ``name``.

    Raises:
        ConfigError: its package is not installed, or transformers knows no such name.
    """
    _callback_of(name)


def reports_beside(output_dir: str | Path) -> str:
    """The directory that tensorboard's files go to: it grows while the output is not yet there."""
    return f"{str(output_dir).rstrip(os.sep)}.runs"


def take_reporters(arguments: TrainingArguments, output_dir: str | Path | None) -> list[TrainerCallback]:
    """The callbacks of ``arguments.report_to``, which is emptied: a Trainer has tensorboard write to its own directory.

    Args:
        arguments: the training arguments.
        output_dir: what the training writes, if anything; tensorboard's files go beside it. The environment variable
            TENSORBOARD_LOGGING_DIR names another place.

    Raises:
        ConfigError: a reporter's package is not installed, or tensorboard has no place to write to.
    """
    names: list[str] = list(arguments.report_to or [])
    callbacks = [_callback_of(name) for name in names]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            if output_dir is None:
                raise ConfigError(
                    "report_to='tensorboard': expected an output_dir, beside which its files go, found None; name one, "
                    "or set TENSORBOARD_LOGGING_DIR"
                )
            callback.logging_dir = reports_beside(output_dir)
    arguments.report_to = []
    return callbacks


def _callback_of(name: str) -> TrainerCallback:
    try:
        (kind,) = get_reporting_integration_callbacks([name])
        return kind()
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"report_to: expected a reporter whose package is installed, found {name!r} ({reason}); install it with "
            f"`pip install {name}`, or leave report_to out"
        ) from error
