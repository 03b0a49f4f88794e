r"""Check an adapter's files against its provenance and against what runtimes require; print one line per check, and one
per runtime. It needs the adapter; with --base it loads it in a fresh process, and with rows it measures its effect.

Example:
  peft-perta verify unlearn_adapter --base meta-llama/Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import argparse

from ..adapters import format_checks, format_runtimes, judge_runtimes, re_evaluate, verify_adapter
from ..data import load_samples
from ..errors import ConfigError
from ..model import attach_adapters, load_base, row_length
from ._options import BASE_MODEL, add_forget, add_retain, add_revision, add_task_adapter, check_rows
from ._terminal import checked, grid, marked, show


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", metavar="DIR", help="a directory that a command of peft-perta wrote")
    parser.add_argument(
        "--base", "--model", dest="model", metavar="NAME",
        help=f"{BASE_MODEL}; the adapter is loaded on it",
    )  # fmt: skip
    add_revision(parser)
    add_task_adapter(parser)
    add_forget(parser, required=False, note="; their loss must rise with the adapter")
    add_retain(parser, required=False, note="; their loss is printed without and with the adapter")


def run(options: argparse.Namespace) -> int:
    """Print the checks; the status is 1 if one failed."""
    paths = {name: getattr(options, name) for name in ("forget", "retain") if getattr(options, name)}
    check_rows(*paths.values())
    if paths and not options.model:
        raise ConfigError("--forget and --retain need --base: the model to measure the losses with")
    checks = verify_adapter(options.adapter, options.model, revision=options.revision)
    if paths and not any(check.failed for check in checks):
        base, tokenizer = load_base(options.model, revision=options.revision)
        stack = {"task": options.task_adapter, "unlearn": options.adapter}
        model = attach_adapters(base, {name: directory for name, directory in stack.items() if directory})
        samples = {
            name: load_samples(path, tokenizer, max_length=row_length(base, None), name=f"the {name} set")
            for name, path in paths.items()
        }
        checks += re_evaluate(model, samples, "unlearn", ["task"] if options.task_adapter else [])
    options.status = int(any(check.failed for check in checks))
    text, verdicts = format_checks(checks), judge_runtimes(options.adapter, checks)
    show(text, checked(checks), marked(text.splitlines()[-1]), "")
    text = format_runtimes(verdicts)
    show(text, text.splitlines()[0], grid((each.verdict, each.runtime.name, each.known) for each in verdicts))
    return options.status
