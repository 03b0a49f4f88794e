r"""Weigh an adapter along the input directions of its layers, so that it acts on the forget rows and spares the others.
It needs the base model, an adapter that was made to forget by any tool, the forget rows and the retain rows.

Example:
  peft-perta refine --model meta-llama/Llama-3.2-1B-Instruct --adapter trained_adapter \
      --forget forget.jsonl --retain retain.jsonl --output refined_adapter
"""

from __future__ import annotations

import argparse

from ..adapters import PROVENANCE_NAME
from ..model import attach_adapters, distributed
from ..perta import RefinementSettings, refine_adapter
from ._options import (
    add_forget,
    add_model,
    add_output,
    add_retain,
    add_task_adapter,
    check_distinct,
    check_rows,
    given_adapters,
    load_model,
    print_next,
    save_adapter,
)
from ._output import check_output_of
from ._settings import add_settings, read_settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="a plain LoRA adapter that makes the model forget, by any tool"
    )
    add_task_adapter(parser)
    add_forget(parser)
    add_retain(parser)
    add_output(parser, "the refined adapter")
    add_settings(parser, RefinementSettings, "settings of the method (RefinementSettings)")


def run(options: argparse.Namespace) -> None:
    """Write the refined adapter."""
    settings = read_settings(RefinementSettings, options)
    distributed.start()
    check_output_of(options, PROVENANCE_NAME)
    adapters = given_adapters({"unlearn": options.adapter, "task": options.task_adapter})
    check_distinct(adapters.values())
    check_rows(options.forget, options.retain)
    base, tokenizer = load_model(options)
    emitted = refine_adapter(
        attach_adapters(base, adapters),
        "unlearn",
        options.forget,
        options.retain,
        settings,
        task_adapter="task" if options.task_adapter else None,
        tokenizer=tokenizer,
    )
    if distributed.is_main():
        save_adapter(emitted, options.output)
        print_next(options, ", then peft-perta extrapolate it to the forgetting that you need")
    distributed.finish()
