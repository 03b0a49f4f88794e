r"""Train a forget adapter: a LoRA (with --four-bit, a QLoRA) that learns the forget rows alone. It needs the base model
and the forget rows; `peft-perta unlearn` makes the negative adapter of the result.

Example:
  peft-perta forget --model meta-llama/Llama-3.2-1B-Instruct --forget forget.jsonl --output forget_adapter
"""

from __future__ import annotations

import argparse

from ..adapters import FORGET_RECORD_NAME
from ..training import LoraSettings, train_forget_adapter
from ._options import (
    add_forget,
    add_model,
    add_output,
    check_rows,
    load_model,
)
from ._output import check_output_of
from ._settings import add_settings, read_settings
from ._training import add_training, check_training, print_reports


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_forget(parser)
    add_output(parser, "the forget adapter")
    add_training(parser, epochs=10, learning_rate=1e-3, batch_size="rows per training step")
    add_settings(parser, LoraSettings, "settings of the adapter (PEFT's LoraConfig)")


def run(options: argparse.Namespace) -> None:
    """Train the forget adapter."""
    check_training(options)
    settings = read_settings(LoraSettings, options)
    check_output_of(options, FORGET_RECORD_NAME)
    check_rows(options.forget)
    model, tokenizer = load_model(options)
    train_forget_adapter(
        model,
        options.forget,
        tokenizer,
        options.output,
        lora_config=settings.to_lora_config(),
        max_length=options.max_length,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        per_device_train_batch_size=options.batch_size,
        seed=options.seed,
        report_to=options.report_to or "none",
    )
    print_reports(options)
    print(f"the forget adapter is in {options.output}\nNext: peft-perta unlearn --forget-adapter {options.output} ...")
