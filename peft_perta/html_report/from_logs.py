"""Report data from evaluation logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data import spread
from ..evaluation import SUITES, AttackResult, Log, row_texts, summary
from .report_data import SHOWN_ROWS, UNLEARNED, ReportData, ReportHeader, build_report_data

_SHOWN = ("input", "ground_truth", "generation")  # of a row


def report_data_of_logs(
    logs: Mapping[str, Mapping[str, Log]], header: ReportHeader, attacks: Sequence[AttackResult] = ()
) -> ReportData:
    """Collect report data from evaluation logs.

    Args:
        logs: model label (``full``, ``unlearned``, ``retain-only``) -> suite -> log. Leave out what was not evaluated.
        header: what the report is about.
        attacks: results of the attacks.

    Returns:
        The aggregates of every model, and the generations of at most ``SHOWN_ROWS`` rows of each split.

    Raises:
        AdapterError: the last adapter's provenance is damaged.
    """
    models = {
        label: {metric: value for log in suites.values() for metric, value in summary(log).items()}
        for label, suites in logs.items()
        if suites
    }
    return build_report_data(header, models, _generations(logs), attacks)


def _generations(logs: Mapping[str, Mapping[str, Log]]) -> dict[str, list[dict[str, str]]]:
    """Evenly spaced rows of each split, each with the generation of every model."""
    generations = {}
    for split in ("forget", "retain"):
        metrics = [suite.shown_answers[split] for suite in SUITES.values() if split in suite.shown_answers]
        rows_of_model = {
            label: row_texts(log, metric, _SHOWN, f"the log of the {label} model")
            for label, suites in logs.items()
            for log in suites.values()
            for metric in metrics
            if metric in log
        }
        if UNLEARNED not in rows_of_model:
            continue
        unlearned_rows = rows_of_model[UNLEARNED]
        generations[split] = [
            {
                "prompt": unlearned_rows[index][0],
                "expected": unlearned_rows[index][1],
                **{label: rows[index][2] for label, rows in rows_of_model.items() if index in rows},
            }
            for index in spread([*unlearned_rows], SHOWN_ROWS)
        ]
    return generations
