"""Settings of the bench, of a comparison and of the demo."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import check_setting, is_count, is_int, is_number, read_json
from ..errors import ConfigError
from ..evaluation import ATTACKS
from .methods import FIRST, METHODS, QUICK, check_methods

MEASURES = {  # of forgetting
    "loss": "forget loss",
    "first-choice": "share of tokens that are not the first choice",
    "options": "probability of false options",
}
SELECTION = (
    "methods",
    "seeds",
    "authors",
    "matched",
)  # these say which runs exist; the result of one run depends on none of them
ROWS_OF_AUTHOR = 20
SMALL = "small"  # the name of the shipped testbed


# 'switched-off' turns the adapter off, which leaves the full model whatever the method; 'depth' is ``depth_rows``.
COMPARED_ATTACKS = tuple(name for name in ATTACKS if name not in ("switched-off", "depth"))


@dataclass(frozen=True)
class BenchSettings:
    """One forget adapter on one model, and the rows that methods and judges use.

    Attributes:
        rank, epochs, learning_rate, batch_size, seed: training of the forget adapter.
        forget_rows: forget rows to train on and to judge, counted from the last; None for all.
        weight_samples: retain rows that a method may use, at most.
        judged_rows: rows of each split whose losses are measured, at most. Retain rows that a method may use are never
            judged.
    """

    rank: int = 16
    epochs: int = 12
    learning_rate: float = 2e-3
    batch_size: int = 10
    seed: int = 0
    forget_rows: int | None = None
    weight_samples: int = 100
    judged_rows: int = 100


@dataclass(frozen=True)
class DemoSettings(BenchSettings):
    """Sizes of the demo. With the defaults it takes under four minutes on two cores.

    Attributes:
        generated_rows: rows of each split that are answered by generation.
        compared_rows: rows of each split whose false answers are scored; None for all.
        max_new_tokens: maximum length of a generated answer.
        curve: multiples of the matched strength at which losses are measured.
    """

    judged_rows: int = 32
    generated_rows: int = 10
    compared_rows: int | None = None
    max_new_tokens: int = 96
    curve: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0, 1.3)

    @classmethod
    def of(cls, testbed: str, seed: int = 0) -> DemoSettings:
        """The sizes for a testbed of ``TESTBEDS``: a real model gets fewer rows and steps."""
        if testbed == SMALL:
            return cls(seed=seed)
        return cls(
            epochs=8, learning_rate=1e-3, batch_size=8, weight_samples=40, judged_rows=12, generated_rows=4,
            compared_rows=6, max_new_tokens=64, curve=(0.0, 0.5, 1.0, 1.3), seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison. One run is one method, on one seed's forget adapter, for one number of forget authors.

    Attributes:
        methods: names from ``METHODS``.
        seeds: seeds of the forget adapter's training and of everything that methods draw.
        authors: numbers of forget authors, counted from the last (TOFU's forget01 is the end of forget10); none for
            all forget rows, whoever they are about.
        rank, epochs, learning_rate, batch_size: training of the forget adapter.
        least_steps: minimum number of updates of the forget adapter; epochs are added until it is reached, since few
            authors make short epochs.
        matched: the measures of forgetting that are matched to the retain-only model's, one after the other: ``loss``
            is the mean loss of the forget rows, ``first-choice`` the share of their tokens that are no longer the
            model's first choice. A few very unlikely tokens can dominate a mean loss, but not a share. ``options`` is
            for knowledge that no other model lacks: the false answers' share of the probability of all answers, which
            is matched to chance.
        weight_samples: retain rows that a method may use, at most; other retain rows are judged.
        judged_rows: rows of each split whose losses are measured, and that are attacked, at most.
        suite_rows: rows of each split that all other metrics use, at most; 0 leaves those metrics out.
        depth_rows: forget rows for the unlearning depth score, at most; 0 leaves it out. It takes a forward pass of the
            rows for each block.
        max_new_tokens: maximum length of a generated answer.
        curve: multiples of the matched strength at which losses are measured.
        attacks: names from ``ATTACKS``, tried at matched forgetting.
        four_bit: quantise the base to NF4.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    seeds: tuple[int, ...] = (0, 1, 2)
    authors: tuple[int, ...] = (1, 2, 5)
    rank: int = 16
    epochs: int = 12
    least_steps: int = 120
    learning_rate: float = 2e-3
    batch_size: int = 10
    matched: tuple[str, ...] = ("loss",)
    weight_samples: int = 100
    judged_rows: int = 100
    suite_rows: int = 40
    depth_rows: int = 0
    max_new_tokens: int = 96
    curve: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    attacks: tuple[str, ...] = ("relearning",)
    four_bit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.matched, str):
            object.__setattr__(self, "matched", (self.matched,))
        for name in ("methods", "seeds", "authors", "matched", "curve", "attacks"):
            value = getattr(self, name)
            check_setting(isinstance(value, (list, tuple)), name, "a list", value)
            object.__setattr__(self, name, tuple(value))
            check_setting(len(set(map(repr, value))) == len(value), name, "each value once", value)
            check_setting(len(value) > 0 or name in ("authors", "curve", "attacks"), name, "at least one value", value)
        check_setting(all(isinstance(name, str) for name in self.methods), "methods", "names", self.methods)
        check_methods(self.methods)
        are_measures = all(isinstance(name, str) and name in MEASURES for name in self.matched)
        check_setting(are_measures, "matched", f"some of {list(MEASURES)}", self.matched)
        are_attacks = all(isinstance(name, str) and name in COMPARED_ATTACKS for name in self.attacks)
        check_setting(are_attacks, "attacks", f"some of {list(COMPARED_ATTACKS)}", self.attacks)
        are_seeds = all(is_int(seed) and 0 <= seed < 2**32 for seed in self.seeds)
        check_setting(are_seeds, "seeds", "ints from 0 to 2**32 - 1", self.seeds)
        check_setting(all(map(is_count, self.authors)), "authors", "ints > 0", self.authors)
        check_setting(all(is_number(f) and f > 0 for f in self.curve), "curve", "numbers > 0", self.curve)
        for name in ("rank", "epochs", "least_steps", "batch_size", "weight_samples", "judged_rows",
                     "max_new_tokens"):  # fmt: skip
            check_setting(is_count(getattr(self, name)), name, "an int > 0", getattr(self, name))
        for name in ("suite_rows", "depth_rows"):
            value = getattr(self, name)
            check_setting(is_int(value) and value >= 0, name, "an int >= 0", value)
        is_rate = is_number(self.learning_rate) and self.learning_rate > 0
        check_setting(is_rate, "learning_rate", "a number > 0", self.learning_rate)
        check_setting(isinstance(self.four_bit, bool), "four_bit", "true or false", self.four_bit)

    @classmethod
    def quick(cls) -> ComparisonSettings:
        """One seed, one forget set, the main methods, few rows, no attacks: minutes on two cores."""
        return cls(
            methods=QUICK, seeds=(0,), authors=(5,), judged_rows=50, suite_rows=12,
            curve=(0.5, 1.0, 1.5), attacks=(),
        )  # fmt: skip

    @classmethod
    def own(cls) -> ComparisonSettings:
        """For a user's own model and rows: one seed, the methods to try first, all forget rows as one set, matched in
        both measures; about an hour for a model of 135 million parameters on two cores."""
        return cls(
            methods=FIRST, seeds=(0,), authors=(), epochs=8, least_steps=40, learning_rate=1e-3, batch_size=8,
            matched=("loss", "first-choice"), weight_samples=40, judged_rows=40, suite_rows=12, curve=(0.5, 1.0, 1.5),
            attacks=(),
        )  # fmt: skip

    def bench(self, authors: int | None, available: int, seed: int) -> BenchSettings:
        """The bench of one forget set and one seed.

        Args:
            authors: the number of forget authors; None for all rows.
            available: the number of forget rows that there are.
            seed: of the forget adapter.
        """
        forget_rows = authors * ROWS_OF_AUTHOR if authors else available
        steps_of_epoch = math.ceil(forget_rows / self.batch_size)
        return BenchSettings(
            rank=self.rank,
            epochs=max(self.epochs, math.ceil(self.least_steps / steps_of_epoch)),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=seed,
            forget_rows=forget_rows,
            weight_samples=self.weight_samples,
            judged_rows=self.judged_rows,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonSettings:
        """The settings from JSON values; a missing key takes its default.

        Raises:
            ConfigError: a key is not a setting, or a value is bad.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(names)))
        if unknown:
            raise ConfigError(f"a comparison has no setting {unknown[0]!r}; expected some of {names}")
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> ComparisonSettings:
        """The settings from a JSON file; a missing key takes its default.

        Raises:
            ConfigError: the file is missing, is not a JSON object, or holds a bad value.
        """
        try:
            values = read_json(path)
        except OSError as error:
            raise ConfigError(f"expected the settings of a comparison at {path}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); expected an object of settings") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object of settings")
        return cls.from_dict(values)
