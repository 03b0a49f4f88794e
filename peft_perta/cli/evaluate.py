r"""Measure what a model with a stack of adapters knows, by the benchmarks of the field, and write their logs. It needs
the base model, the adapters in their order, and the rows of at least one suite or the names of lm-eval tasks.

Example:
  peft-perta evaluate --model meta-llama/Llama-3.2-1B-Instruct --adapter task_adapter --adapter unlearn_adapter \
      --suite tofu=tofu_rows --retain-only-adapter retain_adapter --attacks all --html-report --output evaluation
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import claimed_directory, write_file
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
    attack_cells,
    check_attacks,
    check_lm_eval,
    evaluate,
    format_attacks,
    general_benchmarks,
    read_log,
    read_suites,
    run_attacks,
    skipped_attacks,
    summary,
    write_log,
)
from ..html_report import ReportHeader, report_data_of_logs, write_html_report
from ..model import adapter_strength, attach_adapters, check_adapter_files
from ._options import HTML_REPORT_NAME, add_judging, add_model, add_output, add_stack, load_model, read_strengths
from ._output import check_output_of
from ._terminal import marked, show, table

ATTACKS_NAME = "attacks.json"
RETAIN_ONLY, FULL, UNLEARNED = "retain-only", "full", "unlearned"  # labels of the models
Logs = dict[str, dict[str, Log]]  # label -> suite -> log


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_stack(parser)
    parser.add_argument(
        "--suite", action="append", default=[], dest="suites", metavar="NAME=PATH",
        help=f"a suite ({', '.join(SUITES)}) and its rows: a directory or file as its publishers lay it out; may be "
        "given several times",
    )  # fmt: skip
    parser.add_argument(
        "--split", help="the forget set, if a directory holds several: forget10 of TOFU, or a subject of RWKU"
    )
    parser.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, separated by commas")
    parser.add_argument("--lm-eval-tasks", metavar="DIR", help="a directory of further lm-eval task files")
    parser.add_argument(
        "--retain-only-adapter", metavar="DIR",
        help="also judge the retain-only model: the base with this adapter, which never saw the forget rows",
    )  # fmt: skip
    parser.add_argument(
        "--retain-only-log", action="append", default=[], dest="retain_only_logs", metavar="[NAME=]JSON",
        help="or the evaluation log of a retain-only model (TOFU_EVAL.json); NAME is the suite, if there are several",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true", help="also judge the full model: the stack without its last adapter"
    )
    parser.add_argument(
        "--attacks", metavar="NAMES",
        help=f"some of {', '.join(ATTACKS)}, separated by commas; or 'all', of which those that cannot be applied to "
        "the model or the rows are skipped",
    )  # fmt: skip
    parser.add_argument(
        "--html-report", action="store_true", help=f"write {HTML_REPORT_NAME} to the output; implies --full"
    )
    add_judging(parser, rows="the most rows of each split", max_new_tokens=200)
    add_output(parser, "the logs")


def run(options: argparse.Namespace) -> None:
    """Judge the models, and write the logs."""
    output = check_output_of(options, RECORD_NAME, grows=True)
    request = _read_request(options)
    adapters = {f"adapter_{number}": directory for number, directory in enumerate(request.strengths, start=1)}
    stack = list(adapters)
    if options.retain_only_adapter:
        check_adapter_files(options.retain_only_adapter)
        adapters[RETAIN_ONLY] = options.retain_only_adapter
    if options.lm_eval:
        check_lm_eval()
    model, tokenizer = load_model(options)
    model = attach_adapters(model, adapters) if adapters else model
    with claimed_directory(output, RECORD_NAME, json.dumps({"suites": {}}) + "\n"), ExitStack() as strengths:
        for name, strength in zip(stack, request.strengths.values(), strict=True):
            strengths.enter_context(adapter_strength(model, name, strength))
        subjects = {
            label: Subject(model, tokenizer, names, options.batch_size, options.max_length)
            for label, names in _stacks(stack, options).items()
        }
        attack = _attack(subjects, stack[:-1], request, options) if options.attacks else None
        logs = _judge(subjects, request, options)
        results = attack() if attack else []
    header, *lines = _cells(logs)
    show(_text([header, *lines]), table(header, lines))
    if results:
        _show_attacks(results)
    print(f"The logs are in {output}")
    if options.html_report:
        _write_html_report(logs, results, request, options)
        print(f"The HTML report is in {output / HTML_REPORT_NAME}")


def _show_attacks(results: list[AttackResult]) -> None:
    header, *lines = attack_cells(results)
    show(f"\n{format_attacks(results)}", table(header, lines, texts=3), *map(marked, skipped_attacks(results)))


def resume_path(options: argparse.Namespace) -> str:
    """The record of the logs that are written."""
    return os.path.join(options.output, RECORD_NAME)


@dataclass(frozen=True)
class _Request:
    """What to judge and by what, checked before the model is loaded."""

    splits: dict[str, Splits]
    retain_only_logs: dict[str, Log]
    strengths: dict[str, float]  # directory of an adapter -> strength, in the order of the stack
    attacks: list[str] | None  # None: all that can be applied
    attacked_rows: list[dict]


def _read_request(options: argparse.Namespace) -> _Request:
    paths = _paths_of_suites(options.suites, "--suite")
    attacks = _attack_names(options)
    if not (paths or options.lm_eval or options.attacks):
        raise ConfigError(f"--suite: expected NAME=PATH to judge by (NAME of {', '.join(SUITES)}), or --lm-eval TASKS")
    if options.retain_only_adapter and options.retain_only_logs:
        raise ConfigError(
            "--retain-only-adapter and --retain-only-log: expected one of the two, found both; leave out the log: the "
            "adapter is judged, and gives another one"
        )
    splits = read_suites(paths, options.split) if paths else {}
    retain_only_logs = _read_retain_only_logs(options, paths)
    strengths = read_strengths(options.adapters)
    attacked_rows = _attacked_rows(splits) if options.attacks else []
    if (options.full or options.html_report or options.attacks) and not strengths:
        raise ConfigError("--adapter: expected the adapter that --full, --attacks and --html-report judge, found none")
    return _Request(splits, retain_only_logs, strengths, attacks, attacked_rows)


def _paths_of_suites(texts: list[str], option: str) -> dict[str, str]:
    """NAME=PATH, each suite once -> path, by name."""
    paths = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in SUITES or name in paths:
            raise ConfigError(f"{option}: expected NAME=PATH, once each, NAME of {', '.join(SUITES)}; found {text!r}")
        paths[name] = path
    return paths


def _read_retain_only_logs(options: argparse.Namespace, suites: Mapping[str, str]) -> dict[str, Log]:
    texts = options.retain_only_logs
    if len(texts) == 1 and len(suites) == 1 and texts[0].partition("=")[0] not in SUITES:
        return {next(iter(suites)): read_log(texts[0])}
    return {name: read_log(path) for name, path in _paths_of_suites(texts, "--retain-only-log").items()}


def _attack_names(options: argparse.Namespace) -> list[str] | None:
    """Those that are asked for by name; None for all."""
    if options.attacks == "all":
        return None
    names = options.attacks.split(",") if options.attacks else []
    unknown = next((name for name in names if name not in ATTACKS), None)
    if unknown is not None:
        raise ConfigError(f"--attacks: expected 'all' or some of {', '.join(ATTACKS)}, found {unknown!r}")
    return names


def _attacked_rows(splits: Mapping[str, Any]) -> list[dict]:
    attacked = {name: suite for name, suite in SUITES.items() if suite.forget_split}
    for name, suite in attacked.items():
        if suite.forget_split in splits.get(name, {}):
            return [{**row, "question": row[suite.question_key]} for row in splits[name][suite.forget_split]]
    raise DataError(
        f"--attacks: expected forget rows of a suite ({', '.join(attacked)}), found none; give one with --suite"
    )


def _stacks(stack: list[str], options: argparse.Namespace) -> dict[str, list[str]]:
    """Label -> adapters that are on. The retain-only model comes first: the others are measured against it."""
    stacks = {RETAIN_ONLY: [RETAIN_ONLY]} if options.retain_only_adapter else {}
    if options.full or options.html_report:
        stacks[FULL] = stack[:-1]
    return {**stacks, UNLEARNED: stack}


def _judge(subjects: Mapping[str, Subject], request: _Request, options: argparse.Namespace) -> Logs:
    """The logs of each model. Those of the unlearned one are in the output itself, the others' in a folder below it."""
    logs: Logs = {RETAIN_ONLY: request.retain_only_logs} if request.retain_only_logs else {}
    for label, subject in subjects.items():
        directory = Path(options.output) if label == UNLEARNED else Path(options.output, label)
        compared = label != RETAIN_ONLY
        if request.splits:
            logs[label] = evaluate(
                subject.model, subject.tokenizer, request.splits, adapters=subject.adapters, rows=options.rows,
                batch_size=options.batch_size, max_length=options.max_length, max_new_tokens=options.max_new_tokens,
                retain_only_logs=logs.get(RETAIN_ONLY) if compared else None,
                retain_only=subjects.get(RETAIN_ONLY) if compared else None,
                output_dir=directory,
            )  # fmt: skip
        if options.lm_eval and compared:
            tasks = [task for task in options.lm_eval.split(",") if task]
            scores = general_benchmarks(subject, tasks, options.lm_eval_tasks, options.rows)
            logs.setdefault(label, {})["lm-eval"] = scores
            write_log(scores, directory / "LM_EVAL.json")
    return logs


