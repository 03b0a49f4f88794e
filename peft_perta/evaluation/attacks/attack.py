"""What every attack is: the models that it is tried on, how hard, and what it brought out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...data import spread
from ...errors import ConfigError, DataError
from ...model import require_adapter
from ..subject import Subject

Numbers = dict[str, float]


@dataclass(frozen=True)
class Victims:
    """Who is attacked, and on which rows.

    Attributes:
        unlearned: the stack that is shipped, say ["task", "unlearn"].
        full: the same before unlearning, say ["task"]: as much as there is to bring back.
        retain-only: a model that never saw the rows: as much as the attack brings out of nothing. It may be the same
            module with other adapters on.
        rows: the forget set.
    """

    unlearned: Subject
    full: Subject | None
    retain_only: Subject | None
    rows: list[dict]

    def subjects(self) -> Iterator[tuple[str, Subject]]:
        """Role and subject of each that is there."""
        models = {"unlearned": self.unlearned, "full": self.full, "retain-only": self.retain_only}
        for role, subject in models.items():
            if subject is not None:
                yield role, subject


@dataclass(frozen=True)
class AttackSettings:
    """How hard each attack tries.

    Attributes:
        relearning_steps: numbers of updates after which the model is read.
        relearning_rows: how many rows it is trained on; a run for each.
        learning_rate: of relearning, constant.
        prefix_shares: of the answer's tokens that are given, each in (0, 1).
        samples: generations a row, of which the best counts.
        temperature: of those.
        rows: at most so many of the forget set, at even distances; None for all.
        generated: at most so many of these are answered, wherever there are generations.
        max_new_tokens: of each generation.
        seed: of the rows that are relearned, of the fresh adapter, and of what is sampled.

    Raises:
        ConfigError: a value is out of its range.
    """

    relearning_steps: tuple[int, ...] = (1, 4, 16)
    relearning_rows: tuple[int, ...] = (1, 10)
    learning_rate: float = 1e-3
    prefix_shares: tuple[float, ...] = (0.25, 0.5)
    samples: int = 8
    temperature: float = 1.0
    rows: int | None = None
    generated: int = 20
    max_new_tokens: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("relearning_steps", "relearning_rows"):
            _check(_all(getattr(self, name), _is_count), name, "one or more ints of at least 1", getattr(self, name))
        _check(_all(self.prefix_shares, _is_share), "prefix_shares", "one or more in (0, 1)", self.prefix_shares)
        for name in ("samples", "generated", "max_new_tokens"):
            _check(_is_count(getattr(self, name)), name, "an int of at least 1", getattr(self, name))
        for name in ("learning_rate", "temperature"):
            _check(_is_positive(getattr(self, name)), name, "a number above 0", getattr(self, name))
        _check(self.rows is None or _is_count(self.rows), "rows", "an int of at least 1, or None", self.rows)
        _check(type(self.seed) is int and self.seed >= 0, "seed", "an int of at least 0", self.seed)


@dataclass(frozen=True)
class AttackResult:
    """One attack in one setting, measured on the forget rows.

    Attributes:
        setting: what was done, in words.
        unlearned, full, reference: measure -> value: 'loss' (nats per token), 'probability' (mean exp(-loss)),
            'rouge_l_recall' (of what was generated); None where there is no such model.
    """

    attack: str
    setting: str
    unlearned: Numbers
    full: Numbers | None
    retain_only: Numbers | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Attack:
    """One attack; a row of ``ATTACKS``.

    Attributes:
        name: its key in ``ATTACKS``.
        meaning: one sentence on what the attacker does.
        check: raises every error that can be found before any compute.
        run: tries the attack and returns one result for each setting.
    """

    name: str
    meaning: str
    check: Callable[[Victims, AttackSettings], None]
    run: Callable[[Victims, AttackSettings], list[AttackResult]]


def attacked_rows(victims: Victims, settings: AttackSettings) -> list[dict]:
    """The forget rows, or as many of them as were asked for."""
    return list(victims.rows) if settings.rows is None else spread(list(victims.rows), settings.rows)


def check_victims(victims: Victims, settings: AttackSettings) -> None:
    """What every attack asks.

    Raises:
        AdapterError: a model lacks an adapter that is to be on.
        DataError: there are no rows, or one is malformed.
    """
    rows = attacked_rows(victims, settings)
    if not rows:
        raise DataError("the forget rows: expected at least one row to attack with, found none")
    for _, subject in victims.subjects():
        for name in subject.adapters or ():
            require_adapter(subject.model, name)
        subject.encode(rows, "the forget rows")


def compare(
    attack: str, victims: Victims, measure: Callable[[Subject, str], Mapping[str, Numbers]]
) -> list[AttackResult]:
    """The same done to each: (subject, its name in progress bars) -> setting -> numbers."""
    found = {role: measure(subject, f"{attack}, {role}") for role, subject in victims.subjects()}
    full, retain_only = found.get("full", {}), found.get("retain-only", {})
    return [
        AttackResult(attack, setting, numbers, full.get(setting), retain_only.get(setting))
        for setting, numbers in found["unlearned"].items()
    ]


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _all(values: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, (tuple, list)) and len(values) > 0 and all(map(holds, values))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


def _is_share(value: object) -> bool:
    return _is_positive(value) and value < 1  # type: ignore[operator]
