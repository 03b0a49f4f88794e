"""What a page shows, gathered: the model before, after, and the one that never saw the forget rows, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import PROVENANCE_NAME, load_provenance, versions
from ..data import ROW_KINDS, completion_text, spread
from ..evaluation import SUITES, AttackResult, Log, Subject, evaluate_split, generate, summary
from ._contents import ReportData

SHOWN = 10  # generations of each split


def report_data_of_logs(
    sides: Mapping[str, Mapping[str, Log]],
    *,
    title: str,
    base_model: str,
    adapters: Sequence[str | Path] = (),
    attacks: Sequence[AttackResult] = (),
    commands: Sequence[str] = (),
) -> ReportData:
    """From evaluation logs.

    Args:
        sides: 'before', 'after', 'reference' -> suite -> log; what was not judged is left out.
        adapters: directories, in the order of the stack; the last one's provenance tells what was done.
    """
    models = {
        label: {metric: value for log in logs.values() for metric, value in summary(log).items()}
        for label, logs in sides.items()
        if logs
    }
    return _report_data(title, base_model, adapters, models, _shown(sides), attacks, commands)


def report_data_of_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Mapping[str, Sequence[dict]],
    stacks: Mapping[str, Sequence[str]],
    *,
    title: str,
    base_model: str,
    adapters: Sequence[str | Path],
    commands: Sequence[str] = (),
    judged: int = 50,
    batch_size: int = 32,
    max_new_tokens: int = 96,
) -> ReportData:
    """From rows alone: losses of some, and answers to a few, by each stack of adapters on one model.

    Args:
        rows: 'forget' and 'retain' -> rows of any kind; those of text are not answered.
        stacks: 'before', 'after' -> names of the adapters that are on.
        judged: at most so many rows of each split, at even distances.
    """
    models: dict[str, dict[str, float]] = {label: {} for label in stacks}
    generations: dict[str, list[dict[str, str]]] = {}
    for split, found in rows.items():
        asked = [row for row in spread(list(found), SHOWN) if any(set(kind) <= set(row) for kind in ROW_KINDS[:-1])]
        answers = {}
        for label, stack in stacks.items():
            subject = Subject(model, tokenizer, stack, batch_size)
            scores = evaluate_split(subject, spread(list(found), judged), is_forget=split == "forget")
            models[label][f"{split}_Q_A_Prob"] = scores.probability
            models[label][f"{split}_loss"] = scores.loss
            if asked:
                answers[label] = generate(subject, asked, max_new_tokens=max_new_tokens, name=f"{split}: {label}")
        generations[split] = [
            {"prompt": _question(row), "expected": completion_text(row), **dict(zip(answers, told, strict=True))}
            for row, *told in zip(asked, *answers.values(), strict=True)
        ]
    return _report_data(title, base_model, adapters, models, generations, (), commands)


def _report_data(
    title: str,
    base_model: str,
    adapters: Sequence[str | Path],
    models: dict[str, dict[str, float]],
    generations: dict[str, list[dict[str, str]]],
    attacks: Sequence[AttackResult],
    commands: Sequence[str],
) -> ReportData:
    report = None
    if adapters and (Path(adapters[-1]) / PROVENANCE_NAME).is_file():
        report = load_provenance(adapters[-1])[0].to_dict()
    return ReportData(
        title=title,
        base_model=base_model,
        adapters=[str(directory) for directory in adapters],
        report=report,
        models=models,
        calibration=(report or {}).get("calibration"),
        generations=generations,
        attacks=[result.to_dict() for result in attacks],
        commands=list(commands),
        made_with=versions(),
    )


def _shown(sides: Mapping[str, Mapping[str, Log]]) -> dict[str, list[dict[str, str]]]:
    """The same rows' generations of every side, at even distances."""
    shown = {}
    for split in ("forget", "retain"):
        metrics = [suite.shown_answers[split] for suite in SUITES.values() if split in suite.shown_answers]
        rows = {
            label: log[metric]["value_by_index"]
            for label, logs in sides.items()
            for log in logs.values()
            for metric in metrics
            if metric in log
        }
        if "after" not in rows:
            continue
        indices = [index for index, row in rows["after"].items() if row is not None]
        shown[split] = [
            {
                "prompt": rows["after"][index]["input"],
                "expected": rows["after"][index]["ground_truth"],
                **{label: found[index]["generation"] for label, found in rows.items() if found.get(index)},
            }
            for index in spread(indices, SHOWN)
        ]
    return shown


def _question(row: Mapping[str, Any]) -> str:
    """What the row asks, as plain text."""
    asked = row.get("question") or row.get("prompt") or row["messages"][:-1]
    return asked if isinstance(asked, str) else str(asked[-1].get("content", ""))
