"""What a job came to, in ten lines that a person understands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import EXPORTS, PROVENANCE_NAME
from ..data import read_json
from ..evaluation import TOLERANCE
from ..html_report import AUDIT_PAGE_NAME
from ..model import WEIGHTS_NAME, show_size
from ..training import reports_beside
from ._judge import JUDGED, REPORT_NAME, VERIFIED
from ._steps import BEFORE, FORGET_ADAPTER, TRAINED, target_of
from ._workshop import ADAPTER
from .recipe import RECIPE_NAME, STANDS_FOR, Recipe

_VERDICT = "verdict"
_MARKS = {True: "goal met", False: "goal NOT met"}


@dataclass(frozen=True)
class Summary:
    """The figures of a finished job.

    Attributes:
        recipe: what was done.
        because: why its method was chosen.
        directory: where everything is.
        before: losses of the full model and of the yardstick.
        judged: what was measured afterwards.
        checks: of the adapter's files: name, passed and found.
    """

    recipe: Recipe
    because: str
    directory: Path
    before: Mapping[str, Any]
    judged: Mapping[str, Any]
    checks: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, recipe: Recipe, because: str, directory: Path) -> Summary:
        """The summary of a directory whose job is done."""
        return cls(recipe, because, directory, *(read_json(directory / name) for name in (BEFORE, JUDGED, VERIFIED)))

    @property
    def target(self) -> float | None:
        """The forget loss to reach, nats per token; None where the retain tolerance alone was the goal."""
        return target_of(self.recipe, dict(self.before))

    @property
    def cost(self) -> float:
        """How far the loss on the judging retain rows rose, nats per token."""
        return self.judged["after"]["retain"] - self.before["full"]["retain"]

    @property
    def missed(self) -> dict[str, str]:
        """Part of the goal -> why it was not met."""
        parts = {}
        after, before = self.judged["after"]["forget"], self.before["full"]["forget"]
        if self.target is not None and after < self.target * (1 - TOLERANCE):
            parts["forgotten"] = f"the forget loss is {after:.3f}, expected {self.target:.3f}"
        elif self.target is None and after <= before:
            parts["forgotten"] = f"the forget loss is {after:.3f}, no more than before"
        if self.cost > self.recipe.retain_tolerance:
            tolerance = self.recipe.retain_tolerance
            parts["kept"] = f"the loss on retain rows rose by {self.cost:.3f}, expected at most {tolerance:g}"
        failed = [check for check in self.checks if check["passed"] is False]
        if failed:
            parts["checked"] = f"{failed[0]['name']}: {failed[0]['found']}"
        return parts

    @property
    def lines(self) -> dict[str, str]:
        """What is told -> its words, ten lines and the verdict."""
        missed = "; ".join(f"{part}: {why}" for part, why in self.missed.items())
        return {
            "forgotten": self._forgotten(),
            "kept": self._kept(),
            "answers": self._answers(),
            "recoverable": self._recoverable(),
            "always": "whoever can switch the adapter off has the knowledge back: the base's weights still hold it"
            if not self.recipe.task_adapter
            else "whoever can switch the adapter off has the knowledge back",
            "method": f"{self.recipe.method} ({self.because})",
            "adapter": self._adapter(),
            "read": self._read(),
            "serve": self._serve(),
            "again": f"peft-perta run {shlex.quote(str(self.directory / RECIPE_NAME))}",
            _VERDICT: f"The goal was NOT met. {missed}." if missed else "The goal was met.",
        }

    def __str__(self) -> str:
        return as_text(self.lines)

    def _forgotten(self) -> str:
        before, after = self.before["full"]["forget"], self.judged["after"]["forget"]
        text = f"loss on the forget rows {before:.2f} -> {after:.2f} nats per token"
        if self.target is None:
            return f"{text}; no model shows how far to go"
        whose = "asked for" if self.recipe.target_forget_loss is not None else self._yardstick()
        return f"{text} ({whose}: {self.target:.2f}): {_MARKS['forgotten' not in self.missed]}"

    def _yardstick(self) -> str:
        return "the retain-only model" if self.recipe.retain_only_adapter else "the base, which never learned them"

    def _kept(self) -> str:
        before, after = self.before["full"]["retain"], self.judged["after"]["retain"]
        rows = "retain rows that no method saw"
        if self.recipe.retain in STANDS_FOR:
            rows = f"{STANDS_FOR[self.recipe.retain]}: rows that no method saw"
        return (
            f"loss on {rows} {before:.2f} -> {after:.2f}, a rise of {self.cost:.3f} (tolerance "
            f"{self.recipe.retain_tolerance:g}): {_MARKS['kept' not in self.missed]}"
        )

    def _answers(self) -> str:
        models, changes = self.judged["models"], []
        for name in ("forget", "retain"):
            before, after, *never = (f"{of_model[f'{name}_Q_A_Prob']:.1%}" for of_model in models.values())
            changes.append(f"{name} rows {before} -> {after}" + (f" (retain-only model: {never[0]})" if never else ""))
        return f"probability of the true answers: {', '.join(changes)}"

    def _recoverable(self) -> str:
        found = self.judged["audit"]
        return found["because"] if found else f"not attacked: {self.judged['not audited']}"

    def _adapter(self) -> str:
        path = self.directory / ADAPTER
        size = show_size((path / WEIGHTS_NAME).stat().st_size)
        failed = sum(check["passed"] is False for check in self.checks)
        checked = f"{failed} of {len(self.checks)} checks FAILED" if failed else f"{len(self.checks)} checks passed"
        found = self.judged["calibration"]
        strength = f"{found['strength']:.3g} times as strong as" if found else "as"
        return f"{path} ({size}, rank {self.judged['rank']}, {strength} it was made; {checked})"

    def _read(self) -> str:
        pages = [REPORT_NAME, *([AUDIT_PAGE_NAME] if self.judged["audit"] else []), f"{ADAPTER}/{PROVENANCE_NAME}"]
        reports = [reports_beside(name) for name in (FORGET_ADAPTER, TRAINED)]  # of tensorboard
        pages += [report for report in reports if (self.directory / report).is_dir()]
        return ", ".join(str(self.directory / page) for page in pages)

    def _serve(self) -> str:
        adapters = [self.recipe.task_adapter, str(self.directory / ADAPTER)]
        quoted = " ".join(shlex.quote(path) for path in adapters if path)
        in_peft = "both adapters on" if self.recipe.task_adapter else "the adapter on"
        command = f"peft-perta export {quoted} --base {shlex.quote(self.recipe.model or 'MODEL')} --output served"
        return f"PEFT: {in_peft}; elsewhere: {command} --to FORMAT ({', '.join(EXPORTS)})"


def as_text(lines: Mapping[str, str]) -> str:
    """The lines of a summary under each other, the verdict last and by itself."""
    named = (f"{name:<13}{text}" for name, text in lines.items() if name != _VERDICT)
    return "\n".join([*named, lines[_VERDICT]])
