"""A recipe to start from: every setting of a job, with its value and what it does."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from .recipe import SECTIONS, Request
from .run import Job

_COMMANDS = {
    "forget_training": "the forget adapter, as `peft-perta forget` trains it",
    "unlearn": "the edit of the forget adapter, as `peft-perta unlearn` makes it (PerTAConfig)",
    "train": "the training, as `peft-perta train` does it",
    "refine": "the refinement, as `peft-perta refine` does it",
    "judging": "how the strength is judged, and how hard the result is attacked",
}


def starting_recipe(job: Job) -> str:
    """The commented file of a job's recipe, with the settings of the method that was chosen for it."""
    recipe = job.recipe
    lines = [
        f"# The method {recipe.method} was chosen ({job.resolved.because}).",
        "# A line that is left out takes its default; `peft-perta run THIS_FILE` does the job.",
        *_fields(recipe, Request, ""),
    ]
    for section in SECTIONS:
        settings = getattr(recipe, section)
        if settings is not None:
            lines += ["", f"{section}:  # {_COMMANDS[section]}", *_fields(settings, SECTIONS[section], "  ")]
    return "\n".join(lines) + "\n"


def _fields(settings: Any, kind: type, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        text = " ".join([field.metadata["help"].rstrip("."), *([f"(one of {', '.join(choices)})"] if choices else [])])
        yield from ("", *textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "))
        value = getattr(settings, field.name)
        plain = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump({field.name: plain}, allow_unicode=True, width=1000)
        yield textwrap.indent(dumped.rstrip("\n"), indent)
