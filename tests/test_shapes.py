"""JSON of others becomes a dataclass only if every field and key is of the annotated kind."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pytest
from typing_extensions import TypedDict

from peft_perta.data import Holds, read_as


class Owner(TypedDict):
    name: str
    age: float | None


@dataclass
class Pet:
    legs: int
    owner: Annotated[dict[str, Any], Holds(Owner)]
    toys: list[str]


INTACT = {"legs": 4, "owner": {"name": "Ned", "age": 3, "town": "Bonn"}, "toys": ["ball"]}


def test_what_was_written_is_read_with_keys_that_nobody_asked_for():
    pet = read_as(Pet, INTACT)
    assert json.loads(json.dumps(asdict(pet))) == INTACT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"legs": "4"}, "legs: input should be a valid integer, found '4'"),
        ({"legs": 4.5}, "legs: "),
        ({"legs": True}, "legs: "),
        ({"owner": {"name": "Ned"}}, "owner.age: field required"),
        ({"owner": {"name": 3, "age": None}}, "owner.name: input should be a valid string, found 3"),
        ({"owner": []}, "owner: "),
        ({"toys": ["ball", None]}, "toys.1: input should be a valid string, found None"),
    ],
)
def test_the_first_field_of_another_kind_is_named(changes, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        read_as(Pet, {**INTACT, **changes})
    assert str(raised.value).startswith(message)


def test_half_a_character_is_no_fault():
    assert read_as(Pet, {**INTACT, "toys": ["\ud800"]}).toys == ["?"]
