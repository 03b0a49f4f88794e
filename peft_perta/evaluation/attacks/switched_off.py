"""Switched-off attack: turn the negative adapter off, which anyone can who holds base and adapters as separate files.

It gives back the full model, whatever the edit. The remedy is to ship a copy that was merged in full precision.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import AdapterError, ConfigError
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import measured


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        ConfigError: no full model is given.
        AdapterError: it is not the unlearned one with its negative adapter off.
    """
    check_victims(victims, settings)
    unlearned, full = victims.unlearned, victims.full
    if full is None:
        raise ConfigError(
            "the switched-off attack: expected the full model, the stack without its negative adapter, found None; "
            "give it, or leave the attack out"
        )
    named = full.adapters is not None and unlearned.adapters is not None
    if full.model is unlearned.model and not (named and set(full.adapters) < set(unlearned.adapters)):  # type: ignore
        raise AdapterError(
            "the switched-off attack: expected the full model to have fewer adapters on than the unlearned one, found "
            f"{full.adapters} of {unlearned.adapters}"
        )


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """Every model as it is, and the unlearned one with its negative adapter off."""
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        return {"on": measured(subject, rows, settings, name)}

    (on,) = compare("switched-off", victims, measure)
    # The full and the retain-only model have no negative adapter, so that their numbers stay.
    if on.full is None:
        return [on]
    return [
        on,
        replace(on, setting="off", unlearned=on.full, rows={**on.rows, "unlearned": on.rows["full"]}, answers=()),
    ]


ATTACK = Attack(
    "switched-off", "Switch the edit off, which anyone can who holds base and adapter as separate files.", check, run
)
