"""Train a forget adapter on TOFU rows, make negative adapters of it, and compare them with a retain-only model. It
needs nothing: a small Llama, its adapters and the rows ship with the package.

Example:
  peft-perta demo --output perta_demo
"""

from __future__ import annotations

import argparse

from ..comparison import DemoSettings, run_demo
from ._options import add_four_bit, add_seed


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_four_bit(parser)
    parser.add_argument(
        "--output", metavar="DIR",
        help="the directory to write the results to (default: perta_demo, or perta_demo_4bit with --four-bit)",
    )  # fmt: skip
    add_seed(parser)


def run(options: argparse.Namespace) -> None:
    """Run the demo."""
    output = options.output or ("perta_demo_4bit" if options.four_bit else "perta_demo")
    run_demo(output, four_bit=options.four_bit, settings=DemoSettings(seed=options.seed))
