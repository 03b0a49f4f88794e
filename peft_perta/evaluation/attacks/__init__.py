"""Attacks that try to recover what was unlearned, one file each.

Every attack is run in the same way on the unlearned, the full and the retain-only model, and measured on the forget
rows. An attack succeeds as far as it recovers more from the unlearned model than from the retain-only model.

To add an attack: a file with its ``ATTACK``, a row in ``ATTACKS``, a row in tests/tables.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import AdapterError, ConfigError, DataError, UnsupportedLayerError
from . import depth, logit_lens, paraphrase, prefix, relearning, requantization, sampling, switched_off
from .attack import Attack, AttackResult, AttackSettings, Victims, check_victims
from .formatting import format_attacks

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        relearning.ATTACK,
        requantization.ATTACK,
        paraphrase.ATTACK,
        prefix.ATTACK,
        sampling.ATTACK,
        logit_lens.ATTACK,
        depth.ATTACK,
        switched_off.ATTACK,
    )
}


def run_attacks(
    victims: Victims, names: Sequence[str] | None = None, settings: AttackSettings | None = None
) -> list[AttackResult]:
    """Run attacks one after the other. The models are left as they were.

    Args:
        victims: the models, and the forget rows.
        names: keys of ``ATTACKS``; None for all, of which those that cannot be applied to these models or rows are
            skipped.
        settings: how hard each attack tries; None for the defaults.

    Returns:
        The results, one for each setting of each attack; one that says why for each attack that was skipped.

    Raises:
        ConfigError: a name is unknown, or an attack needs a model or a setting that is missing.
        AdapterError: a model lacks an adapter that should be on, or has one that a named attack does not support.
        DataError: there are no rows, one is malformed, or a named attack needs a key that no row has.
        UnsupportedLayerError: a model has a layer that a named attack does not support.
        NumericalError: a loss or a weight is not finite. All other errors are raised before any compute, but for blocks
            whose states turn out to be of another form than one for each token.
    """
    settings = settings or AttackSettings()
    chosen = list(ATTACKS) if names is None else list(names)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown or not chosen or isinstance(names, str):
        raise ConfigError(f"attacks: expected some of {list(ATTACKS)}, found {names!r}")
    if names is None:
        check_victims(victims, settings)
    results: dict[str, list[AttackResult]] = {}

    def tried(name: str, part: Callable[[Victims, AttackSettings], Any]) -> Any:
        """A part of the attack; None if it cannot be applied, and none was asked for by name."""
        try:
            return part(victims, settings)
        except (AdapterError, DataError, UnsupportedLayerError) as error:
            if names is not None:
                raise
            results[name] = [AttackResult(name, "", {}, None, None, skipped=str(error))]

    for name in chosen:
        tried(name, ATTACKS[name].check)
    for name in chosen:
        if name not in results and (found := tried(name, ATTACKS[name].run)) is not None:
            results[name] = found
    return [result for name in chosen for result in results[name]]


__all__ = ["ATTACKS", "Attack", "AttackResult", "AttackSettings", "Victims", "format_attacks", "run_attacks"]
