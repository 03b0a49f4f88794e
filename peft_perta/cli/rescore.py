r"""Compute the aggregates of an evaluation log again from its rows, by the formulas of the field. It needs a log as
open-unlearning writes it, and for forget quality and privleak that of a retain-only model.

Example:
  peft-perta rescore TOFU_EVAL.json --retain-only-log retain90/TOFU_EVAL.json --output rescored.json
"""

from __future__ import annotations

import argparse
import json
import os

from ..data import check_file, write_file
from ..errors import ConfigError
from ..evaluation import format_rescored, read_log, rescore
from ._options import add_overwrite


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("log", metavar="LOG", help="an evaluation log, such as open-unlearning's TOFU_EVAL.json")
    parser.add_argument(
        "--retain-only-log", metavar="JSON",
        help="the evaluation log of a retain-only model (TOFU_EVAL.json), for forget quality and privleak",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, metavar="JSON", help="the file to write the aggregates to: metric -> {agg_value}"
    )
    add_overwrite(parser)


def run(options: argparse.Namespace) -> None:
    """Recompute the aggregates, and print them beside those of the log."""
    for path in filter(None, (options.log, options.retain_only_log)):
        if os.path.realpath(path) == os.path.realpath(options.output):
            raise ConfigError(f"--output: expected another file than {path}, which it would replace")
    check_file(options.output, overwrite=options.overwrite)
    log = read_log(options.log)
    retain_only = read_log(options.retain_only_log) if options.retain_only_log else None
    results, left_out = rescore(log, retain_only, where=options.log, retain_only_where=options.retain_only_log or "")
    write_file(options.output, json.dumps(results, indent=1) + "\n")
    print(format_rescored(log, results, left_out))
    print(f"The aggregates are in {options.output}")
