r"""Do a whole job: make an adapter that forgets some rows and keeps others, judge it, and say what it cost. It needs
the base model, the forget rows and the retain rows; or a recipe, a file that names them and every setting.

Example:
  peft-perta run --model M --task-adapter task --forget forget.jsonl --retain retain.jsonl --output forgotten
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
from typing import Any

from ..data import check_file, write_file
from ..errors import ConfigError
from ..job import JOB_NAME, OUTPUT, RECIPE_NAME, Job, Request, read_recipe, recipe_of, starting_recipe
from ..model import distributed
from ._job_display import JobDisplay, plan_lines, plan_table
from ._options import ROWS_METAVAR
from ._output import check_output_of
from ._settings import add_settings
from ._terminal import at_terminal, marked, named, show


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a recipe in YAML; options take the place of its values"
    )
    parser.add_argument(
        "--init", action="store_true",
        help=f"write a recipe with every setting explained, to RECIPE or {RECIPE_NAME}, and exit",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="load the model, print the plan, and exit; nothing is written"
    )
    add_settings(parser, Request, "the job; a recipe also has the settings of each step")
    for action in parser._actions:
        if action.dest in ("forget", "retain", "held_out"):
            action.metavar = ROWS_METAVAR  # ``--columns`` goes with it


def run(options: argparse.Namespace) -> int:
    """Do the job, and print what it came to; the status is 1 if the goal was not met."""
    distributed.start()
    if distributed.count() > 1:
        raise ConfigError("run works in one process, found several; launch the single commands with accelerate instead")
    if options.init:
        _write_recipe(options)
        return 0
    values = _values(options)
    check_output_of(argparse.Namespace(**vars(recipe_of(values))), JOB_NAME, grows=True)
    job = Job.of(values)
    if options.dry_run:
        _show_plan(job)
        return 0
    with JobDisplay() if at_terminal() else contextlib.nullcontext() as display:
        summary = job.run(functools.partial(print, flush=True) if display is None else display.say)
    options.status = int(bool(summary.missed))
    *lines, verdict = summary.lines
    told = {name: summary.lines[name] for name in lines}
    show(str(summary), "", named(told), "", marked(summary.lines[verdict]))
    return options.status


def _show_plan(job: Job) -> None:
    plan = job.planned()
    if plan is None:
        print(f"everything is in {job.directory} already")
    else:
        show(str(plan), *plan_lines(plan), "", plan_table(plan))


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the recipe, with those of the options in their place."""
    names = [field.name for field in dataclasses.fields(Request)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return {"output": OUTPUT, **(read_recipe(options.recipe) if options.recipe else {}), **given}


def _write_recipe(options: argparse.Namespace) -> None:
    path, options.recipe = options.recipe or RECIPE_NAME, None
    check_file(path, overwrite=False)
    write_file(path, starting_recipe(Job.of(_values(options))))
    print(f"The recipe is in {path}\nNext: change what you like, then peft-perta run {path}")


def resume_path(options: argparse.Namespace) -> str:
    """The steps that are done."""
    return os.path.join(getattr(options, "output", None) or OUTPUT, JOB_NAME)
