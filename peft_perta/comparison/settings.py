"""What is compared, on what, and how closely."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation import ATTACKS
from .methods import METHODS, QUICK, check_methods

MEASURES = {"loss": "forget loss", "first-choice": "share of tokens that are not the first choice"}  # of forgetting


SELECTION = ("methods", "seeds", "authors")  # which runs there are; what one gives does not depend on them


# Switched off, every method's adapter leaves the full model, whatever the method.
TRIED = tuple(name for name in ATTACKS if name != "switched-off")


@dataclass(frozen=True)
class ComparisonSettings:
    """A run is one method on one seed's forget adapter, of one number of forget authors.

    Attributes:
        assets: directory of a model and its rows, as ``examples/demo_model/build.py`` leaves it; None for the shipped
            one.
        methods: names from ``METHODS``.
        seeds: of the forget adapter, and of what methods draw.
        authors: how many of the forget authors must go, counted from the last (as TOFU's forget01 ends forget10).
        rank, epochs, learning_rate, batch_size: of the forget adapter.
        least_steps: epochs are added until it has trained for as many updates: few authors make short epochs.
        matched: what is brought to the retain-only model's: the mean ``loss`` of the forget rows, or the share of their tokens
            that are no longer the model's ``first-choice``. A few very unlikely tokens can make a mean; they make no
            share.
        weight_samples: of the retain set, that may give gradients; the judged rows are others.
        judged_rows: at most so many of each split are read for losses, and attacked.
        suite_rows: at most so many of each split are read for all other metrics.
        max_new_tokens: of each answer.
        curve: multiples of the matched strength at which losses are read as well.
        attacks: names from ``ATTACKS``, tried at matched forgetting.
        four_bit: quantise the base to NF4.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    assets: str | None = None
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    seeds: tuple[int, ...] = (0, 1, 2)
    authors: tuple[int, ...] = (1, 2, 5)
    rank: int = 16
    epochs: int = 12
    least_steps: int = 120
    learning_rate: float = 2e-3
    batch_size: int = 10
    matched: str = "loss"
    weight_samples: int = 100
    judged_rows: int = 100
    suite_rows: int = 40
    max_new_tokens: int = 96
    curve: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    attacks: tuple[str, ...] = ("relearning",)
    four_bit: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "authors", "curve", "attacks"):
            value = getattr(self, name)
            _check(isinstance(value, (list, tuple)), name, "a list", value)
            object.__setattr__(self, name, tuple(value))
            _check(len(set(map(repr, value))) == len(value), name, "each value once", value)
            _check(len(value) > 0 or name == "attacks", name, "at least one value", value)
        _check(self.assets is None or isinstance(self.assets, str), "assets", "nothing, or a path", self.assets)
        _check(all(isinstance(name, str) for name in self.methods), "methods", "names", self.methods)
        check_methods(self.methods)
        _check(self.matched in MEASURES, "matched", f"one of {list(MEASURES)}", self.matched)
        _check(all(name in TRIED for name in self.attacks), "attacks", f"some of {list(TRIED)}", self.attacks)
        _check(all(_is_int(s) and 0 <= s < 2**32 for s in self.seeds), "seeds", "ints from 0 to 2**32 - 1", self.seeds)
        _check(all(_is_int(n) and n > 0 for n in self.authors), "authors", "ints > 0", self.authors)
        _check(all(_is_number(f) and f > 0 for f in self.curve), "curve", "numbers > 0", self.curve)
        for name in ("rank", "epochs", "least_steps", "batch_size", "weight_samples", "judged_rows", "suite_rows",
                     "max_new_tokens"):  # fmt: skip
            value = getattr(self, name)
            _check(_is_int(value) and value > 0, name, "an int > 0", value)
        _check(_is_number(self.learning_rate) and self.learning_rate > 0, "learning_rate", "a number > 0",
               self.learning_rate)  # fmt: skip
        _check(isinstance(self.four_bit, bool), "four_bit", "true or false", self.four_bit)

    @classmethod
    def quick(cls) -> ComparisonSettings:
        """One seed, one forget set, the main methods, few rows, no attack: minutes on two cores."""
        return cls(
            methods=QUICK, seeds=(0,), authors=(5,), judged_rows=50, suite_rows=12,
            curve=(0.5, 1.0, 1.5), attacks=(),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonSettings:
        """Raises ConfigError on a key that is no setting, as on a bad value."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(names)))
        if unknown:
            raise ConfigError(f"a comparison has no setting {unknown[0]!r}; expected some of {names}")
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> ComparisonSettings:
        """From a JSON object; what it leaves out has its default.

        Raises:
            ConfigError: the file is missing, is no JSON object, or holds a bad value.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"expected the settings of a comparison at {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON ({error}); expected an object of settings") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object of settings")
        return cls.from_dict(values)


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
