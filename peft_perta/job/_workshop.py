"""What every step of a job works with: the model with its adapters, the rows, the settings and the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import Sample, check_disjoint, load_samples, spread
from ..errors import DataError
from ..evaluation import Subject, losses_of
from ..html_report import ReportHeader
from ..model import attach_adapters, base_name, remove_adapter, row_length, snapshot, switch_modules
from .recipe import RECIPE_NAME, Recipe

ADAPTER = "adapter"  # directory: the result
RETAIN_ONLY = "retain-only"


@dataclass(frozen=True)
class Rows:
    """The rows of a job.

    Attributes:
        forget: the rows that must go.
        retain: the retain rows that the method may use.
        unseen: the retain rows that judge, which no method sees.
        are_written: False where the full model is yet to write the rows to keep; the forget rows then stand for them,
            to plan by.
        held_out: the retain rows that training is evaluated on; None for some of those that it sees.
    """

    forget: list[dict]
    retain: list[dict]
    unseen: list[dict]
    are_written: bool = True
    held_out: list[dict] | None = None

    @classmethod
    def of(cls, forget: Sequence[dict], retain: Sequence[dict] | None, held_out: list[dict] | None = None) -> Rows:
        """Every second retain row judges, as in `peft-perta compare`; None stands for rows yet to be written.

        Raises:
            DataError: there are too few retain rows.
        """
        if retain is None:
            return cls(*[list(forget)] * 3, are_written=False, held_out=held_out)
        if len(retain) < 2:
            raise DataError(
                f"the retain set: expected at least 2 rows, one for the method and one to judge by, found {len(retain)}"
            )
        return cls(list(forget), list(retain[::2]), list(retain[1::2]), held_out=held_out)


@dataclass(frozen=True, eq=False)
class Workshop:
    """One job, with its model loaded.

    Attributes:
        recipe: every setting, resolved.
        model: the base, with the task adapter and the retain-only adapter on it where they are given.
        tokenizer: the model's.
        rows: the rows.
        directory: the output.
        task: the name of the task adapter; None without one.
        retain_only: the name of the retain-only adapter; None without one.
        show_progress_bar: show the plans and progress bars of the steps.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    rows: Rows
    directory: Path
    task: str | None = None
    retain_only: str | None = None
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        self.restore  # noqa: B018 - taken before anything is attached

    @cached_property
    def restore(self) -> Callable[[], None]:
        """Puts the model's attributes, flags and hooks back to what they were at the beginning."""
        return snapshot(self.model)

    @property
    def full(self) -> list[str]:
        """The adapters of the full model."""
        return [self.task] if self.task else []

    @property
    def yardstick(self) -> list[str] | None:
        """The adapters of the model that forgetting is matched to: the retain-only model, else the origin; None where
        the origin itself must forget."""
        if self.retain_only:
            return [self.retain_only]
        return [] if self.task else None

    @property
    def yardstick_name(self) -> str:
        """What the yardstick is called."""
        return f"{RETAIN_ONLY} model" if self.retain_only else "base"

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """'forget', 'retain' (the method's), 'unseen' and, where there are some, 'held_out' -> samples.

        Raises:
            DataError: a row is malformed, or in two sets.
        """
        length = row_length(self.model, self.recipe.max_length)
        names = {"forget": "the forget set", "retain": "the retain set", "unseen": "the retain rows that judge"}
        names |= {"held_out": "the held-out set"} if self.rows.held_out is not None else {}
        samples = {
            name: load_samples(getattr(self.rows, name), self.tokenizer, max_length=length, name=text)
            for name, text in names.items()
        }
        for name in ("retain", "unseen") if self.rows.are_written else ():
            check_disjoint(samples["forget"], samples[name])
        if "held_out" in samples:
            for name in ("forget", "retain", "unseen") if self.rows.are_written else ("forget",):
                check_disjoint(samples[name], samples["held_out"], names["held_out"], names[name])
        return samples

    @property
    def judged(self) -> dict[str, list[Sample]]:
        """'forget' and 'retain' -> the samples that the strength is judged by."""
        sets = {"forget": "forget", "retain": "unseen"}
        return {name: spread(self.samples[of], self.recipe.judging.rows) for name, of in sets.items()}

    @property
    def model_name(self) -> str:
        """The base's name, for people."""
        return self.recipe.model or base_name(self.model) or "the model"

    def header(self) -> ReportHeader:
        """What the pages are about."""
        adapter = str(self.directory / ADAPTER)
        task = self.recipe.task_adapter or self.task
        command = f"peft-perta run {self.directory / RECIPE_NAME}"
        return ReportHeader(
            "What was forgotten, and at what cost", self.model_name, [*([task] if task else []), adapter], [command]
        )

    def losses(self, adapters: Sequence[str]) -> dict[str, float]:
        """'forget' and 'retain' -> mean loss of the judged samples, nats per token."""
        batch_size = self.recipe.judging.batch_size
        return {
            name: float(losses_of(self.model, samples, adapters=adapters, batch_size=batch_size).double().mean())
            for name, samples in self.judged.items()
        }

    def subject(self, adapters: Sequence[str]) -> Subject:
        """The model with these adapters on, to be judged."""
        judging = self.recipe.judging
        return Subject(
            self.model, self.tokenizer, adapters, judging.batch_size, self.recipe.max_length, self.show_progress_bar
        )

    @contextmanager
    def attached(self, adapters: Mapping[str, str | Path]) -> Iterator[Any]:
        """The model with further adapters on it, within the block: name -> directory."""
        model = attach_adapters(self.model, adapters)
        try:
            yield model
        finally:
            for name in adapters:
                self.detach(model, name)

    def detach(self, model: Any, name: str) -> None:
        """Take an adapter off the model, which is then as it was; PEFT warns where the adapter is on."""
        switch_modules(model.modules(), [given for given in (self.task, self.retain_only) if given][:1])
        remove_adapter(model, name)
        self.restore()
