"""Statistics -> weights in [0, 1]: one row a weighting in ``WEIGHTINGS``.

To add one to the package: a function in a file here and a row below. To use your own without touching the package,
name it in the config as 'package.module:attribute', a ``Weighting`` or a plain function of (forget, retain) magnitudes.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from torch import Tensor

from ...errors import ConfigError, NumericalError
from .controls import at_own_mean, shuffled
from .ratio import ratio
from .weighting import Weighting

_UNIFORM = Weighting("uniform", None, None)


_RATIOS = (
    Weighting("grad", ratio, "mean", power=1.0),
    Weighting("fisher", ratio, "mean", power=2.0),  # the square of the mean gradient
    Weighting("empirical-fisher", ratio, "squares", power=2.0),  # the mean of the squared per-sample gradients
)


WEIGHTINGS: dict[str, Weighting] = {
    weighting.name: weighting for weighting in (_UNIFORM, *_RATIOS, *map(shuffled, _RATIOS), *map(at_own_mean, _RATIOS))
}


def resolve_weighting(name: str, power: float | None = None) -> Weighting:
    """The weighting of that name, at that power.

    Raises:
        ConfigError: no such weighting; the module or attribute of a user's own cannot be imported.
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


def weigh(weighting: Weighting, forget: dict[str, Tensor], retain: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of each arranged tensor, checked: the same shape, finite, in [0, 1].

    Raises:
        NumericalError: a (user's) weighting broke that promise.
    """
    weights = {}
    for key in forget:
        assert weighting.function is not None
        try:
            weights[key] = weighting.function(forget[key], retain[key], weighting.power)
        except TypeError as error:
            raise ConfigError(
                f"the weighting {weighting.name!r} cannot be called with two tensors of magnitudes: {error}"
            ) from error
        if not isinstance(weights[key], Tensor):
            raise NumericalError(
                f"{where}: the weighting {weighting.name!r} must return a tensor of weights, found a "
                f"{type(weights[key]).__name__}"
            )
        low, high = (float(bound) for bound in weights[key].aminmax()) if weights[key].numel() else (0.0, 0.0)
        if weights[key].shape != forget[key].shape or not 0 <= low <= high <= 1:  # which NaN is not, either
            raise NumericalError(
                f"{where}: the weighting {weighting.name!r} must return weights in [0, 1] of shape "
                f"{tuple(forget[key].shape)}, found shape {tuple(weights[key].shape)} in [{low:.3g}, {high:.3g}]"
            )
    return weights


def _imported(name: str) -> Weighting:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"weighting {name!r} cannot be imported: {error}; expected 'package.module:attribute'"
        ) from error
    if isinstance(found, Weighting):
        return found
    if not callable(found):
        raise ConfigError(f"weighting {name!r} is a {type(found).__name__}; expected a Weighting or a function")
    function: Any = found
    return Weighting(name, lambda forget, retain, power: function(forget, retain), "mean")


__all__ = ["WEIGHTINGS", "Weighting", "resolve_weighting", "weigh"]
