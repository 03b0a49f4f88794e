"""From the layers' edits to the emitted adapter: allocate ranks, build, measure the fit, find the strength."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..adapters import (
    EmittedAdapter,
    Factors,
    LayerProvenance,
    PerTAProvenance,
    build_adapter,
    describe_base,
    servable_rank,
    torch_dtype,
    versions,
)
from ..evaluation import calibrate, check_start, losses_of
from ..model import distributed, hash_targets, remove_adapter
from ._description import Run
from ._fit_kl import measure_fit_kl
from ._rank_allocation import allocate
from .layer import LayerEdit


def emit(run: Run, edits: Mapping[str, LayerEdit]) -> EmittedAdapter:
    """The adapter of these edits, at the config's strength.

    Args:
        run: the run.
        edits: layer name -> its edit, for every target.

    Raises:
        ConfigError: the edits need a larger rank than servers take.
        NumericalError: a factor is not finite in the adapter's dtype.
    """
    factors = {name: of_layer.factors for name, of_layer in edits.items()}
    layers = [of_layer.provenance for of_layer in edits.values()]
    if run.ranks.budget is not None:
        factors = allocate(factors, run.ranks.budget)
        layers = [_at_new_rank(layer, factors[layer.name]) for layer in layers]
    rank = run.ranks.emitted or servable_rank(max(of_layer.rank for of_layer in factors.values()))
    patterned = run.config.allocation == "pattern"
    dtype = torch_dtype(run.config.dtype)
    lora_config, state_dict = build_adapter(run.model, factors, rank, dtype, patterned=patterned)
    provenance = PerTAProvenance(
        config=run.config.to_dict(),
        base_model=describe_base(run.model),
        forget_adapter={"name": run.forget_adapter, "sha256": hash_targets(run.targets)},
        task_adapter=run.task_adapter,
        data=run.data,
        rank=rank,
        layers=layers,
        versions=versions(),
        seconds=run.seconds,
    )
    return EmittedAdapter(lora_config, state_dict, provenance)


def with_fit_kl(run: Run, emitted: EmittedAdapter, edits: Mapping[str, LayerEdit]) -> EmittedAdapter:
    """The adapter with the KL of its fit in its provenance: 0 if its rank holds every edit exactly; unchanged if the
    config does not ask for it, or if the dense edits are gone because an earlier run made them."""
    dense = {target.base_layer: edits[target.name].dense for target in run.targets}
    if all(layer.metric_error == 0 for layer in emitted.provenance.layers):
        fit_kl = 0.0
    elif all(of_layer is not None for of_layer in dense.values()):
        with run.timed("fit_kl"), _on_model(run, emitted, "perta_fit_kl") as name:
            fit_kl = measure_fit_kl(
                run.model,
                run.samples["retain"][: run.config.fit_kl_samples],
                {layer: of_layer for layer, of_layer in dense.items() if of_layer is not None},
                name,
                with_adapters=run.full_adapters,
                batch_size=run.config.batch_size,
            )
    else:
        return emitted
    return emitted._replace(provenance=dataclasses.replace(emitted.provenance, fit_kl=fit_kl))


def check_goal(run: Run) -> None:
    """
    Raises:
        NumericalError: the full model's forget loss is above the goal, which no strength can then reach.
    """
    if run.goal is not None and run.goal.target_forget_loss is not None:
        losses = losses_of(run.model, run.samples["forget"], adapters=run.full_adapters)
        check_start(float(losses.double().mean()), run.goal.target_forget_loss)


def calibrated(run: Run, emitted: EmittedAdapter) -> EmittedAdapter:
    """The adapter at the strength that meets the run's goal; unchanged without a goal."""
    if run.goal is None:
        return emitted
    with run.timed("strength"), _on_model(run, emitted, "perta_strength_search") as name:
        calibration = calibrate(
            run.model,
            run.goal,
            run.samples["forget"],
            run.held_out,
            adapter_name=name,
            with_adapters=run.full_adapters,
            negated_adapter=run.forget_adapter,
            show_progress_bar=run.show_progress_bar and distributed.is_main(),
        )
    return emitted.scaled(calibration.strength).with_calibration(calibration)


def _at_new_rank(layer: LayerProvenance, factors: Factors) -> LayerProvenance:
    """A layer's provenance after its factors were cut."""
    return dataclasses.replace(
        layer, rank=factors.rank, energy_kept=factors.energy_kept, metric_error=factors.metric_error
    )


@contextmanager
def _on_model(run: Run, emitted: EmittedAdapter, name: str) -> Iterator[str]:
    """Within the context, the adapter is on the model under this name."""
    emitted.add_to(run.model, name)
    try:
        yield name
    finally:
        remove_adapter(run.model, name)
