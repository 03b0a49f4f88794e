"""``PerTAConfig``: every setting of a run, once, with its help, its range and its check."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import DTYPES, SERVABLE_RANKS
from ..data import check_setting, explained, is_count, is_int, is_number, read_json, setting
from ..errors import ConfigError
from ..model import parse_size
from ._rank_allocation import ALLOCATIONS
from .fits import FITS
from .granularities import GRANULARITIES
from .weightings import WEIGHTINGS

CONFIG_NAME = "perta_config.json"
GRADIENTS_AT = ("origin", "full")


def _setting(
    default: Any,
    text: str,
    expected: str | None = None,
    valid: Callable[[Any], bool] | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of the config. ``expected`` names its range and ``valid`` checks it; by default both are the choices."""
    expected = expected or f"one of {choices}"
    sentence = "" if choices else f" Expects {expected}."
    return setting(
        default,
        text + sentence,
        choices,
        expected=expected,
        valid=valid or (lambda value: value in (choices or ())),
    )


def _or_none(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _described(table: Mapping[str, Any]) -> str:
    """The rows of a table with their descriptions; controls are left out."""
    rows = {name: row.description for name, row in table.items() if not row.description.startswith("a control")}
    return "; ".join(f"'{name}': {description}" for name, description in rows.items())


def _is_rank(value: object) -> bool:
    if isinstance(value, float):
        return 0.0 < value < 1.0
    return is_int(value) and 1 <= value <= SERVABLE_RANKS[-1]


def _is_size(value: Any) -> bool:
    try:
        return parse_size(value) > 0
    except ConfigError:
        return False


_SIZE = "None, or a size such as '10GiB', '10GB' or a number of bytes"


@explained
@dataclass
class PerTAConfig:
    """How a forget adapter becomes a negative adapter (PerTA).

    By default every element of the forget adapter's factors A [R, I] and B [O, R] gets the weight
    W = |g_f| / (|g_f| + |g_r|), from its mean gradients g_f on the forget set and g_r on the retain set. The emitted
    edit of a layer with the scaling s is -strength * s * (sqrt(W_B) (*) B) @ (sqrt(W_A) (*) A), weighted once more
    along the directions of the layer's input.

    Raises:
        ConfigError: a value has the wrong type or is out of range.

    Reference: Cai et al. 2026, "Per-parameter Task Arithmetic for Unlearning in Large Language Models", arXiv
    2601.22030.
    """

    weighting: str = _setting(
        "grad",
        f"How gradients become weights. {_described(WEIGHTINGS)}. Or your own, as 'package.module:attribute'.",
        "the name of a weighting, or 'package.module:attribute'",
        lambda value: isinstance(value, str) and bool(value),
    )
    granularity: str = _setting(
        "factor", f"What the weights multiply. {_described(GRANULARITIES)}.", choices=tuple(GRANULARITIES)
    )
    input_directions: bool | None = _setting(
        None,
        "Also weight the directions of each layer's input, by the share of the forget set in their energy; exact at "
        "any rank. By default on, except for expert parameters, whose inputs are unknown.",
        "None, True or False",
        lambda value: value is None or isinstance(value, bool),
    )
    power: float | None = _setting(
        None,
        "Exponent tau of the ratio |g_f|^tau / (|g_f|^tau + |g_r|^tau). By default the weighting's own.",
        "None, or a finite number >= 0",
        _or_none(lambda value: is_number(value) and value >= 0),
    )
    rank: int | float | None = _setting(
        None,
        "Rank of the negative adapter, or the share of the edit's energy to keep. By default the forget adapter's "
        f"rank. It is zero-padded to the next of {SERVABLE_RANKS}, which every server takes.",
        f"None, an int from 1 to {SERVABLE_RANKS[-1]}, or a float in (0, 1)",
        _or_none(_is_rank),
    )
    fit: str | None = _setting(
        None,
        f"How an edit of larger rank is reduced to the rank. {_described(FITS)}. By default 'second-moment' with input "
        "directions, whose moments it shares, else 'truncated'.",
        f"None, or one of {tuple(FITS)}",
        _or_none(lambda value: value in tuple(FITS)),
        choices=tuple(FITS),
    )
    allocation: str = _setting(
        "uniform",
        "How ranks are spread over layers. 'uniform': every layer has the rank. The others spread the same total size "
        "by marginal gain (a float rank is then a share of all layers' energy together): 'padded' zero-pads to the "
        "largest rank, which every server takes; 'pattern' writes a rank_pattern, smaller but for PEFT only.",
        choices=ALLOCATIONS,
    )
    strength: float | str = _setting(
        1.0,
        "Factor on the edit, folded into B: 0 changes nothing, more forgets more. 'auto' searches for the strength "
        "that meets target_forget_loss or, without it, retain_tolerance; a quarter of the retain set is held out for "
        "it.",
        "a finite number or 'auto'",
        lambda value: value == "auto" or is_number(value),
    )
    target_forget_loss: float | None = _setting(
        None,
        "For strength 'auto': the mean loss on the forget set to reach, in nats per token, such as that of a model "
        "that never saw it.",
        "None, or a finite number > 0",
        _or_none(lambda value: is_number(value) and value > 0),
    )
    retain_tolerance: float = _setting(
        0.1,
        "For strength 'auto' without target_forget_loss: forget as much as possible while the retain set's mean loss "
        "rises by at most this, in nats per token.",
        "a finite number > 0",
        lambda value: is_number(value) and value > 0,
    )
    fit_kl_samples: int = _setting(
        0,
        "Measure the fit on this many retain samples: KL between the next-token distributions of the adapter and of "
        "the edit before the fit. Meanwhile each layer's dense edit [out, in] stays on the host. Not needed where the "
        "rank holds the edit exactly. Measured before strength 'auto'.",
        "an int >= 0",
        lambda value: is_int(value) and value >= 0,
    )
    gradients_at: str = _setting(
        "origin",
        "Where gradients are taken: 'origin' (every adapter off) or 'full' (the task adapter on).",
        choices=GRADIENTS_AT,
    )
    max_samples: int | None = _setting(
        None,
        "Use at most this many samples of each set, drawn with the seed.",
        "None, or an int > 0",
        _or_none(is_count),
    )
    seed: int = _setting(
        0,
        "Seed of the draw of samples.",
        "an int >= 0, below 2**63",
        lambda value: is_int(value) and 0 <= value < 2**63,
    )
    batch_size: int = _setting(
        8,
        "The most samples per forward and backward pass; the plan may use fewer. It changes memory and speed, and the "
        "result only by rounding.",
        "an int > 0",
        is_count,
    )
    max_memory: int | str | None = _setting(
        None,
        "Memory limit of each GPU, the model included. By default nine tenths of what is free. It changes the plan, "
        "and the result only by rounding.",
        _SIZE,
        _or_none(_is_size),
    )
    host_memory: int | str | None = _setting(
        None, "Memory limit of the host, likewise; on a CPU the only limit.", _SIZE, _or_none(_is_size)
    )
    max_length: int | None = _setting(
        None,
        "The most tokens per sample. A longer text becomes several samples; longer completions are cut, and a row that "
        "loses its whole completion is an error. By default 1024, or the model's number of positions if that is less.",
        "None, or an int > 1",
        _or_none(lambda value: is_int(value) and value >= 2),
    )
    dtype: str = _setting("float32", "Dtype of the emitted factors.", choices=DTYPES)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_setting(field.metadata["valid"](value), field.name, field.metadata["expected"], value)
        check_setting(
            self.allocation == "uniform" or self.fit != "weighted",
            "allocation",
            "'uniform' with fit='weighted', whose factors cannot be cut to a smaller rank",
            self.allocation,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PerTAConfig:
        """The config of these settings.

        Raises:
            ConfigError: a key is not a setting, or a value is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(f"PerTAConfig has no field {unknown[0]!r}; expected some of {names}")
        return cls(**values)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``perta_config.json`` into a directory, which is created if missing."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PerTAConfig:
        """Read ``perta_config.json`` from a directory.

        Raises:
            ConfigError: the file is missing, is not a JSON object, or holds a bad value.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = read_json(path)
        except FileNotFoundError as error:
            raise ConfigError(f"expected {path}, found no such file; write it with save_pretrained") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}; write it again with save_pretrained") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object of settings")
        return cls.from_dict(values)
