"""Choose the cheapest plan that fits the memory budget, among the plans of all modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ..errors import ConfigError
from ..model import DISK, HOST, show_size
from .gradient_sums import PLACES, Place
from .modes import MODES, Mode
from .plan import Measured, Memory, Plan


def make_plan(
    measured: Measured,
    taken: Mapping[str, int],
    budget: Mapping[str, int],
    batch_size: int,
    modes: Mapping[str, Mode] = MODES,
) -> Plan:
    """The cheapest plan whose predicted peak is within the budget.

    Args:
        measured: what the model needs.
        taken: pool -> bytes in use already, mainly by the model.
        budget: pool -> the most bytes in use at any time.
        batch_size: the most samples that may run together.
        modes: the modes to choose from.

    Raises:
        ConfigError: no plan fits; the message names the smallest budget that fits.
    """
    memory = Memory(taken, budget)
    plans = list(_plans(measured, memory, 1 if measured.one_at_a_time else batch_size, modes))
    fitting = [plan for plan in plans if plan.fits()]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)  # of equal costs the first: larger batch, nearer place
    raise _refusal(plans, memory, next(iter(measured.activations)))


def _plans(measured: Measured, memory: Memory, batch_size: int, modes: Mapping[str, Mode]) -> Iterator[Plan]:
    places: tuple[Place, ...] = ("device", "disk") if measured.on_host else PLACES
    micro_batch = min(batch_size, measured.samples)
    while True:
        for mode in modes.values():
            if mode.is_possible(measured):
                for place in places:
                    yield mode.plan(measured, memory, micro_batch, place)
        if micro_batch == 1:
            return
        micro_batch = math.ceil(micro_batch / 2)


def _refusal(plans: list[Plan], memory: Memory, device: str) -> ConfigError:
    """What to raise where no plan fits: the plan that comes closest, and the budget that it needs."""

    def excess(plan: Plan) -> tuple[float, float]:
        over = {pool: max(0, plan.peak[pool] - memory.budget[pool]) for pool in plan.peak}
        return over.get(device, 0), sum(over.values())

    closest = min(plans, key=excess)
    needs = [
        f"{_setting_of(pool)} of at least {show_size(1.01 * peak)} (found {show_size(memory.budget[pool])})"
        for pool, peak in closest.peak.items()
        if peak > memory.budget[pool]
    ]
    has_room = all(memory.taken.get(pool, 0) < memory.budget[pool] for pool in closest.peak)
    less = ", use granularity='factor' in place of 'delta', or lower max_length" if has_room else ""
    return ConfigError(
        f"this run does not fit its memory budget, whatever the plan: expected {' and '.join(needs)}, of which "
        f"{show_size(memory.taken.get(device, 0))} is in use already. With that budget it would run "
        f"{closest.micro_batch} sample(s) at a time, {closest.description[0]}. Raise the budget{less}"
    )


def _setting_of(pool: str) -> str:
    """The setting that limits a pool."""
    return {HOST: "host_memory", DISK: "free disk"}.get(pool, "max_memory")
