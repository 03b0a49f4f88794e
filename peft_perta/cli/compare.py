r"""Run many unlearning methods on one setup, and compare what each keeps at the strength where all forget equally. It
needs nothing: a small Llama, its adapters and the rows ship with the package; --config takes another setup.

Example:
  peft-perta compare --quick --output comparison
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from ..comparison import METHODS, ComparisonSettings, format_methods, format_table, run_comparison
from ..data import write_file
from ..errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--list", action="store_true", dest="lists", help="print the methods with a description, and exit"
    )
    parser.add_argument(
        "--config", metavar="JSON", help="a file of ComparisonSettings (default: all methods on the shipped model)"
    )
    parser.add_argument("--quick", action="store_true", help="run the main methods alone, with one seed and few rows")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="run these methods alone; --list prints them")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="the seeds of the forget adapters")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results to this file, as JSON lines; with --list, the names"
    )
    parser.add_argument(
        "--output", default="perta_comparison", metavar="DIR",
        help="the directory to write the results, a table and a picture to (default: perta_comparison)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Run the comparison, or print the methods."""
    if options.lists:
        if options.json:
            write_file(options.json, json.dumps({"methods": list(METHODS)}, indent=1) + "\n")
        print(format_methods())
        return
    if options.config and options.quick:
        raise ConfigError("--config and --quick: expected one of the two, found both; --quick is a config of its own")
    settings = ComparisonSettings.read(options.config) if options.config else ComparisonSettings()
    if options.quick:
        settings = ComparisonSettings.quick()
    chosen = {name: tuple(values) for name in ("methods", "seeds") if (values := getattr(options, name))}
    results = run_comparison(options.output, replace(settings, **chosen))
    if options.json:
        write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))
    print(format_table(results))
    print(f"The results, the table and the picture are in {options.output}")


def resume_path(options: argparse.Namespace) -> str:
    """The directory of the results that are written."""
    return options.output
