"""From rows to an adapter that was trained to forget: ``train``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from ..adapters import DTYPES, PROVENANCE_NAME
from ..data import check_output, read_rows
from ..errors import ConfigError
from ..gradients import remove_checkpoint
from ..model import attach_adapters, check_adapter_files, distributed
from ..training import (
    COMBINERS,
    FORGET_LOSSES,
    RETAIN_LOSSES,
    UnlearningSettings,
    default_lora_config,
    train_unlearning,
)
from ._options import ROWS_HELP, add_command, add_model, check_distinct, load_model, seed_of

CHOICES = {"forget_loss": FORGET_LOSSES, "retain_loss": RETAIN_LOSSES, "combiner": COMBINERS}


_FLOATS = ("forget_weight", "retain_weight", "beta", "margin")


def add_commands(commands) -> None:
    train = add_command(
        commands, "train", _train, "train an adapter to forget some rows and to keep others (NPO, PCGrad, SAGO, ...)",
        _checkpoint,
    )  # fmt: skip
    add_model(train)
    train.add_argument("--forget", required=True, metavar="ROWS", help=f"what must go: {ROWS_HELP}")
    train.add_argument("--retain", required=True, metavar="ROWS", help="what must stay, likewise; no row in both")
    train.add_argument("--task-adapter", metavar="DIR", help="the adapter that knows too much, where it is one")
    train.add_argument("--start-adapter", metavar="DIR", help="begin as this adapter, such as one that unlearn wrote")
    train.add_argument("--output", required=True, metavar="DIR", help="directory of the adapter")
    for field in dataclasses.fields(UnlearningSettings):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.name in CHOICES:
            text = f"{text} (default: {field.default})"
            train.add_argument(name, choices=list(CHOICES[field.name]), default=field.default, help=text)
        elif field.name in _FLOATS:
            text += "" if field.default is None else f" (default: {field.default:g})"
            train.add_argument(name, type=float, default=field.default, help=text)
        elif field.name == "layer":
            train.add_argument(name, type=int, help=text)
        else:
            train.add_argument("--refusal", action="append", metavar="TEXT", help=text + " Default: the package's own.")
    train.add_argument("--rank", type=int, help="LoRA rank (default: 16, or the start adapter's)")
    train.add_argument("--epochs", type=float, default=5, help="passes over the forget rows (default: 5)")
    train.add_argument("--learning-rate", type=float, default=5e-4, help="peak learning rate (default: 0.0005)")
    train.add_argument("--batch-size", type=int, default=8, help="rows of each set per micro-batch (default: 8)")
    train.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches per step (default: 1)")
    train.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    train.add_argument("--dtype", choices=DTYPES, default="float32", help="of the adapter's files (default: float32)")
    train.add_argument("--seed", type=seed_of, default=0, help="seed of init and order (default: 0)")


def _train(options: argparse.Namespace) -> None:
    least = {"rank": 1, "batch_size": 1, "accumulation_steps": 1, "max_length": 2}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least {smallest}, found {value}")
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number > 0, found {getattr(options, name)}")
    if options.rank is not None and options.start_adapter:
        raise ConfigError("--rank: expected none with --start-adapter, whose rank it is; leave one out")
    values: dict[str, Any] = {name: getattr(options, name) for name in (*CHOICES, *_FLOATS, "layer")}
    if options.refusal:
        values["refusals"] = tuple(options.refusal)
    settings = UnlearningSettings(**values)
    distributed.start()
    check_output(options.output, PROVENANCE_NAME)
    adapters = {"task": options.task_adapter, "start": options.start_adapter}
    adapters = {name: directory for name, directory in adapters.items() if directory}
    for directory in adapters.values():
        check_adapter_files(directory)
    check_distinct(adapters.values())
    rows = {name: read_rows(getattr(options, name)) for name in ("forget", "retain")}
    base, tokenizer = load_model(options)
    model = attach_adapters(base, adapters) if adapters else base
    *_, provenance = train_unlearning(
        model,
        rows["forget"],
        rows["retain"],
        tokenizer,
        settings,
        output_dir=options.output,
        task_adapter="task" if options.task_adapter else None,
        start_adapter="start" if options.start_adapter else None,
        lora_config=None if options.start_adapter else default_lora_config(options.rank or 16),
        dtype=options.dtype,
        max_length=options.max_length,
        checkpoint_dir=_checkpoint(options),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation_steps,
        seed=options.seed,
    )
    if distributed.is_main():
        remove_checkpoint(_checkpoint(options))
        print(f"{provenance}\nIt is in {options.output}")
        print(f"Next: peft-perta verify {options.output} --base {options.model}, then stack it on the model")
    distributed.finish()


def _checkpoint(options: argparse.Namespace) -> str:
    """Where an interrupted ``train`` leaves what it has."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"
