"""One job: from rows that must go to an adapter with its evidence, step by step, each kept once it is done."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters import versions
from ..data import SELF, check_output, claimed_directory, read_rows, write_file
from ..errors import ConfigError
from ..model import attach_adapters, check_adapter_files, find_adapter, hash_factors, identify_base_files, load_base
from ._judge import judge_steps
from ._record import JOB_NAME, Record, hash_of
from ._resolution import Resolved, resolve
from ._steps import Step, own_rows_step, performed, steps_of
from ._summary import Summary
from ._workshop import RETAIN_ONLY, Rows, Workshop
from .plan import Begun, Plan, clock
from .recipe import RECIPE_NAME, Recipe, recipe_of

_TASK = "task"
OUTPUT = "forgotten"  # the directory, where none is named


@dataclass(frozen=True)
class Job:
    """A job that is checked as far as that is possible without its model.

    Attributes:
        resolved: the recipe with every setting, and why its method was chosen.
        rows: the rows.
        directory: the output.
        steps: what is to be done, in order.
    """

    resolved: Resolved
    rows: Rows
    directory: Path
    steps: list[Step]

    @property
    def recipe(self) -> Recipe:
        """The recipe with every setting."""
        return self.resolved.recipe

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Job:
        """The job of a recipe's values; see ``recipe_of``.

        Raises:
            AdapterError: an adapter's files are not those of a plain LoRA adapter.
            ConfigError: the recipe is bad, or lacks the model or the rows; or the package of a report is missing.
            DataError: a file of rows is missing or malformed.
            OutputError: the output may not be written.
        """
        request = recipe_of(values)
        for name in ("model", "forget", "retain"):
            if getattr(request, name) is None:
                raise ConfigError(f"{name}: expected one, found none; name it in the recipe, or as --{name}")
        directory = check_output(request.output or OUTPUT, JOB_NAME, grows=True)
        for path in _adapters(request).values():
            check_adapter_files(path)
        retain = None if request.retain == SELF else read_rows(str(request.retain))
        held_out = None if request.held_out is None else read_rows(request.held_out)
        rows = Rows.of(read_rows(str(request.forget)), retain, held_out)
        values = {**values, "output": str(directory)}
        resolved = resolve(values, rows, has_task=request.task_adapter is not None)
        return cls(resolved, rows, directory, all_steps(resolved.recipe))

    def hashes(self) -> dict[str, str]:
        """Step -> hash of all that its output depends on, the steps before it included."""
        recipe = self.recipe
        facts: dict[str, Any] = {
            "base": identify_base_files(str(recipe.model), recipe.revision) or recipe.model,
            "adapters": {name: hash_factors(find_adapter(path)) for name, path in _adapters(recipe).items()},
            "rows": [self.rows.forget, self.rows.retain, self.rows.unseen, self.rows.held_out],
            "loaded": [recipe.four_bit, recipe.max_length],
            "versions": versions(),
        }
        found: dict[str, str] = {}
        for step in self.steps:
            own = {"step": step.name, "needs": [found[name] for name in step.needs]}
            settings = {key: operator.attrgetter(key)(recipe) for key in step.settings}
            found[step.name] = hash_of({**facts, **own, "settings": settings})
        return found

    def workshop(self, kept: Sequence[str], *, show_progress_bar: bool = True) -> Workshop:
        """The job with its model loaded, its rows read by the tokenizer; ``kept`` names the steps that are done."""
        recipe = self.recipe
        base, tokenizer = load_base(
            str(recipe.model),
            four_bit=recipe.four_bit,
            revision=recipe.revision,
            device_map=recipe.device_map,
            safetensors_only=recipe.safetensors_only,
        )
        given = {_TASK: recipe.task_adapter, RETAIN_ONLY: recipe.retain_only_adapter}
        adapters = {name: path for name, path in given.items() if path is not None}
        workshop = Workshop(
            recipe,
            attach_adapters(base, adapters) if adapters else base,
            tokenizer,
            self.rows,
            self.directory,
            task=_TASK if recipe.task_adapter else None,
            retain_only=RETAIN_ONLY if recipe.retain_only_adapter else None,
            show_progress_bar=show_progress_bar,
        )
        for step in self.steps:
            workshop = step.after(workshop) if step.name in kept else workshop
        workshop.samples  # noqa: B018 - a malformed row is refused here, before anything is computed
        return workshop

    def missing(self, record: Record, hashes: Mapping[str, str]) -> list[Step]:
        """The steps whose output is not there, or was made of something else."""
        return [step for step in self.steps if not record.holds(step.name, hashes[step.name])]

    def planned(self) -> Plan | None:
        """The plan of what is to be done, if anything is. The model is loaded and a few rows run forward; nothing is
        written."""
        todo = self.missing(Record(self.directory), self.hashes())
        if not todo:
            return None
        kept = self._kept(todo)
        return Plan.of(self.workshop(kept), todo, because=self.resolved.because, kept=kept)

    def _kept(self, todo: Sequence[Step]) -> list[str]:
        return [step.name for step in self.steps if step not in todo]

    def run(self, say: Callable[[Plan | Begun | str], None], *, show_progress_bar: bool = True) -> Summary:
        """Do the steps that the output does not hold yet.

        Args:
            say: takes what tells where the job is: the plan, each step as it begins, and a last line; each has a text.
            show_progress_bar: show the plans and progress bars of the steps.
        """
        hashes = self.hashes()
        if self.missing(Record(self.directory), hashes):
            with claimed_directory(self.directory, JOB_NAME, json.dumps({"steps": {}}) + "\n"):
                self._do(hashes, say, show_progress_bar)
        return Summary.read(self.recipe, self.resolved.because, self.directory)

    def _do(
        self, hashes: Mapping[str, str], say: Callable[[Plan | Begun | str], None], show_progress_bar: bool
    ) -> None:
        """Do what is missing, while no other process writes to the output."""
        record = Record(self.directory)
        todo = self.missing(record, hashes)
        kept = self._kept(todo)
        workshop = self.workshop(kept, show_progress_bar=show_progress_bar)
        plan = Plan.of(workshop, todo, because=self.resolved.because, kept=kept)
        say(plan)
        for step in todo:
            say(Begun(plan, step, self.steps.index(step) + 1, len(self.steps)))
            record.begin(step.name)
            with plan.timed(step.name):
                workshop = performed(step, workshop)
            write_file(self.directory / RECIPE_NAME, recipe_text(self.recipe))
            record.end(step.name, hashes[step.name])
        record.keep_only([step.name for step in self.steps])
        say(f"done in {clock(sum(plan.took.values()))}")


def all_steps(recipe: Recipe) -> list[Step]:
    """Every step of a recipe, in order; all build on the rows to keep, where the model writes these."""
    first = own_rows_step(recipe)
    others = [*steps_of(recipe), *judge_steps()]
    return [*first, *(replace(step, needs=(*(own.name for own in first), *step.needs)) for step in others)]


def recipe_text(recipe: Recipe) -> str:
    """The file of a recipe."""
    return f"# Everything that this job was made of: `peft-perta run {RECIPE_NAME}` makes it again.\n{recipe.to_yaml()}"


def _adapters(recipe: Recipe) -> dict[str, str]:
    given = {name: getattr(recipe, name) for name in ("task_adapter", "retain_only_adapter", "forget_adapter")}
    return {name: path for name, path in given.items() if path is not None}
