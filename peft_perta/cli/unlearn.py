r"""Make a negative adapter that removes the forget rows from the full model (PerTA). It needs the base model, a forget
adapter that was trained on the forget rows alone, the forget rows and the retain rows.

Example:
  peft-perta unlearn --model meta-llama/Llama-3.2-1B-Instruct --forget-adapter forget_adapter \
      --forget forget.jsonl --retain retain.jsonl --output unlearn_adapter
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..adapters import PROVENANCE_NAME
from ..data import read_rows
from ..errors import DataError
from ..gradients import remove_checkpoint
from ..html_report import ReportHeader, report_data_of_rows, write_html_report
from ..model import attach_adapters, distributed
from ..perta import FITS, GRANULARITIES, WEIGHTINGS, PerTAConfig, get_perta_state_dict, resolve_weighting
from ._options import (
    HTML_REPORT_NAME,
    add_forget,
    add_model,
    add_output,
    add_retain,
    add_table,
    add_task_adapter,
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
        "--forget-adapter", required=True, metavar="DIR", help="a LoRA adapter trained on the forget rows alone"
    )
    add_task_adapter(parser)
    uniform = "; not needed with --weighting uniform"
    add_forget(parser, required=False, note=uniform)
    add_retain(parser, required=False, note=uniform)
    add_output(parser, "the negative adapter")
    parser.add_argument(
        "--html-report", action="store_true",
        help=f"also judge the full and the unlearned model, and write {HTML_REPORT_NAME} to the output",
    )  # fmt: skip
    add_settings(parser, PerTAConfig, "settings of the method (PerTAConfig)")
    add_table(parser, "weightings (--weighting)", WEIGHTINGS)
    add_table(parser, "granularities (--granularity)", GRANULARITIES)
    add_table(parser, "fits (--fit)", FITS)


def run(options: argparse.Namespace) -> None:
    """Make the negative adapter."""
    config = read_settings(PerTAConfig, options)
    needs_rows = _check_weighting(config, options)
    distributed.start()
    check_output_of(options, PROVENANCE_NAME)
    adapters = given_adapters({"forget": options.forget_adapter, "task": options.task_adapter})
    rows = {name: read_rows(path) if (path := getattr(options, name)) else None for name in ("forget", "retain")}
    base, tokenizer = load_model(options)
    model = attach_adapters(base, adapters)
    emitted = get_perta_state_dict(
        model,
        config,
        options.forget,
        options.retain,
        task_adapter="task" if options.task_adapter else None,
        tokenizer=tokenizer,
        checkpoint_dir=resume_path(options) if needs_rows else None,
    )
    if distributed.is_main():
        save_adapter(emitted, options.output)
        if needs_rows:
            remove_checkpoint(resume_path(options))
        if options.html_report:
            emitted.add_to(model, "unlearn")
            _write_html_report(options, model, tokenizer, {name: value for name, value in rows.items() if value})
            print(f"The HTML report is in {Path(options.output) / HTML_REPORT_NAME}")
        print_next(options, ", then stack it on the model")
    distributed.finish()


def resume_path(options: argparse.Namespace) -> str:
    """The checkpoint of an interrupted run."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"


def _check_weighting(config: PerTAConfig, options: argparse.Namespace) -> bool:
    """Whether the weighting needs rows, which are then given."""
    if ":" in config.weighting and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as with python -m: a user's own weighting may be in the working directory
    weighting = resolve_weighting(config.weighting, config.power)
    for name in ("forget", "retain"):
        if weighting.statistic and not getattr(options, name):
            raise DataError(f"--{name}: expected a file of rows, found none; only --weighting uniform needs no rows")
    return weighting.statistic is not None


def _write_html_report(
    options: argparse.Namespace, model: PeftModel, tokenizer: Any, rows: Mapping[str, list[dict]]
) -> None:
    full = ["task"] if options.task_adapter else []
    adapters = [*filter(None, [options.task_adapter]), options.output]
    title = f"What '{Path(options.output).name}' removed"
    header = ReportHeader(title, options.model, adapters, [options.command_line])
    stacks = {"full": full, "unlearned": [*full, "unlearn"]}
    report_data = report_data_of_rows(model, tokenizer, rows, stacks, header)
    write_html_report(report_data, Path(options.output) / HTML_REPORT_NAME)
