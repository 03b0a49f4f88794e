"""From a weighting's name to weights: find the weighting, apply it, check what it returned."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError, NumericalError
from .weightings import WEIGHTINGS, Weighting


def resolve_weighting(name: str, power: float | None = None) -> Weighting:
    """The weighting of this name, at this power.

    Args:
        name: a name of ``WEIGHTINGS``, or 'package.module:attribute' for your own: a ``Weighting``, or a plain function
            of (forget magnitudes, retain magnitudes).
        power: the exponent tau; None for the weighting's own.

    Raises:
        ConfigError: there is no such weighting, or your own cannot be imported.
    """
    if ":" in name:
        weighting = _imported(name)
    elif name in WEIGHTINGS:
        weighting = WEIGHTINGS[name]
    else:
        raise ConfigError(
            f"weighting: expected one of {sorted(WEIGHTINGS)} or 'package.module:attribute', found {name!r}"
        )
    return weighting if power is None else dataclasses.replace(weighting, power=float(power))


def weigh(
    weighting: Weighting, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The weights of each arranged tensor, checked: same shape, finite, in [0, 1].

    Args:
        weighting: the weighting.
        forget: name -> magnitudes on the forget set.
        retain: name -> magnitudes on the retain set.
        where: the layer, for the error message.

    Raises:
        ConfigError: a user's own function does not take two tensors.
        NumericalError: a user's own function returned something other than weights.
    """
    weights = {}
    for name in forget:
        assert weighting.function is not None
        try:
            weights[name] = weighting.function(forget[name], retain[name], weighting.power)
        except TypeError as error:
            raise ConfigError(
                f"the weighting {weighting.name!r} cannot be called with two tensors of magnitudes: {error}; expected "
                "a function of (forget, retain)"
            ) from error
        _check_weights(weights[name], forget[name], weighting.name, where)
    return weights


def _check_weights(weights: Any, magnitudes: Tensor, name: str, where: str) -> None:
    if not isinstance(weights, Tensor):
        raise NumericalError(
            f"{where}: the weighting {name!r} must return a tensor of weights, found a {type(weights).__name__}"
        )
    low, high = (float(bound) for bound in weights.aminmax()) if weights.numel() else (0.0, 0.0)
    if weights.shape != magnitudes.shape or not 0 <= low <= high <= 1:  # a NaN fails this too
        raise NumericalError(
            f"{where}: the weighting {name!r} must return weights in [0, 1] of shape {tuple(magnitudes.shape)}, found "
            f"shape {tuple(weights.shape)} in [{low:.3g}, {high:.3g}]"
        )


def _imported(name: str) -> Weighting:
    module_name, _, attribute = name.partition(":")
    try:
        imported: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"weighting {name!r} cannot be imported: {error}; expected 'package.module:attribute'"
        ) from error
    if isinstance(imported, Weighting):
        return imported
    if not callable(imported):
        raise ConfigError(f"weighting {name!r} is a {type(imported).__name__}; expected a Weighting or a function")
    function: Any = imported
    return Weighting(name, lambda forget, retain, power: function(forget, retain), "mean")
