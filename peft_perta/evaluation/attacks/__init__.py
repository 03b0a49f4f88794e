"""Attacks that try to recover what was unlearned, one file each.

Every attack is run in the same way on the unlearned, the full and the retain-only model, and measured on the forget
rows. An attack succeeds as far as it recovers more from the unlearned model than from the retain-only model.

To add an attack: a file with its ``ATTACK``, a row in ``ATTACKS``, a row in tests/tables.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import AdapterError, ConfigError, DataError, UnsupportedLayerError
from . import (
    aliases,
    conversation,
    depth,
    full_rank,
    hops,
    logit_lens,
    paraphrase,
    prefix,
    relearning,
    requantization,
    rewording,
    sampling,
    switched_off,
)
from .attack import Attack, AttackResult, AttackSettings, Victims, check_victims
from .formatting import format_attacks

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        relearning.ATTACK,
        full_rank.ATTACK,
        requantization.ATTACK,
        paraphrase.ATTACK,
        rewording.ATTACK,
        aliases.ATTACK,
        hops.ATTACK,
        conversation.ATTACK,
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
    results = check_attacks(victims, names, settings)
    for name in _chosen(names):
        if name not in results:
            try:
                results[name] = ATTACKS[name].run(victims, settings)
            except CANNOT_BE_APPLIED as error:
                if names is not None:
                    raise
                results[name] = [skipped_result(name, error)]
    return [result for name in _chosen(names) for result in results[name]]


def check_attacks(
    victims: Victims, names: Sequence[str] | None = None, settings: AttackSettings | None = None
) -> dict[str, list[AttackResult]]:
    """Check that attacks can be applied, before any compute.

    Args:
        victims: the models, and the forget rows.
        names: as of ``run_attacks``.
        settings: as of ``run_attacks``.

    Returns:
        Name -> the result that says why it is skipped, for each attack that was not asked for by name and cannot be
        applied.

    Raises:
        ConfigError, AdapterError, DataError, UnsupportedLayerError: as ``run_attacks`` does.
    """
    settings = settings or AttackSettings()
    chosen = _chosen(names)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown or not chosen or isinstance(names, str):
        raise ConfigError(f"attacks: expected some of {list(ATTACKS)}, found {names!r}")
    if names is None:
        check_victims(victims, settings)
    skipped = {}
    for name in chosen:
        try:
            ATTACKS[name].check(victims, settings)
        except CANNOT_BE_APPLIED as error:
            if names is not None:
                raise
            skipped[name] = [skipped_result(name, error)]
    return skipped


CANNOT_BE_APPLIED = (AdapterError, DataError, UnsupportedLayerError)


def _chosen(names: Sequence[str] | None) -> list[str]:
    return list(ATTACKS) if names is None else list(names)


def skipped_result(name: str, error: Exception) -> AttackResult:
    """The result of an attack that cannot be made."""
    return AttackResult(name, "", {}, None, None, skipped=str(error))


__all__ = [
    "ATTACKS",
    "CANNOT_BE_APPLIED",
    "Attack",
    "AttackResult",
    "AttackSettings",
    "Victims",
    "check_attacks",
    "format_attacks",
    "run_attacks",
    "skipped_result",
]
