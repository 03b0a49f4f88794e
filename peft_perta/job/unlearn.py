"""The job in Python, on a model that is loaded already."""

from __future__ import annotations

import html
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import EmittedAdapter, load_emitted, push_adapter
from ..data import read_rows, write_file
from ..errors import ConfigError
from ._judge import REPORT_NAME, judge_steps
from ._resolution import resolve
from ._steps import steps_of
from ._summary import Summary
from ._workshop import ADAPTER, Rows, Workshop
from .recipe import Recipe

_GIVEN = ("model", "revision", "four_bit", "device_map", "safetensors_only", "forget", "retain", "output")


@dataclass(frozen=True)
class Unlearned:
    """What ``unlearn`` made.

    Attributes:
        adapter: the adapter, at the strength that meets the goal.
        evaluation: model ('full', 'unlearned', 'retain-only') -> metric -> value.
        missed: part of the goal ('forgotten', 'kept', 'checked') -> why it was not met; empty where all were.
        recipe: every setting that it was made with.
        summary: what it came to, in words.
        report: the HTML report.
    """

    adapter: EmittedAdapter
    evaluation: dict[str, dict[str, float]]
    missed: dict[str, str]
    recipe: Recipe
    summary: str
    report: str

    def save(self, directory: str | Path) -> Path:
        """Write the adapter's directory, with the report in it."""
        path = self.adapter.save(directory)
        write_file(path / REPORT_NAME, self.report)
        return path

    def push_to_hub(self, name: str, *, public: bool = False) -> str:
        """Upload the adapter to the Hugging Face Hub, without the report; see ``push_adapter``."""
        with tempfile.TemporaryDirectory() as scratch:
            return push_adapter(self.adapter.save(Path(scratch) / ADAPTER), name, public=public)

    def __str__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        """The evaluation as a table, and the summary, for a notebook."""
        metrics = list(dict.fromkeys(metric for values in self.evaluation.values() for metric in values))
        head = "".join(f"<th>{html.escape(label)}</th>" for label in self.evaluation)
        rows = "".join(
            f"<tr><th>{html.escape(metric)}</th>"
            + "".join(f"<td>{values[metric]:.3g}</td>" for values in self.evaluation.values())
            + "</tr>"
            for metric in metrics
        )
        return f"<table><tr><th></th>{head}</tr>{rows}</table><pre>{html.escape(self.summary)}</pre>"


def unlearn(
    model: Any,
    *,
    forget: Any,
    retain: Any,
    tokenizer: Any,
    task_adapter: str | None = None,
    retain_only_adapter: str | None = None,
    show_progress_bar: bool = True,
    **recipe: Any,
) -> Unlearned:
    """Do the whole job on a model: make an adapter that forgets, find its strength, judge and attack it.

    What `peft-perta run` does, with the same steps; the model is left as it was.

    Args:
        model: a transformers model or a PeftModel, in float or 4 bit.
        forget: the rows that must go: a path to JSON lines, a list of rows, or a ``datasets.Dataset``.
        retain: the rows to keep, likewise. Every second one judges, and no method sees it.
        tokenizer: the model's tokenizer.
        task_adapter: name of the adapter on the model that taught it what must go, if there is one.
        retain_only_adapter: name of an adapter on the model that never saw the forget rows, if there is one.
        show_progress_bar: show the plans and progress bars of the steps.
        recipe: further keys of a recipe, such as ``method``, ``prefer``, ``retain_tolerance`` or
            ``train={"learning_rate": 1e-3}``.

    Returns:
        The adapter, its evaluation and its summary.

    Raises:
        ConfigError: a key of the recipe is unknown or bad.
        DataError: a set is empty or malformed, or the sets share a row.
        AdapterError: an adapter is missing on the model, or the method's adapter cannot be made on it.
        NumericalError: there is nothing to forget, or no strength forgets within the retain tolerance.
    """
    refused = next((name for name in _GIVEN if name in recipe), None)
    if refused is not None:
        raise ConfigError(f"{refused}: expected none, since the model and the rows are given; leave it out")
    values = {**recipe, "task_adapter": task_adapter, "retain_only_adapter": retain_only_adapter}
    rows = Rows.of(_rows(forget), _rows(retain))
    resolved = resolve(values, rows, has_task=task_adapter is not None)
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(
            resolved.recipe,
            model,
            tokenizer,
            rows,
            Path(scratch),
            task=task_adapter,
            retain_only=retain_only_adapter,
            show_progress_bar=show_progress_bar,
        )
        try:
            for step in [*steps_of(resolved.recipe), *judge_steps()]:
                step.run(workshop)
        finally:
            workshop.restore()
        return _result(Summary.read(resolved.recipe, resolved.because, Path(scratch)))


def _rows(data: Any) -> list[dict]:
    if isinstance(data, (str, Path)):
        return read_rows(data)
    return [dict(row) for row in data]


def _result(summary: Summary) -> Unlearned:
    return Unlearned(
        adapter=load_emitted(summary.directory / ADAPTER),
        evaluation=summary.judged["models"],
        missed=summary.missed,
        recipe=summary.recipe,
        summary=str(summary),
        report=(summary.directory / REPORT_NAME).read_text(encoding="utf-8"),
    )
