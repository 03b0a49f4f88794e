"""One influence edit, from the request to the solved change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import InfluenceProvenance, check_servable, describe_base, versions
from ..data import Sample, fingerprint, spread
from ..errors import ConfigError, DataError, NumericalError
from ..evaluation import losses_of
from ..gradients import progress
from ..model import (
    Target,
    changed_targets,
    check_base,
    distributed,
    hash_targets,
    require_adapter,
    resolve_layers,
    resolve_targets,
)
from ._changes import TrainingChange
from ._differentiable import differentiable
from ._products import AdapterProducts
from ._solvers import Solution
from ._system import solve_system
from .result import InfluenceResult
from .settings import InfluenceSettings


@dataclass(frozen=True)
class Run:
    """A request for an influence edit.

    Attributes:
        kind: the public function, as the provenance names it.
        model: carries the adapter.
        targets: the adapter's targets.
        change: the training set and its change.
        adapter_name: the adapter to edit.
        with_adapters: the adapters that are on beside it.
        settings: how to build and solve the system.
        show_progress_bar: show progress bars.
    """

    kind: str
    model: nn.Module
    targets: list[Target]
    change: TrainingChange
    adapter_name: str
    with_adapters: Sequence[str]
    settings: InfluenceSettings
    show_progress_bar: bool

    @property
    def adapters(self) -> list[str]:
        """The adapters that are on when losses are differentiated."""
        return [*self.with_adapters, self.adapter_name]

    @property
    def sets(self) -> dict[str, list[Sample]]:
        """The sets whose losses are recorded, without the empty ones."""
        sets = {"changed": self.change.changed, "unchanged": self.change.unchanged, "new": self.change.new}
        return {name: samples for name, samples in sets.items() if samples}


def check_adapters(model: nn.Module, adapter_name: str, with_adapters: Sequence[str]) -> list[Target]:
    """The targets of the adapter to edit.

    Raises:
        AdapterError, UnsupportedLayerError, NumericalError: the adapter cannot be edited.
        ConfigError: the model is sharded, the rank is above what servers accept, or an adapter is named twice.
    """
    distributed.refuse_sharded(model)
    targets = changed_targets(resolve_targets(model, adapter_name))
    rank = max(target.rank for target in targets)
    check_servable(rank, f"adapter {adapter_name!r} has rank", "train it at a smaller rank")
    for place, name in enumerate(with_adapters):
        if name in (adapter_name, *with_adapters[:place]):
            raise ConfigError(
                f"with_adapters: expected adapters other than the edited one, each named once, found {name!r} again"
            )
        require_adapter(model, name)
        check_base(model, name)
    return targets


def solve(run: Run) -> InfluenceResult:
    """Solve for the change of the adapter. The model is left as it was.

    Raises:
        DataError: the adapter was not trained on the training set.
        NumericalError: a loss or a product is not finite, or the curvature is indefinite.
        UnsupportedLayerError: the model cannot be differentiated as the curvature needs.
    """
    start = time.perf_counter()
    settings, training = run.settings, run.change.training
    with differentiable(run.model, run.adapters):
        products = AdapterProducts(run.model, run.targets, run.adapter_name, settings.factors, settings.batch_size)
        shortest = min(training, key=lambda sample: len(sample.input_ids))
        products.check(settings.curvature, shortest, settings.seed)
    losses_without = losses_of(run.model, training, adapters=run.with_adapters, batch_size=settings.batch_size)
    with differentiable(run.model, run.adapters):
        losses = {name: products.losses(samples, f"the {name} rows") for name, samples in run.sets.items()}
        _check_trained(run, losses, losses_without)
        b = _right_hand_side(run, products)
        rows = spread(training, settings.curvature_samples or len(training))
        solution, damping = solve_system(products, rows, b, settings, run.show_progress_bar)
        new_losses = {
            name: products.losses(samples, f"the {name} rows, with the edited adapter", solution.vector)
            for name, samples in run.sets.items()
        }
        changes = _changes_by_target(products.by_factor(solution.vector), run.targets)
    mean_losses = {name: [float(each[name].double().mean()) for each in (losses, new_losses)] for name in run.sets}
    provenance = _provenance(run, solution, damping, mean_losses, round(time.perf_counter() - start, 3))
    return InfluenceResult(changes, provenance, run.model, run.targets)


def _check_trained(run: Run, losses: Mapping[str, Tensor], losses_without: Tensor) -> None:
    losses_with = torch.cat([losses_of_set for name, losses_of_set in losses.items() if name != "new"])
    mean_with, mean_without = float(losses_with.double().mean()), float(losses_without.double().mean())
    if not mean_with < mean_without:
        raise DataError(
            f"the training set: expected rows that adapter {run.adapter_name!r} was trained on, so that its loss on "
            f"them is below {mean_without:.3f}, the loss without it; found {mean_with:.3f}. Give the adapter's own "
            "training rows, and in with_adapters the adapters that were on beside it"
        )


def _right_hand_side(run: Run, products: AdapterProducts) -> Tensor:
    """b = (1/n) sum over the changed rows of [gradient on the old row - gradient on the new row]: [P]."""
    change = run.change
    with progress(len(change.changed) + len(change.new), "gradients", run.show_progress_bar) as advance:
        b = products.gradient(change.changed, "the changed rows", advance)
        if change.new:
            b = b - products.gradient(change.new, "the new rows", advance)
    b = b / len(change.training)
    if not bool(b.any()):
        raise NumericalError(
            "the gradient on the changed rows is zero, so they cannot change the adapter; check the rows and the "
            "adapter"
        )
    return b


def _changes_by_target(
    parts: Mapping[tuple[int, str], Tensor], targets: Sequence[Target]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Target name -> (dA, dB); a factor that is not edited has zeros.

    Args:
        parts: (id of PEFT's wrapper, 'A' or 'B') -> the change of that factor; experts share one factor.
        targets: the adapter's targets.
    """
    changes = {}
    for target in targets:
        adapted: Any = target.adapted
        key = id(adapted)
        if target.expert is None:
            dA = parts.get((key, "A"), torch.zeros_like(target.A))
            dB = parts.get((key, "B"), torch.zeros_like(target.B))
        else:
            packed_B = parts[key, "B"]
            packed_A = parts.get((key, "A"), packed_B.new_zeros(adapted.num_experts * target.rank, target.A.shape[1]))
            dA, dB = target.kind.split(adapted, packed_A, packed_B)[target.expert]
        changes[target.name] = dA.to(target.A), dB.to(target.B)
    return changes


def _provenance(
    run: Run, solution: Solution, damping: float, losses: dict[str, list[float]], seconds: float
) -> InfluenceProvenance:
    return InfluenceProvenance(
        kind=run.kind,
        config=run.settings.to_dict(),
        base_model=describe_base(run.model),
        adapter={"name": run.adapter_name, "sha256": hash_targets(run.targets)},
        with_adapters=[
            {"name": name, "sha256": hash_targets(resolve_layers(run.model, name))} for name in run.with_adapters
        ],
        data={
            name: {"samples": len(samples), "sha256": fingerprint(samples)}
            for name, samples in (("training", run.change.training), *run.sets.items())
        },
        damping=damping,
        residual=solution.residual,
        iterations=solution.iterations,
        stopped=solution.stopped,
        losses=losses,
        versions=versions(),
        seconds={"all": seconds},
    )
