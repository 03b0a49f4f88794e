r"""Train an adapter to forget the forget rows and to keep the retain rows: a loss on each set, and a combiner of the
two gradients. It needs the base model, the forget rows and the retain rows, which must not share a row.

Example:
  peft-perta train --model meta-llama/Llama-3.2-1B-Instruct --forget forget.jsonl --retain retain.jsonl \
      --forget-loss npo --combiner sago --output trained_adapter
"""

from __future__ import annotations

import argparse
import dataclasses
import os

from peft import LoraConfig

from ..adapters import PROVENANCE_NAME
from ..errors import ConfigError
from ..gradients import remove_checkpoint
from ..model import attach_adapters, distributed
from ..training import (
    COMBINERS,
    FORGET_LOSSES,
    RETAIN_LOSSES,
    LoraSettings,
    UnlearningSettings,
    evaluation_arguments,
    train_unlearning,
)
from ._options import (
    ROWS_METAVAR,
    add_dtype,
    add_forget,
    add_model,
    add_output,
    add_retain,
    add_table,
    add_task_adapter,
    check_distinct,
    check_rows,
    flag,
    given_adapters,
    load_model,
    print_next,
)
from ._output import check_output_of
from ._settings import add_settings, read_settings
from ._training import add_training, check_training, print_reports


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_forget(parser)
    add_retain(parser, note="; no row may be in both sets")
    add_task_adapter(parser)
    parser.add_argument(
        "--start-adapter", metavar="DIR",
        help="the adapter to start from, such as one that `peft-perta unlearn` wrote (default: a new adapter)",
    )  # fmt: skip
    add_output(parser, "the adapter")
    add_training(parser, epochs=5, learning_rate=5e-4, batch_size="rows of each set per micro-batch")
    parser.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches per step (default: 1)")
    parser.add_argument(
        "--eval-steps", type=int,
        help="steps between two evaluations, forward passes over the forget rows and the held-out rows (default: four "
        "evaluations an epoch where there is a goal or --held-out, else none)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", metavar=ROWS_METAVAR,
        help="retain rows to evaluate on, in the same formats, of which none is in --retain (default: as many of the "
        "retain rows as there are forget rows)",
    )  # fmt: skip
    add_dtype(parser, "the adapter's files")
    add_settings(parser, UnlearningSettings, "settings of the method (UnlearningSettings)")
    add_settings(parser, LoraSettings, "settings of a new adapter (PEFT's LoraConfig); a start adapter has its own")
    add_table(parser, "forget losses (--forget-loss)", FORGET_LOSSES)
    add_table(parser, "retain losses (--retain-loss)", RETAIN_LOSSES)
    add_table(parser, "combiners (--combiner), of the forget gradient g_f and the retain gradient g_r", COMBINERS)


def run(options: argparse.Namespace) -> None:
    """Train the adapter."""
    check_training(options, accumulation_steps=1, eval_steps=1)
    settings = read_settings(UnlearningSettings, options)
    lora_config = _new_config(options)
    distributed.start()
    check_output_of(options, PROVENANCE_NAME)
    adapters = given_adapters({"task": options.task_adapter, "start": options.start_adapter})
    check_distinct(adapters.values())
    check_rows(options.forget, options.retain, options.held_out)
    base, tokenizer = load_model(options)
    model = attach_adapters(base, adapters) if adapters else base
    emitted = train_unlearning(
        model,
        options.forget,
        options.retain,
        tokenizer,
        settings,
        output_dir=options.output,
        held_out=options.held_out,
        task_adapter="task" if options.task_adapter else None,
        start_adapter="start" if options.start_adapter else None,
        lora_config=lora_config,
        dtype=options.dtype,
        max_length=options.max_length,
        checkpoint_dir=resume_path(options),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation_steps,
        **evaluation_arguments(options.eval_steps),
        seed=options.seed,
        report_to=options.report_to or "none",
    )
    if distributed.is_main():
        remove_checkpoint(resume_path(options))
        print(f"{emitted.provenance}\nIt is in {options.output}")
        print_reports(options)
        print_next(options, ", then stack it on the model")
    distributed.finish()


def _new_config(options: argparse.Namespace) -> LoraConfig | None:
    """The config of the new adapter; None with a start adapter, whose config is taken."""
    if not options.start_adapter:
        return read_settings(LoraSettings, options).to_lora_config()
    given = [field.name for field in dataclasses.fields(LoraSettings) if hasattr(options, field.name)]
    if given:
        raise ConfigError(
            f"{flag(given[0])}: expected none with --start-adapter, whose config is taken; leave one of the two out"
        )
    return None


def resume_path(options: argparse.Namespace) -> str:
    """The checkpoint of an interrupted run."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"
