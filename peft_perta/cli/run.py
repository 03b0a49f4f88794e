r"""Do a whole job: make an adapter that forgets some rows and keeps others, judge it, and say what it cost. It needs
the base model, the forget rows and the retain rows; or a recipe, a file that names them and every setting.

Example:
  peft-perta run --model M --task-adapter task --forget forget.jsonl --retain retain.jsonl --output forgotten
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from ..job import OUTPUT, Job, Request, read_recipe
from ._settings import add_settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe; options take the place of its values")
    add_settings(parser, Request, "the job; a recipe has further settings for each step")


def run(options: argparse.Namespace) -> int:
    """Do the job, and print what it came to; the status is 1 if the goal was not met."""
    job = Job.of(_values(options))
    summary = job.run(print)
    options.status = int(bool(summary.missed))
    print(summary)
    return options.status


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the recipe, with those of the options in their place."""
    names = [field.name for field in dataclasses.fields(Request)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return {**(read_recipe(options.recipe) if options.recipe else {}), **given}


def resume_path(options: argparse.Namespace) -> str:
    """The steps that are done."""
    return os.path.join(getattr(options, "output", OUTPUT), "job.json")
