"""The contract of a mode."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from ...model import Target
from ..gradient_sums import Place
from ..job import Job, SetSums
from ..plan import Measured, Memory, Plan

Results = Generator[tuple[list[Target], SetSums], None, None]


class Mode(Protocol):
    """A way to visit the layers: it says what it costs, and it runs.

    Attributes:
        name: as plans name it.
        title: as messages name it.
    """

    name: str
    title: str

    def is_possible(self, measured: Measured) -> bool:
        """Whether the mode can run this model, as far as the measurements tell."""
        ...

    def plan(self, measured: Measured, memory: Memory, micro_batch: int, place: Place) -> Plan:
        """The mode's cheapest plan with this batch size and this place for what it keeps; it need not fit."""
        ...

    def obstacle(self, job: Job) -> str | None:
        """Why the mode cannot run the job after all, by a test on the model; None if it can."""
        ...

    def run(self, job: Job, plan: Plan) -> Results:
        """Each group of the plan with both sets' sums, from the top of the model down. Layers that are not in the job
        are skipped."""
        ...
