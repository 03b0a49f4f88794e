"""The job in Python, on a model that is loaded already."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import EmittedAdapter, load_emitted, push_adapter
from ..data import SELF, read_rows, write_file
from ..errors import ConfigError
from ..model import distributed
from ._judge import REPORT_NAME
from ._resolution import resolve
from ._steps import performed
from ._summary import Summary, as_text
from ._workshop import ADAPTER, Rows, Workshop
from .recipe import STANDS_FOR, Recipe
from .run import all_steps

_GIVEN = ("model", "revision", "four_bit", "device_map", "safetensors_only", "forget", "retain", "output")
_REPORTS = "TENSORBOARD_LOGGING_DIR"  # where transformers' callback writes to, if it is set


@dataclass(frozen=True, repr=False)
class Unlearned:
    """What ``unlearn`` made.

    Attributes:
        adapter: the adapter, at the strength that meets the goal.
        evaluation: model ('full', 'unlearned', 'retain-only') -> metric -> value.
        missed: part of the goal ('forgotten', 'kept', 'checked') -> why it was not met; empty where all were.
        recipe: every setting that it was made with.
        lines: what is told ('forgotten', 'kept', ..., 'verdict') -> its words.
        report: the HTML report.
    """

    adapter: EmittedAdapter
    evaluation: dict[str, dict[str, float]]
    missed: dict[str, str]
    recipe: Recipe
    lines: dict[str, str]
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

    @property
    def summary(self) -> str:
        """What it came to, in ten lines and the verdict."""
        return as_text(self.lines)

    def __repr__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        """The summary as a table, for a notebook."""
        cell = '<td style="text-align: left">'
        rows = (f"<tr>{cell}<b>{name}</b></td>{cell}{html.escape(text)}</td></tr>" for name, text in self.lines.items())
        return f"<table>{''.join(rows)}</table>"


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
        retain: the rows to keep, likewise. Every second one judges, and no method sees it. 'default' takes general rows
            that ship; with 'self' the full model writes rows about neighbouring things.
        tokenizer: the model's tokenizer.
        task_adapter: name of the adapter on the model that taught it what must go, if there is one.
        retain_only_adapter: name of an adapter on the model that never saw the forget rows, if there is one.
        show_progress_bar: show the plans and progress bars of the steps.
        recipe: further keys of a recipe, such as ``method``, ``prefer``, ``retain_tolerance`` or
            ``train={"learning_rate": 1e-3}``.

    Returns:
        The adapter, its evaluation and its summary.

    Raises:
        ConfigError: a key of the recipe is unknown or bad, or the model is sharded.
        DataError: a set is empty or malformed, or the sets share a row.
        AdapterError: an adapter is missing on the model, or the method's adapter cannot be made on it.
        NumericalError: there is nothing to forget, or no strength forgets within the retain tolerance.
    """
    _check_given(recipe)
    named = {"task_adapter": task_adapter, "retain_only_adapter": retain_only_adapter}
    named["retain"] = retain if isinstance(retain, str) and retain in STANDS_FOR else None
    held_out = None if recipe.get("held_out") is None else _rows(recipe["held_out"])
    rows = Rows.of(_rows(forget), None if named["retain"] == SELF else _rows(retain), held_out)
    resolved = resolve({**recipe, **named}, rows, has_task=task_adapter is not None)
    distributed.refuse_sharded(model)
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
            for step in all_steps(resolved.recipe):
                workshop = performed(step, workshop)
        finally:
            workshop.restore()
        return _result(Summary.read(resolved.recipe, resolved.because, Path(scratch)))


def _check_given(recipe: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: the recipe names what is given already, or a report that would have no place.
    """
    refused = next((name for name in _GIVEN if name in recipe), None)
    if refused is not None:
        raise ConfigError(f"{refused}: expected none, since the model and the rows are given; leave it out")
    if recipe.get("report_to") == "tensorboard" and _REPORTS not in os.environ:
        raise ConfigError(
            f"report_to='tensorboard': expected the environment variable {_REPORTS}, as no output is written that its "
            "files could go to; set it, or take another reporter"
        )


def _rows(data: Any) -> list[dict]:
    if isinstance(data, (str, Path)):
        return read_rows(data)
    return [dict(row) for row in data]


def _result(summary: Summary) -> Unlearned:
    lines = {**summary.lines, "read": "result.save('DIR') writes the adapter, with its report"}
    del lines["again"]  # there is no recipe on the disk
    scratch = str(summary.directory / ADAPTER)
    return Unlearned(
        adapter=load_emitted(summary.directory / ADAPTER),
        evaluation=summary.judged["models"],
        missed=summary.missed,
        recipe=summary.recipe,
        lines={name: text.replace(scratch, "DIR") for name, text in lines.items()},
        report=(summary.directory / REPORT_NAME).read_text(encoding="utf-8"),
    )
