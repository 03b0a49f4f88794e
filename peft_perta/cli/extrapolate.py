r"""Go further in the direction of an unlearning run: add alpha times the change that it made to the adapter (UIPE). It
needs an adapter that was trained to forget, and either a number for --alpha or rows and a goal to search one by.

Example:
  peft-perta extrapolate --model meta-llama/Llama-3.2-1B-Instruct --adapter trained_adapter \
      --forget forget.jsonl --retain held_out.jsonl --retain-tolerance 0.1 --output extrapolated_adapter
"""

from __future__ import annotations

import argparse
from typing import Any

from ..adapters import PROVENANCE_NAME, extrapolate_adapter
from ..errors import ConfigError, DataError
from ..model import attach_adapters, load_skeleton
from ._goal import SEARCH_OPTIONS, add_goal, load_search, search_adapters
from ._options import add_model, add_output, add_served_as, flag, print_next, save_adapter
from ._output import check_output_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_served_as(parser)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="a plain LoRA adapter that was trained to forget, by any tool"
    )
    parser.add_argument(
        "--start-adapter", metavar="DIR", help="the adapter that its training started from (default: a zero adapter)"
    )
    parser.add_argument(
        "--alpha", type=_alpha, default="auto",
        help="the factor on that change; 0 adds nothing; 'auto' searches the one that meets the goal (default: auto)",
    )  # fmt: skip
    add_output(parser, "the extrapolated adapter")
    add_goal(parser, required=False)


def run(options: argparse.Namespace) -> None:
    """Write the extrapolated adapter."""
    check_output_of(options, PROVENANCE_NAME)
    judged = {"unlearn": options.adapter, "start": options.start_adapter}
    search: dict[str, Any] = {}
    if options.alpha == "auto":
        for name in ("forget", "retain"):
            if not getattr(options, name):
                raise DataError(
                    f"--{name}: expected a file of rows to judge by, found none; give one, or a number for --alpha"
                )
        adapters = search_adapters(options, judged)
        model, goal, samples = load_search(options, adapters)
        search = {"goal": goal, **samples, "with_adapters": ["task"] if options.task_adapter else []}
        if options.served_as:  # searched in that form; the adapter is one of the base
            search["served"] = model
            model = attach_adapters(load_skeleton(options.model, revision=options.revision), adapters)
    else:
        unused = next((name for name in (*SEARCH_OPTIONS, "served_as") if getattr(options, name) is not None), None)
        if unused is not None:
            raise ConfigError(
                f"{flag(unused)}: expected none with --alpha {options.alpha:g}, which needs no search; leave one out"
            )
        adapters = search_adapters(options, judged)
        model = attach_adapters(load_skeleton(options.model, revision=options.revision), adapters)
    start_adapter = "start" if options.start_adapter else None
    save_adapter(
        extrapolate_adapter(model, "unlearn", options.alpha, start_adapter=start_adapter, **search), options.output
    )
    print_next(options)


def _alpha(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'auto', found {text!r}") from None
