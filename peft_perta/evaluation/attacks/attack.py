"""What every attack shares: the models it is run on, its settings, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from ...data import check_setting, is_count, is_int, is_number, spread
from ...errors import DataError
from ...model import require_adapter
from ..subject import Subject

Numbers = dict[str, float]  # measure -> value
RowValues = dict[str, list[float]]  # measure -> one value for each row


class Answer(NamedTuple):
    """What a model said to a row, beside what is true."""

    asked: str
    truth: str
    said: str


class Measured(NamedTuple):
    """One model, measured in one setting: values of rows, and the answers that 'rouge_l_recall' compares."""

    values: RowValues
    answers: Sequence[Answer] = ()

    @property
    def numbers(self) -> Numbers:
        """The means over rows."""
        return {measure: fmean(values) for measure, values in self.values.items()}


@dataclass(frozen=True)
class Victims:
    """The models that are attacked, and the rows.

    Attributes:
        unlearned: the model after unlearning, such as adapters ["task", "unlearn"].
        full: the model before unlearning, such as adapters ["task"]: the most that an attack can recover.
        retain_only: a model that never saw the rows: what an attack recovers without any knowledge to recover. It may
            be the same module with other adapters on.
        rows: the forget rows.
        retain: rows to keep, that an attacker can have; relearning trains on them, a conversation shows some.
        unrelated: rows that have nothing to do with either, that relearning trains on.
        never_seen: rows of the forget rows' kind that no model saw; an audit asks whether the two can be told apart.
        measured: the results of the same attacks on another unlearned model. What they hold of the full and the
            retain-only model, which must be the same, is not measured again.
    """

    unlearned: Subject
    full: Subject | None
    retain_only: Subject | None
    rows: list[dict]
    retain: Sequence[dict] = ()
    unrelated: Sequence[dict] = ()
    never_seen: Sequence[dict] = ()
    measured: Sequence[AttackResult] = ()

    def subjects(self) -> Iterator[tuple[str, Subject]]:
        """(role, subject) of every model that is given."""
        yield "unlearned", self.unlearned
        yield from self.ends()

    def ends(self) -> Iterator[tuple[str, Subject]]:
        """(role, subject) of the full and the retain-only model, where they are given."""
        for role, subject in {"full": self.full, "retain-only": self.retain_only}.items():
            if subject is not None:
                yield role, subject

    def known(self, attack: str, role: str) -> dict[str, Measured]:
        """Setting -> what is known of a model from ``measured``."""
        results = [result for result in self.measured if result.attack == attack and role in result.rows]
        return {result.setting: Measured(result.rows[role]) for result in results}


@dataclass(frozen=True)
class AttackSettings:
    """How hard each attack tries.

    Attributes:
        relearning_steps: numbers of updates after which the relearning model is measured.
        relearning_rows: numbers of rows that relearning trains on; one run for each.
        learning_rate: of relearning, constant.
        prefix_shares: shares of the answer's tokens that the prefix attack gives, each in (0, 1).
        samples: answers per row that the sampling attack draws; the best counts.
        temperature: of these samples.
        rows: the most forget rows, taken at even distances; None for all.
        generated: the most rows that are answered, in every attack that generates.
        max_new_tokens: the most tokens of an answer.
        seed: draws the rows of relearning, its fresh adapter, and the samples.

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
            counts = getattr(self, name)
            check_setting(_all(counts, is_count), name, "one or more ints of at least 1", counts)
        shares = self.prefix_shares
        check_setting(_all(shares, _is_share), "prefix_shares", "one or more numbers in (0, 1)", shares)
        for name in ("samples", "generated", "max_new_tokens"):
            check_setting(is_count(getattr(self, name)), name, "an int of at least 1", getattr(self, name))
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            check_setting(is_number(value) and value > 0, name, "a number above 0", value)
        check_setting(self.rows is None or is_count(self.rows), "rows", "an int of at least 1, or None", self.rows)
        check_setting(is_int(self.seed) and self.seed >= 0, "seed", "an int of at least 0", self.seed)


@dataclass(frozen=True)
class AttackResult:
    """One attack in one setting, measured on the forget rows.

    Each model's numbers are measure -> value: 'loss' (nats per token), 'probability' (mean of exp(-loss)),
    'rouge_l_recall' (of generated answers), 'uds' (the unlearning depth score).

    Attributes:
        attack: its key in ``ATTACKS``.
        setting: what was done, in words.
        unlearned: the numbers of the unlearned model.
        full: those of the full model; None where it was not given.
        retain_only: those of the retain-only model; None where it was not given.
        skipped: why the attack cannot be applied to these models or rows; it then has no numbers.
        rows: role of a model -> measure -> the values of the rows, whose means are the numbers.
        answers: the unlearned model's, one for each value of 'rouge_l_recall'.
    """

    attack: str
    setting: str
    unlearned: Numbers
    full: Numbers | None
    retain_only: Numbers | None
    skipped: str | None = None
    rows: Mapping[str, RowValues] = field(default_factory=dict)
    answers: Sequence[Answer] = ()

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without those of single rows, as JSON takes them."""
        return {name: value for name, value in asdict(self).items() if name not in ("rows", "answers")}


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
    """The forget rows, at most ``settings.rows`` of them, taken at even distances."""
    return list(victims.rows) if settings.rows is None else spread(list(victims.rows), settings.rows)


def check_victims(victims: Victims, settings: AttackSettings) -> None:
    """The check that every attack begins with.

    Raises:
        AdapterError: a model lacks an adapter that should be on.
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
    attack: str, victims: Victims, measure: Callable[[Subject, str], Mapping[str, Measured]]
) -> list[AttackResult]:
    """Measure every model in the same way; one result for each setting.

    Args:
        attack: the attack's name.
        victims: the models.
        measure: (subject, its name on progress bars) -> setting -> what was measured.
    """
    found = {"unlearned": measure(victims.unlearned, f"{attack}, unlearned")}
    for role, subject in victims.ends():
        known = victims.known(attack, role)
        found[role] = known if found["unlearned"].keys() <= known.keys() else measure(subject, f"{attack}, {role}")
    results = []
    for setting, unlearned in found["unlearned"].items():
        by_role = {role: settings[setting] for role, settings in found.items() if setting in settings}
        numbers = {role: measured.numbers for role, measured in by_role.items()}
        results.append(
            AttackResult(
                attack, setting, numbers["unlearned"], numbers.get("full"), numbers.get("retain-only"),
                rows={role: measured.values for role, measured in by_role.items()}, answers=unlearned.answers,
            )
        )  # fmt: skip
    return results


def _all(values: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, (tuple, list)) and len(values) > 0 and all(map(holds, values))


def _is_share(value: object) -> bool:
    return is_number(value) and 0 < value < 1
