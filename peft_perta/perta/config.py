"""Every knob, once."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters import DTYPES, SERVABLE_RANKS
from ..errors import ConfigError
from ..model import parse_size

CONFIG_NAME = "perta_config.json"


GRANULARITY_NAMES = ("factor", "delta", "separable", "factor+delta")


ALLOCATIONS = ("uniform", "padded", "pattern")


FIT_NAMES = ("truncated", "kronecker", "second-moment", "weighted")


GRADIENTS_AT = ("origin", "full")


@dataclass
class PerTAConfig:
    """How a forget adapter becomes a negative adapter (PerTA, arXiv 2601.22030).

    Reference: Cai et al. 2026, "Per-parameter Task Arithmetic for Unlearning in Large Language Models".

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    weighting: str = field(
        default="grad",
        metadata={
            "help": "How statistics become weights: a name from peft_perta.WEIGHTINGS ('uniform' is plain task "
            "arithmetic; 'grad', 'fisher', 'empirical-fisher'), or your own as 'package.module:attribute'."
        },
    )
    granularity: str = field(
        default="factor",
        metadata={
            "help": "What the weights multiply: 'factor' (A and B each, no [out, in] matrix), 'delta' (the merged "
            "B @ A, refitted to the rank), 'separable' (rows times columns, exact at the forget adapter's rank)."
        },
    )
    input_directions: bool | None = field(
        default=None,
        metadata={
            "help": "Also weigh the directions of each layer's input, by how much of their energy is the forget set's; "
            "exact at any rank. Default: yes, but for expert parameters, whose inputs are not met."
        },
    )
    power: float | None = field(
        default=None,
        metadata={
            "help": "Exponent tau of the ratio |g_f|^tau / (|g_f|^tau + |g_r|^tau). Default: the weighting's own."
        },
    )
    rank: int | float | None = field(
        default=None,
        metadata={
            "help": "Rank of the negative adapter: an int from 1 to 256, a float in (0, 1) for the share of the "
            "edit's energy to keep, or nothing for the forget adapter's own rank. Zero-padded to 8, 16, 32, 64, 128 "
            "or 256, which every server takes."
        },
    )
    fit: str | None = field(
        default=None,
        metadata={
            "help": "How an edit of larger rank is brought to the rank: 'truncated' (least Frobenius error), "
            "'kronecker' and 'second-moment' (least error on the layers' inputs), 'weighted' (least error where the "
            "retain set has gradients). Default: 'second-moment' where input directions are weighed, whose moments it "
            "shares; else 'truncated'."
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "'uniform': every layer has the rank. Else the same total size is spread over layers by marginal "
            "gain, and written zero-padded to the largest rank ('padded': larger, but every server takes it) or as a "
            "rank_pattern ('pattern': PEFT alone takes it). A float rank is then a share of all layers' energy."
        },
    )
    strength: float | str = field(
        default=1.0,
        metadata={
            "help": "Multiplies the edit, and is folded into B. 0 changes nothing; more forgets more. 'auto' finds the "
            "one that meets target_forget_loss, or else retain_tolerance, on a quarter of the retain set that is held out."
        },
    )
    target_forget_loss: float | None = field(
        default=None,
        metadata={
            "help": "Goal of strength 'auto': the mean loss on the forget set, in nats per token, such as that of a "
            "model that never saw it."
        },
    )
    retain_tolerance: float = field(
        default=0.1,
        metadata={
            "help": "Goal of strength 'auto' where no target_forget_loss is given: the most forgetting that raises the "
            "retain set's loss by no more than this, in nats per token."
        },
    )
    fit_kl_samples: int = field(
        default=0,
        metadata={
            "help": "On so many samples of the retain set, measure how far the adapter's next-token distributions are "
            "from those of the edit before it was fitted to the rank (KL). Keeps dense edits, [out, in] per layer, on "
            "the host meanwhile; edits that the rank holds exactly need no measuring. Taken before strength 'auto'."
        },
    )
    gradients_at: str = field(
        default="origin",
        metadata={
            "help": "Where gradients are taken: 'origin' (theta_0, every adapter off) or 'full' (theta_full, the task "
            "adapter on)."
        },
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "At most so many samples of each set estimate the weights, drawn with the seed."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw of samples."})
    batch_size: int = field(
        default=8,
        metadata={
            "help": "The most samples per forward and backward; fewer where the memory budget needs it. Changes memory "
            "and speed, never the result beyond float error."
        },
    )
    max_memory: int | str | None = field(
        default=None,
        metadata={
            "help": "The most that the run may hold of each GPU, the model included: '10GiB', '10GB' or bytes. "
            "Default: nine tenths of what is free. Changes the plan, never the result beyond float error."
        },
    )
    host_memory: int | str | None = field(
        default=None,
        metadata={"help": "The same of the host's memory; on a CPU the only one that counts."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens per sample. Longer completions are cut; one cut away whole is an error."},
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the emitted factors: 'float32', 'bfloat16' or 'float16'."}
    )

    def __post_init__(self) -> None:
        _check(isinstance(self.weighting, str) and bool(self.weighting), "weighting", "a name", self.weighting)
        _check(self.granularity in GRANULARITY_NAMES, "granularity", f"one of {GRANULARITY_NAMES}", self.granularity)
        _check(
            self.input_directions is None or isinstance(self.input_directions, bool),
            "input_directions",
            "nothing, True or False",
            self.input_directions,
        )
        _check(
            self.power is None or (_is_number(self.power) and self.power >= 0),
            "power",
            "nothing, or a finite number >= 0",
            self.power,
        )
        _check(_is_rank(self.rank), "rank", "nothing, an int from 1 to 256, or a float in (0, 1)", self.rank)
        _check(self.allocation in ALLOCATIONS, "allocation", f"one of {ALLOCATIONS}", self.allocation)
        _check(
            self.allocation == "uniform" or self.fit != "weighted",
            "allocation",
            "'uniform' with fit='weighted', whose factors of one rank are no part of those of a larger one",
            self.allocation,
        )
        _check(self.fit is None or self.fit in FIT_NAMES, "fit", f"nothing, or one of {FIT_NAMES}", self.fit)
        _check(
            self.strength == "auto" or _is_number(self.strength), "strength", "a finite number or 'auto'", self.strength
        )
        _check(
            self.target_forget_loss is None or (_is_number(self.target_forget_loss) and self.target_forget_loss > 0),
            "target_forget_loss",
            "nothing, or a finite number > 0",
            self.target_forget_loss,
        )
        _check(
            _is_number(self.retain_tolerance) and self.retain_tolerance > 0,
            "retain_tolerance",
            "a finite number > 0",
            self.retain_tolerance,
        )
        _check(
            self.gradients_at in GRADIENTS_AT,
            "gradients_at",
            f"one of {GRADIENTS_AT}",
            self.gradients_at,
        )
        _check(self.max_samples is None or _is_count(self.max_samples), "max_samples", "an int > 0", self.max_samples)
        _check(
            _is_int(self.fit_kl_samples) and self.fit_kl_samples >= 0,
            "fit_kl_samples",
            "an int >= 0",
            self.fit_kl_samples,
        )
        _check(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", "an int >= 0, below 2**63", self.seed)
        _check(_is_count(self.batch_size), "batch_size", "an int > 0", self.batch_size)
        for name in ("max_memory", "host_memory"):
            value = getattr(self, name)
            try:
                known = value is None or parse_size(value) > 0
            except ConfigError:
                known = False
            _check(known, name, "nothing, or a size such as '10GiB', '10GB' or a number of bytes", value)
        _check(_is_int(self.max_length) and self.max_length >= 2, "max_length", "an int > 1", self.max_length)
        _check(self.dtype in DTYPES, "dtype", f"one of {DTYPES}", self.dtype)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> PerTAConfig:
        """Raises ConfigError on a key that is no field, as on a bad value."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(f"PerTAConfig has no field {unknown[0]!r}; expected some of {names}")
        return cls(**values)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``perta_config.json`` into the directory, which is made if need be."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PerTAConfig:
        """Read ``perta_config.json`` from the directory.

        Raises:
            ConfigError: the file is missing, is no JSON object, or holds a bad value.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"expected {path}, found no such file; save_pretrained writes it") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}; write it anew with save_pretrained") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object of fields")
        return cls.from_dict(values)


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_int(value) and value > 0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, float):
        return 0.0 < value < 1.0
    return _is_int(value) and 1 <= value <= SERVABLE_RANKS[-1]  # type: ignore[operator]
