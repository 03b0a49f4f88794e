"""One layer, from both sets' statistics to factors: weights, edit, directions, fit."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..adapters import Factors, LayerProvenance, Product, WeightDistribution, factorize
from ..errors import NumericalError
from ..gradients import Collector, Collectors, GradientSums, InputMoments, Limits
from ..model import Target
from ._input_directions import weigh_input_directions
from .config import PerTAConfig
from .fits import FITS
from .fits.fit import Fit
from .granularities import GRANULARITIES, Granularity
from .weightings import weigh
from .weightings.weighting import Weighting


def edit_layer(
    target: Target,
    config: PerTAConfig,
    weighting: Weighting,
    pair: dict[str, GradientSums],
    rank: int | float,
    dense: dict[str, Tensor] | None = None,
) -> tuple[Factors, LayerProvenance]:
    """Statistics -> weights -> edit -> factors of one layer, on the host, and what was done.

    ``pair`` holds the 'forget' and the 'retain' statistic, or nothing where the weighting needs none; it is used up.
    The edit before it is fitted goes into ``dense`` [O, I], on the host, if it is given.
    """
    granularity, strength = GRANULARITIES[config.granularity], float(config.strength)
    left: dict[str, float] = {}
    if weighting.statistic is None:
        weights = granularity.uniform(target)
        edit = granularity.edit(target, weights, strength)
        distributions = {key: WeightDistribution.of(value) for key, value in weights.items()}
        fitted = factorize(edit, rank)
    else:
        fit = _fit_of(config, target)
        measured = {
            name: found.only(fit.collector.shapes(target) if fit.collector else ()) for name, found in pair.items()
        }
        moments = [pair[name].moments() for name in ("forget", "retain")]
        forget, retain = (_magnitudes(granularity, pair.pop(name), target) for name in ("forget", "retain"))
        weights = weigh(weighting, forget, retain, target.name)
        del forget, retain
        edit = granularity.edit(target, {k: w.to(target.A.dtype) for k, w in weights.items()}, strength)
        distributions = {key: WeightDistribution.of(value) for key, value in weights.items()}
        del weights
        if config.input_directions is not False and target.parameter is None:
            edit, left = weigh_input_directions(edit, *moments)
        del moments
        fitted = fit.fit(edit, rank, measured)
    if dense is not None:
        dense[target.name] = (edit.B @ edit.A if isinstance(edit, Product) else edit).cpu()
    if not (bool(torch.isfinite(fitted.A).all()) and bool(torch.isfinite(fitted.B).all())):
        raise NumericalError(f"{target.name}: the edit's factors are not finite; train the forget adapter less")
    layer = LayerProvenance(
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
    return dataclasses.replace(fitted, A=fitted.A.cpu(), B=fitted.B.cpu()), layer


def collector_of(config: PerTAConfig) -> Collector:
    """What a run of this config reads of each layer."""
    collectors: list[Collector] = [GRANULARITIES[config.granularity]]
    if config.input_directions is not False:
        collectors.append(InputMoments())
    of_fit = FITS[config.fit].collector if config.fit else None  # the default one's is among the others
    return Collectors(collectors if of_fit is None else [*collectors, of_fit])


def _fit_of(config: PerTAConfig, target: Target) -> Fit:
    weighs_directions = config.input_directions is not False and target.parameter is None
    return FITS[config.fit or ("second-moment" if weighs_directions else "truncated")]


def _magnitudes(granularity: Granularity, statistic: GradientSums, target: Target) -> dict[str, Tensor]:
    own = statistic.only(granularity.shapes(target))
    return granularity.arrange({key: found.to(target.A.device) for key, found in own.magnitudes().items()})


def edit_copies(config: PerTAConfig) -> int:
    """How many copies of a layer's sums its edit needs, beyond the three that every edit does."""
    return 0 if config.input_directions is False and config.fit in (None, "truncated") else 7


def limits_of(config: PerTAConfig) -> Limits:
    """What the config lets a run take."""
    return Limits(config.batch_size, config.max_memory, config.host_memory)
