"""The options of a training, which `forget` and `train` share, their checks, and where it reported to."""

from __future__ import annotations

import argparse
import math

from ..errors import ConfigError
from ..training import check_reporter, reports_beside
from ._options import add_max_length, add_seed, flag

_LARGEST = {"batch_size": 10_000, "epochs": 10_000}  # a step, or a run, that nobody could wait for is a slip


def add_training(parser: argparse.ArgumentParser, *, epochs: float, learning_rate: float, batch_size: str) -> None:
    """The options of a training run; ``batch_size`` is the help of ``--batch-size``."""
    parser.add_argument(
        "--epochs", type=float, default=epochs, help=f"passes over the forget rows (default: {epochs:g})"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=learning_rate,
        help=f"the peak learning rate (default: {learning_rate:g})",
    )
    parser.add_argument("--batch-size", type=int, default=8, help=f"{batch_size} (default: 8)")
    parser.add_argument(
        "--warmup-steps", type=float, default=0.0, metavar="STEPS",
        help="steps until the peak learning rate; below 1, the share of all steps (default: 0)",
    )  # fmt: skip
    add_max_length(parser)
    add_seed(parser)
    parser.add_argument(
        "--report-to", choices=["trackio", "wandb", "tensorboard"],
        help="send what is logged there while it trains (default: nowhere); tensorboard's files go to OUTPUT.runs",
    )  # fmt: skip


def check_training(options: argparse.Namespace, **least: int) -> None:
    """Check the options of a training run; ``least`` is the smallest value of each option that counts something.

    Raises:
        ConfigError: a value is out of its range, or the package of ``--report-to`` is not installed.
    """
    for name, smallest in {"batch_size": 1, "max_length": 2, **least}.items():
        value, largest = getattr(options, name), _LARGEST.get(name, math.inf)
        if value is not None and not smallest <= value <= largest:
            bounds = f"at least {smallest}" if largest == math.inf else f"{smallest} to {largest}"
            raise ConfigError(f"{flag(name)}: expected {bounds}, found {value}")
    if not 0 <= options.warmup_steps < math.inf:
        raise ConfigError(f"--warmup-steps: expected a number >= 0, found {options.warmup_steps}")
    for name in ("epochs", "learning_rate"):
        value, largest = getattr(options, name), _LARGEST.get(name, math.inf)
        if not (0 < value <= largest and value < math.inf):
            bound = "" if largest == math.inf else f", at most {largest}"
            raise ConfigError(f"{flag(name)}: expected a number > 0{bound}, found {value}")
    if options.report_to:
        check_reporter(options.report_to)


def print_reports(options: argparse.Namespace) -> None:
    """Print where a training's report is."""
    if options.report_to:
        where = reports_beside(options.output) if options.report_to == "tensorboard" else options.report_to
        print(f"What was logged is in {where}")
