"""The goal of a search for a strength: its options, and the model, rows and target that the search takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from ..data import Sample, load_samples
from ..evaluation import Goal, forget_loss_of_log, losses_of
from ..model import attach_adapters, row_length
from ._options import (
    add_forget,
    add_max_length,
    add_retain,
    add_task_adapter,
    check_distinct,
    check_rows,
    given_adapters,
    load_model,
)

# The attributes of the options that only a search reads.
SEARCH_OPTIONS = (
    "forget",
    "retain",
    "task_adapter",
    "target_forget_loss",
    "retain_only_log",
    "retain_only_adapter",
    "retain_tolerance",
)


def add_goal(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of a search: the rows to judge by, and exactly one goal."""
    add_forget(parser, required=required)
    add_goal_without_forget(parser, required=required)


def add_goal_without_forget(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The same without ``--forget``, of which a command may take several."""
    add_task_adapter(parser)
    add_retain(parser, required=required, note="; rows that gave no gradients judge best")
    add_max_length(parser)
    section = parser.add_argument_group(
        "goal of the search for the strength", "Give exactly one. Losses are in nats per token."
    )
    goal = section.add_mutually_exclusive_group(required=required)
    goal.add_argument(
        "--target-forget-loss", type=float, metavar="LOSS", help="reach this mean loss on the forget rows"
    )
    goal.add_argument(
        "--retain-only-log", metavar="JSON",
        help="reach the forget loss of a retain-only model, as its evaluation log has it (TOFU_EVAL.json)",
    )  # fmt: skip
    goal.add_argument(
        "--retain-only-adapter", metavar="DIR",
        help="reach the forget loss of the base with this adapter, which never saw the forget rows",
    )  # fmt: skip
    goal.add_argument(
        "--retain-tolerance", type=float, metavar="LOSS",
        help="forget as much as possible while the mean loss on the retain rows rises by at most this",
    )  # fmt: skip


def search_adapters(options: argparse.Namespace, judged: Mapping[str, str | None]) -> dict[str, str]:
    """The adapters of a search, by name: those that are ``judged``, the task adapter and the retain-only adapter.

    Raises:
        AdapterError: a directory holds no adapter, or a damaged or pickled one.
        ConfigError: two adapters of one stack are the same directory.
    """
    adapters = given_adapters({**judged, "task": options.task_adapter, "retain-only": options.retain_only_adapter})
    check_distinct(directory for name, directory in adapters.items() if name not in ("forget", "retain-only"))
    return adapters


def load_search(
    options: argparse.Namespace, adapters: Mapping[str, str], forget: Any = None
) -> tuple[PeftModel, Goal, dict[str, list[Sample]]]:
    """The model with the adapters on it, the goal, and the samples of 'forget' (``forget``, where these are rows that
    were read) and 'retain'."""
    target_forget_loss = options.target_forget_loss
    if options.retain_only_log:
        target_forget_loss = forget_loss_of_log(options.retain_only_log)
    if not options.retain_only_adapter:
        Goal(target_forget_loss, options.retain_tolerance)  # a bad goal is refused before the model is loaded
    sets = {"forget": forget or options.forget, "retain": options.retain}
    check_rows(*(rows for rows in sets.values() if isinstance(rows, str)))
    base, tokenizer = load_model(options)
    max_length = row_length(base, options.max_length)
    samples = {
        name: load_samples(rows, tokenizer, max_length=max_length, name=f"the {name} set")
        for name, rows in sets.items()
    }
    model = attach_adapters(base, adapters)
    if options.retain_only_adapter:
        target_forget_loss = float(losses_of(model, samples["forget"], adapters=["retain-only"]).double().mean())
    return model, Goal(target_forget_loss, options.retain_tolerance), samples
