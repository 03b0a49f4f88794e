"""One job: from rows that must go to an adapter with its evidence, step by step, each kept once it is done."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import versions
from ..data import check_output, claimed_directory, read_rows, write_file
from ..errors import ConfigError
from ..model import attach_adapters, check_adapter_files, find_adapter, hash_factors, identify_base_files, load_base
from ._judge import JUDGED, VERIFIED, judge, verify
from ._plan import Plan, clock
from ._record import JOB_NAME, Record, hash_of
from ._resolution import Resolved, resolve
from ._steps import Step, steps_of
from ._summary import Summary
from ._workshop import RETAIN_ONLY, Rows, Workshop
from .recipe import RECIPE_NAME, Recipe, recipe_of

_TASK = "task"
OUTPUT = "forgotten"  # the directory, where none is named


@dataclass(frozen=True)
class Job:
    """A job that is checked as far as that is possible without its model.

    Attributes:
        resolved: the recipe with every setting, and the method.
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
            ConfigError: the recipe is bad, or lacks the model or the rows.
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
        rows = Rows.of(read_rows(str(request.forget)), read_rows(str(request.retain)))
        values = {**values, "output": str(directory)}
        resolved = resolve(values, rows, has_task=request.task_adapter is not None)
        judging = ("judging", "target_forget_loss", "retain_tolerance")
        steps = [
            *steps_of(resolved.recipe),
            Step(JUDGED, "judge and attack the result", judging, judge),
            Step(VERIFIED, "check the adapter's files, and load it in a fresh process", (), verify),
        ]
        return cls(resolved, rows, directory, steps)

    def hashes(self) -> dict[str, str]:
        """Step -> hash of all that its output depends on, the steps before it included."""
        recipe = self.recipe
        facts: dict[str, Any] = {
            "base": identify_base_files(str(recipe.model), recipe.revision) or recipe.model,
            "adapters": {name: hash_factors(find_adapter(path)) for name, path in _adapters(recipe).items()},
            "rows": [self.rows.forget, self.rows.retain, self.rows.unseen],
            "model": [recipe.four_bit, recipe.max_length],
            "versions": versions(),
        }
        values = json.loads(json.dumps(dataclasses.asdict(recipe)))
        found, before = {}, hash_of(facts)
        for step in self.steps:
            before = hash_of({"after": before, "step": step.name, **{key: values[key] for key in step.settings}})
            found[step.name] = before
        return found

    def workshop(self, *, show_progress_bar: bool = True) -> Workshop:
        """The job with its model loaded, its rows read by the tokenizer."""
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
            self.resolved.method,
            attach_adapters(base, adapters) if adapters else base,
            tokenizer,
            self.rows,
            self.directory,
            task=_TASK if recipe.task_adapter else None,
            retain_only=RETAIN_ONLY if recipe.retain_only_adapter else None,
            show_progress_bar=show_progress_bar,
        )
        workshop.judged  # noqa: B018 - a malformed row is refused here, before anything is computed
        return workshop

    def run(self, say: Callable[[str], None], *, show_progress_bar: bool = True) -> Summary:
        """Do the steps that the output does not hold yet.

        Args:
            say: takes each line that tells where the job is.
            show_progress_bar: show the plans and progress bars of the steps.
        """
        hashes, record = self.hashes(), Record(self.directory)
        missing = [step for step in self.steps if not record.holds(step.name, hashes[step.name])]
        began = time.perf_counter()
        with claimed_directory(self.directory, JOB_NAME, json.dumps({"steps": {}}) + "\n"):
            if missing:
                first = self.steps.index(missing[0])
                kept, todo = self.steps[:first], self.steps[first:]
                workshop = self.workshop(show_progress_bar=show_progress_bar)
                plan = Plan.of(workshop, todo)
                say(plan.text(self.resolved.because, [step.name for step in kept]))
                write_file(self.directory / RECIPE_NAME, recipe_text(self.recipe))
                record.keep_only([step.name for step in self.steps])
                for number, step in enumerate(todo, start=first + 1):
                    say(f"step {number} of {len(self.steps)}: {step.what}{plan.left(step.name)}")
                    record.begin(step.name)
                    with plan.timed(step.name):
                        step.run(workshop)
                    record.end(step.name, hashes[step.name])
                say(f"done in {clock(time.perf_counter() - began)}")
        return Summary.read(self.recipe, self.resolved.because, self.directory)


def recipe_text(recipe: Recipe) -> str:
    """The file of a recipe."""
    return f"# Everything that this job was made of: `peft-perta run {RECIPE_NAME}` makes it again.\n{recipe.to_yaml()}"


def _adapters(recipe: Recipe) -> dict[str, str]:
    given = {name: getattr(recipe, name) for name in ("task_adapter", "retain_only_adapter", "forget_adapter")}
    return {name: path for name, path in given.items() if path is not None}
