"""All layers' edits: plan the gradients, take them, edit each layer as soon as its sums are complete."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing

from torch import nn
from tqdm.auto import tqdm

from ..adapters import Factors, LayerProvenance
from ..data import Sample, read_as
from ..gradients import Checkpoint, Job, Limits, StatisticName, choose_plan, delete_sums, gather
from ..model import Target, distributed
from ._description import Run
from .config import PerTAConfig
from .layer import LayerEdit, collector_of, edit_copies, edit_layer

_PREFIX = "layers-"  # of checkpoint entries that hold finished layers
_FIGURES = ("energy", "energy_kept", "excess_error", "metric_error")  # of the factors


def gradient_job(
    config: PerTAConfig,
    statistic: StatisticName,
    model: nn.Module,
    targets: Sequence[Target],
    samples: Mapping[str, list[Sample]],
) -> Job:
    """The gradient sums that a run of this config needs.

    Args:
        config: the settings.
        statistic: what its weighting sums of the gradients.
        model: the model.
        targets: the layers that the forget adapter edits.
        samples: 'forget' and 'retain' -> samples.
    """
    return Job(
        model=model,
        targets=targets,
        samples=samples,
        collector=collector_of(config),
        statistic=statistic,
        limits=Limits(config.batch_size, config.max_memory, config.host_memory),
        edit_copies=edit_copies(config),
    )


def edit(run: Run) -> dict[str, LayerEdit]:
    """Layer name -> its edit, in the order of the targets.

    A layer's sums are freed as soon as it is edited. With a checkpoint, layers that an earlier run finished are loaded;
    their dense edits are gone.
    """
    keep_dense = bool(run.config.fit_kl_samples and "retain" in run.samples)

    def edited(target: Target, sums: dict) -> LayerEdit:
        return edit_layer(target, run.config, run.weighting, sums, run.ranks.fit, keep_dense=keep_dense)

    if run.weighting.statistic is None:
        with run.timed("weights and factors"):
            return {target.name: edited(target, {}) for target in run.targets}
    edits = _load_edits(run)
    if len(edits) < len(run.targets):
        job = dataclasses.replace(
            gradient_job(run.config, run.weighting.statistic, run.model, run.targets, run.samples),
            adapters=run.gradient_adapters,
            checkpoint=run.checkpoint,
            show_progress_bar=run.show_progress_bar,
        )
        with run.timed("planning"):
            plan = choose_plan(job)
        if run.show_progress_bar and distributed.is_main():
            resumed = f"\n      {len(edits)} layers are done already, by an earlier run" if edits else ""
            tqdm.write(f"{plan}{resumed}", file=sys.stderr)
        groups = gather(job.without(edits), plan)
        with closing(groups), run.timed("gradients, weights and factors"):
            for group, sums in groups:
                for target in group:
                    of_layer = {set_name: per_layer.pop(target.name) for set_name, per_layer in sums.items()}
                    edits[target.name] = edited(target, of_layer)
                if run.checkpoint is not None:
                    with distributed.failing_together():
                        _save_edits(run.checkpoint, [target.name for target in group], edits)
    return {target.name: edits[target.name] for target in run.targets}


def _save_edits(checkpoint: Checkpoint, names: list[str], edits: dict[str, LayerEdit]) -> None:
    """Keep the layers of a group that has just been finished; ``edits`` holds all that are finished."""
    tensors, record = {}, {}
    for name in names:
        factors = edits[name].factors
        tensors |= {(name, "A"): factors.A, (name, "B"): factors.B}
        record[name] = {
            "factors": {figure: getattr(factors, figure) for figure in _FIGURES},
            "provenance": dataclasses.asdict(edits[name].provenance),
        }
    checkpoint.save(f"{_PREFIX}{len(edits):06d}", tensors, record)
    delete_sums(checkpoint)


def _load_edits(run: Run) -> dict[str, LayerEdit]:
    """The layers that an earlier run finished. Only the main process reads the files."""
    edits: dict[str, LayerEdit] = {}
    with distributed.failing_together():
        if run.checkpoint is not None and distributed.is_main():
            for entry in run.checkpoint.names():
                if entry.startswith(_PREFIX):
                    edits |= _read_edits(run.checkpoint, entry)
    return distributed.from_main({t.name: edits[t.name] for t in run.targets if t.name in edits})


def _read_edits(checkpoint: Checkpoint, entry: str) -> dict[str, LayerEdit]:
    loaded = checkpoint.load(entry)
    assert loaded is not None  # names() has just listed it
    tensors, record = loaded
    return {
        name: LayerEdit(
            Factors(tensors[name, "A"], tensors[name, "B"], **of_layer["factors"]),
            read_as(LayerProvenance, of_layer["provenance"]),
        )
        for name, of_layer in record.items()
    }
