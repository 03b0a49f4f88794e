"""The shape of JSON that a file of others holds, checked field by field and key by key when it is read."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError, with_config
from pydantic_core import CoreSchema

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Holds:
    """In ``Annotated[dict, Holds(shape)]``: the dict must hold the keys of a ``TypedDict``, and may hold more.

    Attributes:
        shape: the ``TypedDict`` of typing_extensions.
    """

    shape: type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """What pydantic asks for."""
        return handler.generate_schema(with_config(ConfigDict(extra="allow"))(self.shape))


def read_as(kind: type[_Kind], values: Any) -> _Kind:
    """The object of a dataclass whose ``dataclasses.asdict`` gave the JSON ``values``.

    Raises:
        ValueError: ``values`` has another shape than the dataclass' annotations; the message names the first field.
    """
    try:
        text = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")  # half a character becomes "?"
        return _reader(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}: {first['msg'].lower()}, found {first['input']!r:.80}") from error


@functools.cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
