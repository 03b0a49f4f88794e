"""The recipe of a job: everything that ``peft-perta run`` does, in one file of YAML that a user can read and change."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..data import DEFAULT, SELF, check_setting, is_count, is_int, is_number, setting
from ..errors import ConfigError
from ..evaluation import Goal
from ..perta import PerTAConfig, RefinementSettings
from ..training import LoraSettings, UnlearningSettings
from .recommendation import AUTO, PREFERENCES

RECIPE_NAME = "recipe.yaml"
STANDS_FOR: dict[str | None, str] = {  # a retain set that is none of the user's -> what it stands for
    DEFAULT: "general facts and passages of books",
    SELF: "neighbouring things, as the full model tells of them",
}
_LARGEST = 2**16  # bytes of a recipe
_DEEPEST = 3  # a recipe, its section, a list
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an adapter is trained.

    Raises:
        ConfigError: a value is out of its range.
    """

    epochs: float = setting(10.0, "Passes over the forget rows.")
    learning_rate: float = setting(1e-3, "The peak learning rate.")
    warmup_steps: float = setting(0.0, "Steps until the peak learning rate; below 1, the share of all steps.")
    batch_size: int = setting(8, "Rows per training step.")

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            check_setting(is_number(value) and 0 < value <= 10_000, name, "a number > 0, at most 10000", value)
        steps, rows = self.warmup_steps, self.batch_size
        check_setting(is_number(steps) and steps >= 0, "warmup_steps", "a number >= 0", steps)
        check_setting(is_count(rows) and rows <= 10_000, "batch_size", "an int from 1 to 10000", rows)


@dataclass(frozen=True)
class ForgetTraining(LoraSettings, Schedule):
    """What `peft-perta forget` takes."""

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        LoraSettings.__post_init__(self)


@dataclass(frozen=True)
class Training(UnlearningSettings, LoraSettings, Schedule):
    """What `peft-perta train` takes."""

    epochs: float = setting(5.0, "Passes over the forget rows.")
    learning_rate: float = setting(5e-4, "The peak learning rate.")
    accumulation_steps: int = setting(1, "Micro-batches per step.")
    eval_steps: int | None = setting(
        None, "Steps between two evaluations. By default four evaluations an epoch where there is a goal, else none."
    )
    dtype: str = setting("float32", "The data type of the adapter's files.")

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        LoraSettings.__post_init__(self)
        UnlearningSettings.__post_init__(self)
        check_setting(is_count(self.accumulation_steps), "accumulation_steps", "an int > 0", self.accumulation_steps)
        steps = self.eval_steps
        check_setting(steps is None or is_count(steps), "eval_steps", "None, or an int > 0", steps)


@dataclass(frozen=True)
class Judging:
    """How the models are judged, and attacked.

    Raises:
        ConfigError: a value is out of its range.
    """

    rows: int = setting(100, "The most rows of each set that the strength is judged by, at even distances.")
    attacked_rows: int = setting(10, "The most forget rows that are attacked; 0 makes no attack.")
    minutes: float | None = setting(None, "Begin no attack after that time. By default no limit.")
    batch_size: int = setting(32, "The most rows per forward pass.")
    max_new_tokens: int = setting(32, "The most tokens of an answer.")

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "max_new_tokens"):
            check_setting(is_count(getattr(self, name)), name, "an int > 0", getattr(self, name))
        attacked, minutes = self.attacked_rows, self.minutes
        check_setting(is_int(attacked) and attacked >= 0, "attacked_rows", "an int >= 0", attacked)
        in_range = minutes is None or (is_number(minutes) and minutes > 0)
        check_setting(in_range, "minutes", "None, or a number > 0", minutes)


