"""Sweeps over groups of layers: all samples forward, and back to the group's lowest layer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ...data import Sample, batches
from ...model import Target, base_model, distributed, input_device, preserved, sample_losses
from .._taps import Taps
from ..gradient_sums import GradientSums, Place, StatisticName
from ..input_moments import Collector
from ..job import Job, SetSums, check_losses, progress


def sweep(
    model: nn.Module,
    targets: Sequence[Target],
    samples: list[Sample],
    collector: Collector,
    statistic: StatisticName,
    *,
    adapters: Sequence[str],
    batch_size: int,
    name: str,
    place: Place = "device",
    show_progress_bar: bool = True,
) -> dict[str, GradientSums]:
    """One pass over the samples: target name -> its statistic.

    The loss is ``losses.sample_losses``, summed over samples. Gradients are taken in eval mode at the model with
    ``adapters`` on; the model goes back as it came. Several processes share the batches and get the same sums.

    Raises:
        NumericalError: a sample's loss, or a layer's statistic, is not finite.
    """
    device = input_device(model)
    with preserved(model, adapters, checkpointing=True), Taps(targets, collector, statistic, place) as taps:
        handles = []
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            # Reentrant checkpointing passes gradients only to segments whose input requires one.
            embeddings = base_model(model).get_input_embeddings()  # type: ignore[operator]
            handles.append(embeddings.register_forward_hook(_require_gradient))
        try:
            with (
                distributed.failing_together(),
                torch.enable_grad(),
                _whole_recomputations(model),
                progress(len(samples), f"gradients on {name}", show_progress_bar) as advance,
            ):
                for batch in distributed.share(list(batches(samples, batch_size))):
                    taps.batch_samples = len(batch.indices)
                    losses = sample_losses(model, batch.to(device))
                    check_losses(losses, batch, name)
                    losses.sum().backward()
                    advance(len(batch.indices))
        finally:
            for handle in handles:
                handle.remove()
    taps.add_up()
    taps.check(len(samples), name)
    return taps.statistics


def run(job: Job, sets: dict[str, list[Sample]]) -> Generator[tuple[list[Target], SetSums], None, None]:
    """The groups of the plan that are not done yet, from the top; each with both sets' statistics."""
    for number, names in enumerate(job.plan.groups, start=1):
        group = [job.targets[name] for name in names if name not in job.done]
        if not group:
            continue
        found: SetSums = {}
        for name, samples in sets.items():
            known = job.load_statistics(group, name)
            if known is None:
                count = f", group {number} of {len(job.plan.groups)}" if len(job.plan.groups) > 1 else ""
                known = sweep(
                    job.model,
                    group,
                    samples,
                    job.collector,
                    job.statistic,
                    adapters=job.adapters,
                    batch_size=job.plan.micro_batch,
                    name=f"the {name} set{count}",
                    place=job.plan.statistics,
                    show_progress_bar=job.show_progress_bar,
                )
                if name != list(sets)[-1]:
                    job.save_statistics(group, name, known)
            found[name] = known
        yield group, found


def _whole_recomputations(model: nn.Module) -> AbstractContextManager:
    """A recomputation that stops early, as checkpointing's do, would leave an offloaded weight where it computed."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return set_checkpoint_early_stop(False) if offloaded else nullcontext()


def _require_gradient(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)
