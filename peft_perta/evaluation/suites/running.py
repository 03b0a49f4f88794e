"""Evaluate a model on suites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...data import check_output, spread
from ...errors import ConfigError
from ..logs.files import Log
from ..logs.rescoring import aggregate, check_retain_only
from ..subject import Subject
from .record import RECORD_NAME, EvaluationRecord, evaluated_parts
from .suite import Splits, SuiteSettings
from .table import SUITES, check_suite, read_suites


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suites: Mapping[str, str | Path | Splits],
    *,
    adapters: Sequence[str] | None = None,
    split: str | None = None,
    retain_only_logs: Mapping[str, Log] | None = None,
    retain_only: Subject | None = None,
    rows: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    max_new_tokens: int = 200,
    output_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Log]:
    """Evaluate a causal language model, with any stack of adapters on, by published benchmark suites.

    The model is left as it was.

    Args:
        model: the causal language model, with or without PEFT adapters.
        tokenizer: the model's.
        suites: suite ('tofu', 'muse', 'choices', 'rwku') -> the directory or file of its rows, or split -> rows.
        adapters: names of the adapters that are on; None leaves the model's own choice.
        split: the forget set, where a directory holds several ('forget10').
        retain_only_logs: suite -> the log of a retain-only model, against which forget_quality and privleak are
            measured.
        retain_only: a retain-only model, for the membership attack that compares with one.
        rows: the most rows of each split, taken at even distances; None for all.
        batch_size: the most rows per forward.
        max_length: tokens kept per row. By default 1024, or the model's number of positions if that is less.
        max_new_tokens: the most tokens of a generated answer.
        output_dir: a directory for the suites' logs. A log that is already there, of the same model, rows and settings,
            is not computed again.
        show_progress_bar: show a bar for each pass over rows.

    Returns:
        suite -> log: metric -> {agg_value, value_by_index}, in open-unlearning's layout.

    Raises:
        ConfigError: a suite is unknown, or a setting is out of its range.
        DataError: rows are missing or malformed. It is raised before any compute.
        NumericalError: a loss is not finite.
    """
    for name, value in (("rows", rows), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}")
    subject = Subject(model, tokenizer, adapters, batch_size, max_length, show_progress_bar)
    settings = SuiteSettings(rows, max_new_tokens, retain_only)
    return _logs(subject, _asked_rows(suites, split, rows), settings, retain_only_logs or {}, output_dir)


def _logs(
    subject: Subject,
    asked: Mapping[str, Splits],
    settings: SuiteSettings,
    retain_only_logs: Mapping[str, Log],
    output_dir: str | Path | None,
) -> dict[str, Log]:
    """The aggregated log of each suite; one that ``output_dir`` already holds is not computed again."""
    _check_retain_only_logs(retain_only_logs, asked)
    record, parts = None, {}
    if output_dir is not None:
        record = EvaluationRecord(check_output(output_dir, RECORD_NAME, grows=True))
        parts = evaluated_parts(subject, asked, settings)
    logs = {}
    for name, splits in asked.items():
        suite = SUITES[name]
        log = record.finished(suite, parts[name]) if record else None
        if log is None:
            log = suite.evaluate(subject, splits, settings)
        logs[name] = aggregate(log, retain_only_logs.get(name))
        if record:
            record.write(suite, parts[name], logs[name])
    return logs


def _asked_rows(
    suites: Mapping[str, str | Path | Splits], split: str | None, rows: int | None
) -> dict[str, Mapping[str, list[dict]]]:
    """suite -> split -> the rows that are asked: read where a path is given, at most ``rows`` of each split."""
    paths = {name: path for name, path in suites.items() if isinstance(path, (str, Path))}
    given: dict[str, Any] = {**suites, **(read_suites(paths, split) if paths or not suites else {})}
    for name in given:
        check_suite(name)
    return {
        name: {key: spread(of_split, rows) if rows else of_split for key, of_split in splits.items()}
        for name, splits in given.items()
    }


def _check_retain_only_logs(logs: Mapping[str, Log], asked: Mapping[str, Splits]) -> None:
    """
    Raises:
        DataError: a retain-only log lacks the rows of a metric that will be measured against it.
    """
    for name, log in logs.items():
        if name in asked:
            needed = SUITES[name].retain_only_metrics
            check_retain_only(log, [metric for metric, split in needed.items() if asked[name].get(split)])
