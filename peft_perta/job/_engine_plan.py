"""What the gradient engine plans for a step whose adapter is not made yet: one that is untrained stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..data import drawn
from ..gradients import Plan, choose_plan
from ..model import resolve_layers
from ..perta import gradient_job, refinement_job, resolve_weighting
from ..training import LoraSettings, with_new_adapter
from ._workshop import Workshop
from .recipe import part_of

_STAND_IN = "perta_planned"


def engine_plan(workshop: Workshop) -> Plan | None:
    """The plan of the step that takes gradients or reads inputs of the layers; None where there is no such step.

    One sample runs forward.

    Raises:
        ConfigError: the step does not fit the memory.
    """
    recipe = workshop.recipe
    statistic = None
    if recipe.unlearn is not None:
        statistic = resolve_weighting(recipe.unlearn.weighting, recipe.unlearn.power).statistic
    if recipe.refine is None and statistic is None:
        return None
    with _stand_in(workshop) as model:
        targets = resolve_layers(model, _STAND_IN)
        samples = {name: workshop.samples[name] for name in ("forget", "retain")}
        if recipe.unlearn is not None and statistic is not None:
            config = recipe.unlearn
            few = {name: drawn(of_set, config.max_samples, config.seed) for name, of_set in samples.items()}
            return choose_plan(gradient_job(config, statistic, model, targets, few))
        assert recipe.refine is not None
        layers = [target for target in targets if target.parameter is None]
        return choose_plan(refinement_job(model, layers, samples, workshop.task, recipe.refine))


@contextmanager
def _stand_in(workshop: Workshop) -> Iterator[Any]:
    """The model with an adapter of the size that the step will find."""
    recipe = workshop.recipe
    if recipe.forget_adapter is not None:
        with workshop.attached({_STAND_IN: recipe.forget_adapter}) as model:
            yield model
        return
    settings = recipe.train or recipe.forget_training
    with torch.random.fork_rng():
        config = LoraSettings(**part_of(settings, LoraSettings)).to_lora_config()
        model = with_new_adapter(workshop.model, config, _STAND_IN)
    try:
        yield model
    finally:
        workshop.detach(model, _STAND_IN)
