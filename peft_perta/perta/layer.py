"""One layer: from both sets' gradient sums to factors, by way of weights, edit, input directions and fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Edit, Factors, LayerProvenance, Product, WeightDistribution, factorize
from ..errors import NumericalError
from ..gradients import Collector, GradientSums, InputMoments
from ..model import Target
from ._input_directions import COPIES, weigh_input_directions
from .config import PerTAConfig
from .fits import FITS, Fit
from .granularities import GRANULARITIES
from .weighing import weigh
from .weightings import Weighting


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """One layer's edit, on the host.

    Attributes:
        factors: the edit at the adapter's rank.
        provenance: how it was made.
        dense: the edit before it was fitted, [O, I], if it was asked for.
    """

    factors: Factors
    provenance: LayerProvenance
    dense: Tensor | None = None


def edit_layer(
    target: Target,
    config: PerTAConfig,
    weighting: Weighting,
    sums: dict[str, GradientSums],
    rank: int | float,
    *,
    keep_dense: bool = False,
) -> LayerEdit:
    """Edit one layer.

    Args:
        target: the layer.
        config: the settings; ``strength`` must be a number.
        weighting: the config's weighting, resolved.
        sums: 'forget' and 'retain' -> the layer's sums, of what ``collector_of`` asks for. Empty for a weighting
            without gradients. They are removed from the mapping, so that their memory can be freed on the way.
        rank: the rank of the fit (int), or the share of the edit's energy to keep (float).
        keep_dense: keep the edit before it is fitted, too.

    Raises:
        NumericalError: a weight or a factor is not finite.
    """
    left: dict[str, float] = {}
    if weighting.statistic is None:
        weights = GRANULARITIES[config.granularity].uniform(target)
        edit = GRANULARITIES[config.granularity].edit(target, weights, float(config.strength))
        distributions = {name: WeightDistribution.of(of_name) for name, of_name in weights.items()}
        fitted = factorize(edit, rank)
    else:
        fit = _fit_of(config, target)
        of_fit, moments = _kept_beside(sums, fit, target)
        edit, distributions = _weighted_edit(target, config, weighting, sums)
        if _weighs_directions(config, target):
            edit, left = weigh_input_directions(edit, moments["forget"], moments["retain"])
        del moments
        fitted = fit.fit(edit, rank, of_fit)
    dense = (edit.B @ edit.A if isinstance(edit, Product) else edit).cpu() if keep_dense else None
    if not (bool(torch.isfinite(fitted.A).all()) and bool(torch.isfinite(fitted.B).all())):
        raise NumericalError(
            f"{target.name}: expected finite factors of the edit, found NaN or infinity; train the forget adapter for "
            "fewer steps"
        )
    provenance = LayerProvenance(
        name=target.name,
        kind=target.kind.name,
        shape=[len(target.B), target.A.shape[1]],
        rank=fitted.rank,
        edit_norm=fitted.energy**0.5,
        energy_kept=fitted.energy_kept,
        excess_error=fitted.excess_error,
        metric_error=fitted.metric_error,
        weights=distributions,
        left_on_inputs=left,
    )
    return LayerEdit(dataclasses.replace(fitted, A=fitted.A.cpu(), B=fitted.B.cpu()), provenance, dense)


def collector_of(config: PerTAConfig) -> Collector:
    """What a run of this config sums of each layer."""
    collector = Collector(gradients=(GRANULARITIES[config.granularity],))
    if config.input_directions is not False:
        collector += Collector(moments=(InputMoments(),))
    return collector + _chosen_fit(config).collector


def edit_copies(config: PerTAConfig) -> int:
    """How many more copies of a layer's sums its edit needs, beyond the three that every edit needs."""
    of_directions = COPIES if config.input_directions is not False else 0
    return max(of_directions, _chosen_fit(config).copies)


def _chosen_fit(config: PerTAConfig) -> Fit:
    """The config's fit; by default the one that shares the moments of input directions, if these are weighed."""
    return FITS[config.fit or ("truncated" if config.input_directions is False else "second-moment")]


def _fit_of(config: PerTAConfig, target: Target) -> Fit:
    """The fit of one layer. An expert's parameter has no input moments, so its default is truncation."""
    return FITS["truncated"] if config.fit is None and target.parameter is not None else _chosen_fit(config)


def _weighs_directions(config: PerTAConfig, target: Target) -> bool:
    return config.input_directions is not False and target.parameter is None


def _kept_beside(
    sums: Mapping[str, GradientSums], fit: Fit, target: Target
) -> tuple[dict[str, GradientSums], dict[str, dict[str, Tensor]]]:
    """What outlives the magnitudes: the sums that the fit needs, and the moments, by set."""
    gradients, moments = fit.collector.gradient_shapes(target), fit.collector.moment_shapes(target)
    of_fit = {set_name: of_set.only(gradients, moments) for set_name, of_set in sums.items()}
    return of_fit, {set_name: of_set.moments for set_name, of_set in sums.items()}


def _weighted_edit(
    target: Target, config: PerTAConfig, weighting: Weighting, sums: dict[str, GradientSums]
) -> tuple[Edit, dict[str, WeightDistribution]]:
    """The edit, and how its weights are distributed. Every tensor is freed as soon as the next one is made of it."""
    granularity = GRANULARITIES[config.granularity]

    def magnitudes(set_name: str) -> dict[str, Tensor]:
        own = sums.pop(set_name).only(granularity.shapes(target))
        return granularity.arrange({name: m.to(target.A.device) for name, m in own.magnitudes().items()})

    forget, retain = magnitudes("forget"), magnitudes("retain")
    weights = weigh(weighting, forget, retain, target.name)
    del forget, retain
    edit = granularity.edit(target, {name: w.to(target.A.dtype) for name, w in weights.items()}, float(config.strength))
    return edit, {name: WeightDistribution.of(w) for name, w in weights.items()}
