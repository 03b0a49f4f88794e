"""Attempts to get back what was unlearned: one file each, one row each in ``ATTACKS``.

Every attack is tried on the unlearned model, on the full one and on the retain-only one alike, and measured on the
forget rows: an attack succeeds as far as it brings more out of the unlearned model than out of one that never knew.

To add one: a file with an ``ATTACK`` (``check`` refuses, ``run`` gives results), a row here.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError
from . import paraphrase, prefix, relearning, requantization, sampling, switched_off
from .attack import Attack, AttackResult, AttackSettings, Victims
from .formatting import format_attacks

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        relearning.ATTACK,
        requantization.ATTACK,
        paraphrase.ATTACK,
        prefix.ATTACK,
        sampling.ATTACK,
        switched_off.ATTACK,
    )
}


def run_attacks(
    victims: Victims, names: Sequence[str] | None = None, settings: AttackSettings | None = None
) -> list[AttackResult]:
    """The attacks of these names (None: all), one after the other; the models go back as they came.

    Raises:
        ConfigError: there is no attack of a name, or one cannot be tried on what is there.
        AdapterError: a model lacks an adapter that is to be on, or has one that an attack cannot work with.
        DataError: there are no rows, one is malformed, or an attack needs what none has.
        UnsupportedLayerError: a model has a layer that an attack cannot work with.
        NumericalError: a loss or a weight is not finite; all others are raised before any compute.
    """
    settings = settings or AttackSettings()
    chosen = list(ATTACKS) if names is None else list(names)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown or not chosen or isinstance(names, str):
        raise ConfigError(f"attacks: expected some of {list(ATTACKS)}, found {names!r}")
    for name in chosen:
        ATTACKS[name].check(victims, settings)
    return [result for name in chosen for result in ATTACKS[name].run(victims, settings)]


__all__ = ["ATTACKS", "Attack", "AttackResult", "AttackSettings", "Victims", "format_attacks", "run_attacks"]
