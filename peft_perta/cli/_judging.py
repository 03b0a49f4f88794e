"""Is the knowledge gone, and what did it cost? ``evaluate``, ``rescore``, ``compare``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..comparison import ComparisonSettings, format_table, method_names, run_comparison
from ..data import check_output, write_file
from ..errors import ConfigError, DataError
from ..evaluation import (
    ATTACKS,
    RECORD_NAME,
    SUITES,
    AttackResult,
    AttackSettings,
    Log,
    Splits,
    Subject,
    Victims,
    evaluate,
    forget_rows,
    format_attacks,
    format_rescored,
    general_benchmarks,
    read_log,
    read_suites,
    rescore,
    run_attacks,
    summary,
    write_log,
)
from ..html_report import report_data_of_logs, write_html_report
from ..model import adapter_strength, attach_adapters, check_adapter_files
from ._options import HTML_REPORT_NAME, add_command, add_model, load_model, strengths_of

ATTACKS_NAME = "attacks.json"


def add_commands(commands) -> None:
    judge = add_command(
        commands, "evaluate", _evaluate, "judge a model with any stack of adapters, as the field does", _record
    )
    add_model(judge)
    judge.add_argument(
        "--adapter", action="append", default=[], dest="adapters", metavar="DIR[:STRENGTH]",
        help="an adapter of the stack, in its order; the last one is what --before, --attacks and --html-report judge",
    )  # fmt: skip
    judge.add_argument(
        "--suite", action="append", default=[], dest="suites", metavar="NAME=PATH",
        help=f"rows to ask, by suite ({', '.join(SUITES)}): a directory or file in the layout of its publishers",
    )  # fmt: skip
    judge.add_argument("--split", help="the forget set, where a directory holds several: forget10, or RWKU's subject")
    judge.add_argument("--lm-eval", metavar="TASKS", help="general benchmarks of lm-eval, by name, with commas")
    judge.add_argument("--lm-eval-tasks", metavar="DIR", help="a directory of task files of one's own")
    judge.add_argument("--retain-only-adapter", metavar="DIR", help="with it the base is the retain-only model")
    judge.add_argument(
        "--retain-only-log", action="append", default=[], dest="retain_only_logs", metavar="[NAME=]JSON",
        help="or its log, as open-unlearning's TOFU_EVAL.json",
    )  # fmt: skip
    judge.add_argument("--before", action="store_true", help="judge the stack without its last adapter too")
    judge.add_argument("--attacks", metavar="NAMES", help=f"'all', or some of {', '.join(ATTACKS)}, with commas")
    judge.add_argument(
        "--html-report", action="store_true", help=f"draw it all into {HTML_REPORT_NAME}; implies --before"
    )
    judge.add_argument("--rows", type=int, help="at most so many of each split (default: all)")
    judge.add_argument("--batch-size", type=int, default=32, help="rows at a time (default: 32)")
    judge.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    judge.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: 200)")
    judge.add_argument("--output", required=True, metavar="DIR", help="directory of the logs")

    again = add_command(commands, "rescore", _rescore, "recompute a log's aggregates from its rows")
    again.add_argument("log", metavar="LOG", help="an evaluation log, as open-unlearning's TOFU_EVAL.json")
    again.add_argument(
        "--retain-only-log", metavar="JSON", help="a retain-only model's, for forget quality and privleak"
    )
    again.add_argument("--output", required=True, metavar="JSON", help="metric -> {agg_value}")

    compare = add_command(commands, "compare", _compare, "every method on one setup, at matched forgetting", _results)
    compare.add_argument("--list", action="store_true", dest="lists", help="name the methods, and stop")
    compare.add_argument("--config", metavar="JSON", help="settings of the comparison (default: the shipped model)")
    compare.add_argument("--quick", action="store_true", help="one seed, the main methods, few rows")
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    compare.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of the forget adapters")
    compare.add_argument("--json", metavar="FILE", help="with --list: the names; else the results, as JSON lines")
    compare.add_argument("--output", default="perta_comparison", metavar="DIR", help="default: perta_comparison")


def _record(options: argparse.Namespace) -> str:
    return os.path.join(options.output, RECORD_NAME)


def _results(options: argparse.Namespace) -> str:
    return options.output


def _named(texts: list[str], option: str) -> dict[str, str]:
    """NAME=PATH, of each text; without a name where there is just one suite."""
    named = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in SUITES or name in named:
            raise ConfigError(f"{option}: expected NAME=PATH, once each, NAME of {', '.join(SUITES)}; found {text!r}")
        named[name] = path
    return named


def _retain_only_logs(options: argparse.Namespace, suites: Mapping[str, Any]) -> dict[str, Log]:
    texts = options.retain_only_logs
    if len(texts) == 1 and len(suites) == 1 and texts[0].partition("=")[0] not in SUITES:
        return {next(iter(suites)): read_log(texts[0])}
    return {name: read_log(path) for name, path in _named(texts, "--retain-only-log").items()}


def _evaluate(options: argparse.Namespace) -> None:
    output = check_output(options.output, RECORD_NAME)
    paths = _named(options.suites, "--suite")
    attacks = _attack_names(options)
    if not (paths or options.lm_eval or attacks):
        raise ConfigError(f"--suite: expected NAME=PATH to judge by (NAME of {', '.join(SUITES)}), or --lm-eval TASKS")
    if options.retain_only_adapter and options.retain_only_logs:
        raise ConfigError(
            "--retain-only-adapter and --retain-only-log: expected one of the two, found both; the logs that are made of "
            "the adapter would take the place of the other"
        )
    splits = read_suites(paths, options.split) if paths else {}
    retain_only_logs = _retain_only_logs(options, paths)
    strengths = strengths_of(options.adapters)
    attacked = _attacked_rows(splits) if attacks else []
    if (options.before or options.html_report or attacks) and not strengths:
        raise ConfigError(
            "--adapter: expected the adapter that --before, --attacks and --html-report judge, found none"
        )
    named = {f"adapter_{number}": directory for number, directory in enumerate(strengths, start=1)}
    if options.retain_only_adapter:
        check_adapter_files(options.retain_only_adapter)
        named["retain-only"] = options.retain_only_adapter
    model, tokenizer = load_model(options)
    model = attach_adapters(model, named) if named else model
    stack = [name for name in named if name != "retain-only"]
    if not (output / RECORD_NAME).is_file():  # the directory is ours, from before its parts are written
        write_file(output / RECORD_NAME, json.dumps({"suites": {}}) + "\n")
    with ExitStack() as held:
        for name, strength in zip(stack, strengths.values(), strict=True):
            held.enter_context(adapter_strength(model, name, strength))
        stacks = {"retain-only": ["retain-only"]} if options.retain_only_adapter else {}
        if options.before or options.html_report:
            stacks["before"] = stack[:-1]
        stacks["after"] = stack
        subjects = {
            label: Subject(model, tokenizer, on, options.batch_size, options.max_length) for label, on in stacks.items()
        }
        sides = _logs_of(subjects, splits, retain_only_logs, options)
        results = _attack(subjects, stack[:-1], attacks, attacked, options) if attacks else []
    print(_table(sides))
    if results:
        print(f"\n{format_attacks(results)}")
    if options.html_report:
        report_data = report_data_of_logs(
            sides, title=f"What '{Path(list(strengths)[-1]).name}' removed", base_model=options.model,
            adapters=list(strengths), attacks=results, commands=[options.line],
        )  # fmt: skip
        write_html_report(report_data, output / HTML_REPORT_NAME)
    print(f"The logs are in {output}" + (f", the page in {output / HTML_REPORT_NAME}" if options.html_report else ""))


def _logs_of(
    subjects: Mapping[str, Subject],
    splits: Mapping[str, Splits],
    retain_only_logs: dict[str, Log],
    options: argparse.Namespace,
) -> dict[str, dict[str, Log]]:
    """Side -> suite -> log, each written where it belongs; the retain-only model comes first: the others are held to it."""
    sides = {"retain-only": retain_only_logs} if retain_only_logs else {}
    for label, subject in subjects.items():
        directory = Path(options.output) if label == "after" else Path(options.output, label)
        measured = label != "retain-only"
        if splits:
            sides[label] = evaluate(
                subject.model, subject.tokenizer, splits, adapters=subject.adapters, rows=options.rows,
                batch_size=options.batch_size, max_length=options.max_length, max_new_tokens=options.max_new_tokens,
                retain_only_logs=sides.get("retain-only") if measured else None,
                retain_only=subjects.get("retain-only") if measured else None,
                output_dir=directory,
            )  # fmt: skip
        if options.lm_eval and measured:
            tasks = [task for task in options.lm_eval.split(",") if task]
            found = general_benchmarks(subject, tasks, options.lm_eval_tasks, options.rows)
            sides.setdefault(label, {})["lm-eval"] = found
            write_log(found, directory / "LM_EVAL.json")
    return sides


def _attack(
    subjects: Mapping[str, Subject],
    full: list[str],
    names: list[str],
    rows: list[dict],
    options: argparse.Namespace,
) -> list[AttackResult]:
    victims = Victims(subjects["after"], replace(subjects["after"], adapters=full), subjects.get("retain-only"), rows)
    count = min(len(rows), options.rows or len(rows))
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, count)})),
        rows=options.rows,
        max_new_tokens=min(options.max_new_tokens, AttackSettings.max_new_tokens),
    )
    results = run_attacks(victims, names, settings)
    write_file(Path(options.output, ATTACKS_NAME), json.dumps([r.to_dict() for r in results], indent=1) + "\n")
    return results


def _attack_names(options: argparse.Namespace) -> list[str]:
    if not options.attacks:
        return []
    names = list(ATTACKS) if options.attacks == "all" else options.attacks.split(",")
    wrong = [name for name in names if name not in ATTACKS]
    if wrong:
        raise ConfigError(f"--attacks: expected 'all' or some of {', '.join(ATTACKS)}, found {wrong[0]!r}")
    return names


def _attacked_rows(splits: Mapping[str, Any]) -> list[dict]:
    rows = forget_rows(splits)
    if not rows:
        suites = ", ".join(name for name, suite in SUITES.items() if suite.forget_split)
        raise DataError(f"--attacks: expected forget rows of a suite ({suites}), found none; give one by --suite")
    return rows


def _table(sides: Mapping[str, Mapping[str, Log]]) -> str:
    """Metric x side."""
    columns = {
        label: {metric: value for log in sides[label].values() for metric, value in summary(log).items()}
        for label in ("before", "after", "retain-only")
        if label in sides
    }
    metrics = sorted({metric for column in columns.values() for metric in column})
    width = max((len(metric) for metric in metrics), default=6)
    lines = [f"{'':<{width}}" + "".join(f"{label:>14}" for label in columns)]
    for metric in metrics:
        cells = [f"{column[metric]:.4g}" if metric in column else "-" for column in columns.values()]
        lines.append(f"{metric:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _rescore(options: argparse.Namespace) -> None:
    if Path(options.output).is_dir():
        raise ConfigError(f"--output: expected a file, found the directory {options.output}")
    for given in filter(None, (options.log, options.retain_only_log)):
        if os.path.realpath(given) == os.path.realpath(options.output):
            raise ConfigError(f"--output: expected another file than {given}, which it would replace")
    log = read_log(options.log)
    retain_only = read_log(options.retain_only_log) if options.retain_only_log else None
    results, left_out = rescore(log, retain_only, where=options.log, retain_only_where=options.retain_only_log or "")
    write_file(options.output, json.dumps(results, indent=1) + "\n")
    print(format_rescored(log, results, left_out))
    print(f"The aggregates are in {options.output}")


def _compare(options: argparse.Namespace) -> None:
    if options.lists:
        names = method_names()
        if options.json:
            write_file(options.json, json.dumps({"methods": names}, indent=1) + "\n")
        print("\n".join(names))
        return
    if options.config and options.quick:
        raise ConfigError("--config and --quick: expected one of the two; --quick is a config of its own")
    settings = ComparisonSettings.read(options.config) if options.config else ComparisonSettings()
    if options.quick:
        settings = ComparisonSettings.quick()
    chosen = {name: tuple(value) for name in ("methods", "seeds") if (value := getattr(options, name))}
    results = run_comparison(options.output, replace(settings, **chosen))
    if options.json:
        write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))
    print(format_table(results))
    print(f"The results, the table and the picture are in {options.output}")
