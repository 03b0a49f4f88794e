"""What several kinds of provenance hold. A provenance is checked against these types when it is read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ...data import Holds

Count = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=-1e-3, le=1.001)]  # with rounding
Norm = Annotated[float, Field(ge=0, le=1e100)]  # its square is finite


class _Base(TypedDict):
    name: str | None
    revision: NotRequired[str | None]
    quantization: NotRequired[dict[str, Any] | None]


class _Adapter(TypedDict):
    name: str
    sha256: str


class _Part(_Adapter):
    strength: float


class _OnSets(TypedDict):
    forget: float
    retain: float


class _DataSet(TypedDict):
    samples: Count
    sha256: str


Base = Annotated[dict[str, Any], Holds(_Base)]  # as describe_base gives it; records of earlier versions hold less
Adapter = Annotated[dict[str, Any], Holds(_Adapter)]  # its name, and the SHA-256 of its factors
Part = Annotated[dict[str, Any], Holds(_Part)]  # an adapter in a sum
OnSets = Annotated[dict[str, float], Holds(_OnSets)]
DataSet = Annotated[dict[str, Any], Holds(_DataSet)]  # the number of its samples, and the SHA-256 of their tokens
