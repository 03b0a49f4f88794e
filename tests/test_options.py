"""A settings dataclass as options: each annotation gives its type, and one that is not understood is an error."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest

from peft_perta import InfluenceSettings, PerTAConfig, UnlearningSettings
from peft_perta.cli._settings import add_settings, read_settings


def knob(default: Any, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": "100 % of it.", **metadata})


@dataclass
class Settings:
    """One field of each kind."""

    count: int = knob(3)
    share: float = knob(0.5)
    name: str = knob("a")
    kind: str = knob("x", choices=("x", "y"))
    either: bool = knob(False)
    unset: bool | None = knob(None)
    limit: int | None = knob(None)
    old_style: Optional[float] = knob(None)  # noqa: UP045
    rank: int | float | None = knob(None)
    strength: float | str = knob(1.0)
    size: int | str | None = knob(None)
    texts: list[str] | None = knob(None)  # noqa: RUF009


def parser_of(settings: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="p")
    parser.add_argument("--other", default=1)
    add_settings(parser, settings, "settings")
    return parser


def read(*arguments: str) -> Settings:
    return read_settings(Settings, parser_of(Settings).parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--count", "4"], "count", 4),
        (["--share", "1"], "share", 1.0),
        (["--name", "1"], "name", "1"),
        (["--kind", "y"], "kind", "y"),
        (["--either"], "either", True),
        (["--no-either"], "either", False),
        (["--no-unset"], "unset", False),
        (["--limit", "7"], "limit", 7),
        (["--old-style", "7"], "old_style", 7.0),
        (["--rank", "1"], "rank", 1),
        (["--rank", "1.0"], "rank", 1.0),
        (["--strength", "2"], "strength", 2.0),
        (["--strength", "auto"], "strength", "auto"),
        (["--size", "10GiB"], "size", "10GiB"),
        (["--size", "1000"], "size", "1000"),
        (["--text", "r", "--text", "s"], "texts", ["r", "s"]),
    ],
)
def test_an_option_gives_its_field_the_type_of_the_annotation(arguments, name, value):
    settings = read(*arguments)
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings == dataclasses.replace(Settings(), **{name: value}), "the other fields keep their defaults"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1.5"], "argument --count: invalid int value: '1.5'"),
        (["--share", "much"], "argument --share: invalid float value: 'much'"),
        (["--rank", "many"], "argument --rank: expected an int or a float, found 'many'"),
        (["--kind", "z"], "argument --kind: invalid choice: 'z'"),
        (["--either", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_a_text_that_is_not_of_the_type_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(*arguments)
    assert message in capsys.readouterr().err


def test_the_help_says_the_default():
    text = " ".join(parser_of(Settings).format_help().split())
    for line in ("--count COUNT 100 % of it. (default: 3)", "--limit LIMIT 100 % of it. --old-style"):
        assert line in text
    assert "--text TEXT 100 % of it." in text
    assert "{x,y}" in text


@pytest.mark.parametrize("annotation", [list, dict, complex, int | list, tuple[int, ...], bool | str, "list[int]"])
def test_an_annotation_that_is_not_understood_is_an_error(annotation):
    settings = dataclasses.make_dataclass("Odd", [("depth", annotation, knob(None))])
    with pytest.raises(TypeError, match=r"^Odd\.depth: expected an annotation of int, float, .*, found "):
        parser_of(settings)


@pytest.mark.parametrize("settings", [PerTAConfig, UnlearningSettings, InfluenceSettings])
def test_without_options_the_settings_are_the_defaults(settings):
    assert read_settings(settings, parser_of(settings).parse_args([])) == settings()