@dataclass(frozen=True)
class Request:
    """What a job is given, and what it is to reach.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: str | None = setting(None, "the base model: a name on the Hugging Face Hub, a directory or a GGUF file")
    revision: str | None = setting(None, "the revision of a base model on the Hub")
    four_bit: bool = setting(False, "quantise the base model to 4-bit NF4 (QLoRA)")
    device_map: str | None = setting(
        None,
        "spread the layers over all GPUs, and the rest over the host's memory. By default one GPU.",
        ("auto",),
    )
    safetensors_only: bool = setting(True, "refuse a base whose weights are in a pickle, pytorch_model.bin")
    forget: str | None = setting(
        None, "the forget rows: {question, answer} or another kind of row, in a file, a directory or on the Hub"
    )
    retain: str | None = setting(
        None,
        "the retain rows, in the same formats; every second one judges, and no method sees it. 'default': general "
        "facts and prose, which ship; 'self': rows that the full model writes about neighbouring things",
    )
    task_adapter: str | None = setting(
        None, "the task adapter, if the full model is the base with an adapter that knows too much"
    )
    retain_only_adapter: str | None = setting(
        None,
        "an adapter that never saw the forget rows: forgetting goes as far as it, and it is judged too. By default as "
        "far as the base with every adapter off, where there is a task adapter.",
    )
    forget_adapter: str | None = setting(
        None, "a LoRA adapter trained on the forget rows alone. By default one is trained where the method needs one."
    )
    held_out: str | None = setting(
        None,
        "retain rows to evaluate on while the adapter trains, in the same formats, of which none is in another set. By "
        "default some of those that it trains on.",
    )
    report_to: str | None = setting(
        None,
        "send what is logged there while it trains. By default nowhere; tensorboard's files go into the output.",
        ("trackio", "wandb", "tensorboard"),
    )
    output: str | None = setting(None, "the directory to write everything to (default: forgotten)")
    method: str = setting(AUTO, "a method of `peft-perta compare --list`, or 'auto', the measured recommendation")
    prefer: str = setting("keep", "what 'auto' puts first", tuple(PREFERENCES))
    target_forget_loss: float | None = setting(
        None, "reach this mean loss on the forget rows, in nats per token, in place of the yardstick's"
    )
    retain_tolerance: float = setting(
        0.1, "how far the mean loss on the judging retain rows may rise, in nats per token, for the goal to be met"
    )
    max_length: int | None = setting(
        None, "the most tokens per row. By default 1024, or the model's number of positions if that is less."
    )
    seed: int = setting(0, "the seed of everything that is drawn")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(Request):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value is not None:
                check_setting(value in choices, each.name, f"one of {list(choices)}", value)
        Goal(retain_tolerance=self.retain_tolerance)
        if self.target_forget_loss is not None:
            Goal(target_forget_loss=self.target_forget_loss)
        check_setting(0 <= self.seed < 2**32, "seed", f"an int from 0 to {2**32 - 1}", self.seed)
        length = self.max_length
        check_setting(length is None or length >= 2, "max_length", "None, or an int > 1", length)


@dataclass(frozen=True)
class Recipe(Request):
    """A job: what it is given, the goal, and the settings of each step.

    Attributes:
        forget_training: how the forget adapter is trained (`peft-perta forget`); None where the method needs none.
        unlearn: the settings of `peft-perta unlearn`; None where the method trains.
        train: the settings of `peft-perta train`; None where it does not.
        refine: the settings of `peft-perta refine`; None where the method is not refined.
        judging: how the strength is judged, and how hard the result is attacked.

    The other fields are those of ``Request``. A section that the file leaves out takes the method's own settings.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    forget_training: ForgetTraining | None = None
    unlearn: PerTAConfig | None = None
    train: Training | None = None
    refine: RefinementSettings | None = None
    judging: Judging = field(default_factory=Judging)

    __pydantic_config__ = _FORBID

    def to_yaml(self) -> str:
        """The recipe as a file that reads back as this recipe."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        used = {name: value for name, value in values.items() if value is not None or name not in SECTIONS}
        return yaml.safe_dump(used, sort_keys=False, allow_unicode=True, width=120)


SECTIONS: dict[str, type] = {
    "forget_training": ForgetTraining,
    "unlearn": PerTAConfig,
    "train": Training,
    "refine": RefinementSettings,
    "judging": Judging,
}


def part_of(settings: Any, kind: type) -> dict[str, Any]:
    """The fields of one dataclass among those of another that holds them."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)}


class _Loader(yaml.SafeLoader):
    """YAML as ``yaml.safe_load`` reads it, and 1e-3 is a number, as YAML 1.2 has it."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The values of a recipe's file, key by key; ``recipe_of`` checks them.

    Raises:
        ConfigError: the file is missing, is too large, or is no YAML mapping of plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"expected a recipe at {path}, found no file; `peft-perta run --init` writes one")
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path} holds more than {_LARGEST} bytes, expected a recipe of a few lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_plain(text, path)
        _check_once(yaml.compose(text, _Loader), path)
        values = yaml.load(io.StringIO(text), _Loader)  # a SafeLoader
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, RecursionError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path} is no YAML: {reason}; expected lines of `key: value`") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected lines of `key: value`")
    return values


def _check_plain(text: str, path: Path) -> None:
    """
    Raises:
        ConfigError: there is an alias, or the values are nested deeper than those of any recipe.
    """
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path} holds an alias (*name), expected every value in its place")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"{path} is nested too deeply, expected sections with values or lists in them")


def _check_once(node: Any, path: Path) -> None:
    """
    Raises:
        ConfigError: a mapping holds a key twice; YAML would take the last one.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
            raise ConfigError(f"{path} holds the key {key.value!r} twice, expected it once")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        _check_once(value, path)


def recipe_of(values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """The recipe of these values.

    Args:
        values: key -> value; a section is a mapping of its own.
        where: names the recipe in messages.

    Raises:
        ConfigError: a key is unknown (the message names the nearest one), or a value has the wrong type or is out of
            its range.
    """
    _check_keys(values, Recipe, where)
    for name, kind in SECTIONS.items():
        if isinstance(values.get(name), Mapping):
            _check_keys(values[name], kind, f"{where}, {name}")
    try:
        text = json.dumps(dict(values))
        return _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        place = [str(part) for part in first["loc"] if part in SECTIONS or part in _names(Recipe) or part in _ALL]
        key = ".".join(dict.fromkeys(place))
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{where}: {f'{key}.' if key else ''}{cause}") from error
        raise ConfigError(f"{where}: {key}: {first['msg'].lower()}, found {first['input']!r:.80}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} holds a value that is neither text, number, list nor mapping ({error})") from error


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


_ALL = {name for kind in SECTIONS.values() for name in _names(kind)}


def _check_keys(values: Mapping[Any, Any], kind: type, where: str) -> None:
    """
    Raises:
        ConfigError: a key is no field of the dataclass.
    """
    names = _names(kind)
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else f"expected some of {', '.join(names)}"
            raise ConfigError(f"{where} has no key {str(key)[:60]!r}; {meant}")


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    for kind in (Recipe, *SECTIONS.values()):  # an HfArgumentParser narrows the types of fields, in place: to no None
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            each.type = hints[each.name]
    return TypeAdapter(Recipe)
