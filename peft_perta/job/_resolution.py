"""A request becomes a recipe with every setting in it: the method is chosen, and its settings fill what is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..comparison import training_schedule
from ..errors import ConfigError
from ..training import check_reporter
from ._workshop import Rows
from .recipe import Recipe, recipe_of
from .recommendation import AUTO, Known, method_of, recommend


@dataclass(frozen=True)
class Resolved:
    """A recipe in which nothing is left open.

    Attributes:
        recipe: the recipe.
        because: why it was chosen, in words.
    """

    recipe: Recipe
    because: str


def resolve(values: Mapping[str, Any], rows: Rows, *, has_task: bool) -> Resolved:
    """Choose the method, and fill in its settings.

    Args:
        values: the recipe as the user gave it, key by key.
        rows: the rows of the job.
        has_task: a task adapter taught the base what must go.

    Raises:
        ConfigError: a value is bad, or the recipe has a section or an adapter that its method does not use.
    """
    request = recipe_of(values)
    name, because = request.method, "named in the recipe"
    if name == AUTO:
        known = Known(request.prefer, not has_task, request.forget_adapter is not None)
        row = recommend(known)
        name, because = row.method, row.because
    method = method_of(name)
    shared = {"max_length": request.max_length}
    own: dict[str, dict[str, Any]] = {}
    if method.step == "train":
        schedule = training_schedule(method, len(rows.forget))
        own["train"] = {**schedule, "epochs": max(schedule["epochs"], 1.0), **method.options}
    else:
        own["unlearn"] = {**shared, "seed": request.seed, **method.options}
        if request.forget_adapter is None:
            own["forget_training"] = {}
    if method.is_refined:
        own["refine"] = shared
    _check_used(values, own, name, request)
    sections = {section: {**settings, **(values.get(section) or {})} for section, settings in own.items()}
    return Resolved(recipe_of({**values, "method": name, **sections}), because)


def _check_used(values: Mapping[str, Any], own: Mapping[str, Any], method: str, request: Recipe) -> None:
    """
    Raises:
        ConfigError: the recipe names what the method does not use, or a report whose package is missing.
    """
    for section in ("forget_training", "unlearn", "train", "refine"):
        if values.get(section) is not None and section not in own:
            raise ConfigError(
                f"{section}: expected none with the method {method}, which has no such step; leave it out, or name "
                "another method"
            )
    if request.held_out is not None and "train" not in own:
        raise ConfigError(
            f"held_out: expected none with the method {method}, whose step is not evaluated on the way; leave it out, "
            "or name a method that trains, such as sago+directions"
        )
    if request.report_to is not None:
        if not {"train", "forget_training"} & set(own):
            raise ConfigError(
                f"report_to: expected none with the method {method} on a forget adapter, as nothing is trained; leave "
                "it out"
            )
        check_reporter(request.report_to)
    if request.forget_adapter is not None and "unlearn" not in own:
        raise ConfigError(
            f"forget_adapter: expected none with the method {method}, which trains an adapter of its own; leave it "
            "out, or name a method that edits it, such as perta-grad"
        )
