r"""Run many unlearning methods on one model, and compare what each keeps at the strength where all forget equally.
It needs nothing, as a small Llama, its adapters and its rows ship with the package; with --model it takes your own
model and rows, and says which method keeps most on them.

Example:
  peft-perta compare --model M --task-adapter task --forget forget.jsonl --retain retain.jsonl --output comparison
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from ..comparison import (
    CONFIG_NAME,
    METHODS,
    ROWS_OF_AUTHOR,
    TESTBEDS,
    ComparisonSettings,
    Testbed,
    as_flags,
    best_method,
    format_methods,
    format_table,
    method_cells,
    read_testbed,
    run_comparison,
    training_schedule,
)
from ..data import check_file, write_file
from ..errors import ConfigError
from ._options import BASE_MODEL, add_forget, add_four_bit, add_overwrite, add_retain, add_task_adapter, flag
from ._output import check_output_of
from ._terminal import show, table

_OWN = ("task_adapter", "forget", "retain", "general", "retain_only_adapter", "retain_only_log", "target_forget_loss")
_YARDSTICKS = ("retain_only_adapter", "retain_only_log", "target_forget_loss")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--list", action="store_true", dest="lists", help="print the methods with a description, and exit"
    )
    parser.add_argument(
        "--testbed", metavar="NAME",
        help=f"a model with rows: {', '.join(TESTBEDS)}, or a directory that a build.py of examples/ wrote (default: "
        "small)",
    )  # fmt: skip
    _add_own_model(parser)
    add_four_bit(parser)
    parser.add_argument(
        "--config", metavar="JSON",
        help="a file of ComparisonSettings (default: all methods over three seeds; with --model, the first methods "
        "to try and one seed)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="run the main methods alone, with one seed and few rows")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="run these methods alone; --list prints them")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="the seeds of the forget adapters")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results to this file, as JSON lines; with --list, the names"
    )
    add_overwrite(parser)
    parser.add_argument(
        "--output", default="perta_comparison", metavar="DIR",
        help="the directory to write the results, a table and a picture to (default: perta_comparison)",
    )  # fmt: skip


def _add_own_model(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("your own model and rows")
    own.add_argument("--model", metavar="NAME", help=BASE_MODEL)
    add_task_adapter(own)
    add_forget(own, required=False)
    add_retain(own, required=False, note="; every second row is judged, and no method sees it")
    own.add_argument(
        "--general", metavar="ROWS", help="rows that are in neither set (default: passages of books, which ship)"
    )
    own.add_argument(
        "--retain-only-adapter", metavar="DIR",
        help="match forgetting to this adapter, which learned the retain rows alone (default: to the base's own loss "
        "on the forget rows, with every adapter off)",
    )  # fmt: skip
    own.add_argument("--retain-only-log", metavar="LOG", help="match it to the evaluation log of a retain-only model")
    own.add_argument("--target-forget-loss", type=float, metavar="NATS", help="match it to this loss")


def run(options: argparse.Namespace) -> None:
    """Run the comparison, or print the methods."""
    if options.json:
        check_file(options.json, overwrite=options.overwrite)
    if options.lists:
        if options.json:
            write_file(options.json, json.dumps({"methods": list(METHODS)}, indent=1) + "\n")
        header, *methods = method_cells()
        show(format_methods(), table(header, methods, texts=3))
        return
    check_output_of(options, CONFIG_NAME, grows=True)
    testbed = _testbed(options)
    settings = _settings(options, testbed)
    results = run_comparison(options.output, settings, testbed)
    if options.json:
        write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))
    text = format_table(results)
    show(text, Markdown(text))
    print(f"The results, the table and the picture are in {options.output}")
    if options.model:
        print(_recommendation(results, options, settings, testbed))


def _settings(options: argparse.Namespace, testbed: Testbed) -> ComparisonSettings:
    if options.config and options.quick:
        raise ConfigError("--config and --quick: expected one of the two, found both; --quick is a config of its own")
    settings = ComparisonSettings.own() if options.model else ComparisonSettings()
    if options.config:
        settings = ComparisonSettings.read(options.config)
    if options.quick:
        settings = ComparisonSettings.quick()
    if options.model:
        settings = replace(settings, authors=())
    if not options.config:
        if max(settings.authors, default=0) * ROWS_OF_AUTHOR > len(testbed.rows["forget"]):
            settings = replace(settings, authors=())  # all forget rows as one set
        matched = tuple(measure for measure in settings.matched if measure in testbed.measures)
        settings = replace(settings, matched=matched or testbed.measures)
    chosen: dict[str, Any] = {name: tuple(v) for name in ("methods", "seeds") if (v := getattr(options, name))}
    return replace(settings, **chosen, four_bit=options.four_bit or settings.four_bit)


def _testbed(options: argparse.Namespace) -> Testbed:
    given = [name for name in _OWN if getattr(options, name) is not None]
    if not options.model:
        if given:
            raise ConfigError(f"{flag(given[0])}: expected --model with it, found none; name the base model")
        return read_testbed(options.testbed or "small")
    if options.testbed:
        raise ConfigError("--model and --testbed: expected one of the two, found both; a testbed has its own model")
    for name in ("forget", "retain"):
        if name not in given:
            raise ConfigError(f"--model: expected {flag(name)} with it, found none; name a file of rows")
    yardsticks = [name for name in _YARDSTICKS if name in given]
    if len(yardsticks) > 1:
        raise ConfigError(
            f"{flag(yardsticks[0])} and {flag(yardsticks[1])}: expected one target of forgetting, found both"
        )
    return Testbed.of_user(
        options.model,
        options.forget,
        options.retain,
        general=options.general,
        task_adapter=options.task_adapter,
        retain_only=getattr(options, yardsticks[0]) if yardsticks else None,
    )


def _recommendation(
    results: Sequence[Mapping[str, Any]], options: argparse.Namespace, settings: ComparisonSettings, testbed: Testbed
) -> str:
    """Which method kept most, and the commands that make its adapter."""
    best = best_method(results)
    method = METHODS[best] if best is not None else None
    command = method.command if method is not None else None
    if method is None or command is None:
        return "No method met the target in every run; the table says why."
    run = next(r for r in results if r["method"] == best and r["matched"] == settings.matched[0])
    retain = Path(options.output) / "retain_rows.jsonl"
    rows = testbed.rows["retain"][::2][: settings.weight_samples]
    write_file(retain, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    given = [f"--model {options.model}", f"--forget {shlex.quote(options.forget)} --retain {retain}"]
    given += ["--four-bit"] if settings.four_bit else []
    given += [f"--task-adapter {options.task_adapter}"] if options.task_adapter else []
    parts = ["peft-perta", command, *given, f"--seed {run['seed']}"]
    lines = [
        f"Of these methods, {best} keeps most on the unseen retain rows. This makes its adapter; {retain} holds the "
        "retain rows that it used:"
    ]
    if command.startswith("unlearn"):
        forget_adapter = Path(options.output) / "forget_adapters" / f"all-{run['seed']}"
        parts += [f"--forget-adapter {forget_adapter} --strength {run['strength']:.4g} --output unlearn_adapter"]
        return "\n".join([*lines, "  " + " ".join(parts)])
    schedule = training_schedule(method, len(testbed.rows["forget"]))
    parts += [*as_flags(schedule), f"--rank {settings.rank} --output trained_adapter"]
    lines.append("  " + " ".join(parts))
    made = "trained_adapter"
    if method.is_refined:
        lines.append(f"  peft-perta refine {' '.join(given)} --adapter {made} --output refined_adapter")
        made = "refined_adapter"
    alpha = f"--alpha={run['strength'] - 1:.4g}"
    scale = f"peft-perta extrapolate --model {options.model} --adapter {made} {alpha} --output unlearn_adapter"
    return "\n".join([*lines, f"  {scale}"])


def resume_path(options: argparse.Namespace) -> str:
    """The directory of the results that are written."""
    return options.output
