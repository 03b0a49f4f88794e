"""The unlearning adapter is switched off: what anyone who holds the parts of the stack can do.

It gives back the model before unlearning, whatever the edit; a merged copy in full precision is the remedy.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import ConfigError
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import measured


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        ConfigError: there is no full model: the unlearned one with its unlearning adapter off.
    """
    check_victims(victims, settings)
    unlearned, full = victims.unlearned, victims.full
    if full is None:
        raise ConfigError(
            "the switched-off attack: expected the full model, the stack without its unlearning adapter, found None; "
            "give it, or leave the attack out"
        )
    named = full.adapters is not None and unlearned.adapters is not None
    if full.model is unlearned.model and not (named and set(full.adapters) < set(unlearned.adapters)):  # type: ignore
        raise ConfigError(
            "the switched-off attack: expected the full model to have some of the unlearned one's adapters off, found "
            f"{full.adapters} of {unlearned.adapters}"
        )


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Numbers]:
        return {"on": measured(subject, rows, settings, name)}

    (on,) = compare("switched-off", victims, measure)
    # The others have no such adapter: to them nothing is done.
    return [on, replace(on, setting="off", unlearned=on.full)] if on.full is not None else [on]


ATTACK = Attack(
    "switched-off", "Switch the edit off, which anyone can who holds base and adapter as separate files.", check, run
)
