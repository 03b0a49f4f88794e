"""Which method first: the recommendation of the measurements (README, "Which method first"; docs/results.md), as data.

The names are those of ``METHODS``, the table of `peft-perta compare`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..comparison import METHODS, Method
from ..errors import ConfigError

AUTO = "auto"
PREFERENCES = {  # what a job may put first
    "keep": "what must be kept",
    "time": "little compute",
    "robustness": "that training on a few of the rows brings little back",
}


@dataclass(frozen=True)
class Known:
    """What is known before anything is computed.

    Attributes:
        prefer: a key of ``PREFERENCES``.
        origin_knows: the base itself knows the forget rows: there is no task adapter that taught it.
        has_forget_adapter: the user has trained one.
    """

    prefer: str
    origin_knows: bool
    has_forget_adapter: bool


@dataclass(frozen=True)
class Recommendation:
    """One row of the table. The first row that applies is taken.

    Attributes:
        method: a name of ``METHODS``, which holds its settings.
        when: what must be known, in words.
        because: what was measured.
        applies: whether it is so.
    """

    method: str
    when: str
    because: str
    applies: Callable[[Known], bool]


RECOMMENDATIONS = (
    Recommendation(
        "perta-grad",
        "a forget adapter is there",
        "3.5 forward passes and no training; it keeps .84 of .95 on SmolLM2-135M where sago+directions keeps .94",
        lambda known: known.has_forget_adapter,
    ),
    Recommendation(
        "perta-grad",
        "little compute comes first",
        "11 forward-equivalents, the forget adapter's training included, where sago+directions takes 21",
        lambda known: known.prefer == "time",
    ),
    Recommendation(
        "sago+attacker+directions",
        "robustness comes first",
        "relearning brings back .65 of what was known on SmolLM2-135M where it brings back .95 after sago+directions, "
        "and it keeps .83 where that keeps .92 (one seed); on the small model .31 and .85, and it keeps .82 where that "
        "keeps .85 (three seeds)",
        lambda known: known.prefer == "robustness",
    ),
    Recommendation(
        "rmu+directions",
        "the base itself knows the rows",
        "of the methods that reach chance, refined RMU leaves the other rows' loss where it was (one seed)",
        lambda known: known.origin_knows,
    ),
    Recommendation(
        "sago+directions",
        "none of these",
        "it keeps most (.944 of .950 on SmolLM2-135M, three seeds; rmu+directions .943), and on the small model role "
        "play finds .14 of what was known, where it finds .70 after rmu+directions",
        lambda known: True,
    ),
)


def recommend(known: Known) -> Recommendation:
    """The first row of ``RECOMMENDATIONS`` that applies."""
    return next(row for row in RECOMMENDATIONS if row.applies(known))


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: no method that a job can make has this name.
    """
    runnable = [known for known, method in METHODS.items() if method.step is not None]
    if name not in runnable:
        raise ConfigError(f"method: expected {AUTO!r} or one of {', '.join(runnable)}; found {name!r}")
    return METHODS[name]