def _attack(
    subjects: Mapping[str, Subject], full: list[str], request: _Request, options: argparse.Namespace
) -> Callable[[], list[AttackResult]]:
    """The attacks, checked and not made yet; they write their results."""
    unlearned, rows = subjects[UNLEARNED], request.attacked_rows
    victims = Victims(unlearned, replace(unlearned, adapters=full), subjects.get(RETAIN_ONLY), rows)
    count = min(len(rows), options.rows or len(rows))
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, count)})),
        rows=options.rows,
        max_new_tokens=min(options.max_new_tokens, AttackSettings.max_new_tokens),
    )
    check_attacks(victims, request.attacks, settings)

    def attack() -> list[AttackResult]:
        results = run_attacks(victims, request.attacks, settings)
        values = [result.to_dict() for result in results]
        write_file(Path(options.output, ATTACKS_NAME), json.dumps(values, indent=1) + "\n")
        return results

    return attack


def _cells(logs: Mapping[str, Mapping[str, Log]]) -> Iterator[list[str]]:
    """A line for each metric, a column for each model, below a header."""
    columns = {
        label: {metric: value for log in logs[label].values() for metric, value in summary(log).items()}
        for label in (FULL, UNLEARNED, RETAIN_ONLY)
        if label in logs
    }
    yield ["", *columns]
    for metric in sorted({metric for column in columns.values() for metric in column}):
        yield [metric, *(f"{column[metric]:.4g}" if metric in column else "-" for column in columns.values())]


def _text(lines: Sequence[Sequence[str]]) -> str:
    width = max((len(name) for name, *_ in lines[1:]), default=6)
    return "\n".join(f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in lines)


def _write_html_report(logs: Logs, results: list[AttackResult], request: _Request, options: argparse.Namespace) -> None:
    adapters = list(request.strengths)
    title = f"What '{Path(adapters[-1]).name}' removed"
    header = ReportHeader(title, options.model, adapters, [options.command_line])
    write_html_report(report_data_of_logs(logs, header, results), Path(options.output) / HTML_REPORT_NAME)
