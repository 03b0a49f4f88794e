"""What is computed when and where: which layers in which sweep, sums and inputs in which memory, how many samples at a
time. Pure: measurements and budgets in, a plan out; the same in, the same out.

Two modes. *Grouped*: all samples run forward once per group of layers, and back to the group's lowest layer; groups go
from the top down. *Layer by layer*: all samples run forward once, the inputs of every decoder block are kept, and each
block then runs forward and back by itself, from the top down; about two forwards and one backward in all, and one
block's sums at a time.

Costs are in forward-equivalents, one being a forward pass over both sets. Bytes that cross to the host or the disk are
charged as the floating-point operations that would take as long: fixed figures of a common GPU or CPU, not
measurements, so that the plan is the same at every run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..model import DISK, HOST, show_size
from .gradient_sums import PLACES, Place

_GPU_OPERATIONS_PER_BYTE = {"device": 0.0, "host": 5_000.0, "disk": 50_000.0}


_CPU_OPERATIONS_PER_BYTE = {"device": 0.0, "host": 0.0, "disk": 100.0}


_EDIT_COPIES = 3  # of one layer's arranged sums: magnitudes, weights, edit


_TOKENS_OF_OVERHEAD = 64  # what a batch costs before its first token (dequantising, launching), in tokens


@dataclass(frozen=True)
class LayerCost:
    """One target.

    Attributes:
        pool: of the layer's device.
        statistic: bytes of one set's sums.
        size: elements of the weight.
        after: elements of all weights that run with this layer or after it.
        block: index of the decoder block that it is in; None outside of the blocks.
    """

    name: str
    pool: str
    statistic: int
    size: int
    after: int
    block: int | None


@dataclass(frozen=True)
class Measured:
    """What one sample, the longest, showed.

    Attributes:
        layers: in the order in which they run.
        size: elements of all weights that run.
        activations: pool -> bytes that the whole backward keeps and needs, per sample.
        block_activations: pool -> the same of the block, or of the part after the blocks, that needs most.
        block_input: bytes of one block's input, over both sets.
        blocks: how many decoder blocks were found.
        samples: in both sets together.
        tokens: in both sets together, padding included.
        formed: elements of all layers' sums: each takes a product with every token.
        one_at_a_time: samples cannot be told apart within a batch, and must be.
        recomputes: gradient checkpointing is on.
        arguments: bytes of what blocks are called with beside their input (masks), over both sets.
        fixed: pool -> bytes that any batch needs, whatever its size: unpacked weights, work space; and what an edit
            needs beside a batch, where that is more than a few copies of its sums (input directions, fits).
    """

    layers: tuple[LayerCost, ...]
    size: int
    activations: Mapping[str, int]
    block_activations: Mapping[str, int]
    block_input: int
    blocks: int
    samples: int
    tokens: int
    formed: int
    one_at_a_time: bool = False
    recomputes: bool = False
    arguments: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def lowest_block(self) -> int:
        """The lowest block that holds a target."""
        return min((layer.block for layer in self.layers if layer.block is not None), default=0)

    @property
    def has_chain(self) -> bool:
        """Whether the targets lie in blocks, or after all of them."""
        last = max((i for i, layer in enumerate(self.layers) if layer.block is not None), default=-1)
        return self.blocks > 0 and last >= 0 and all(layer.block is not None for layer in self.layers[:last])


@dataclass(frozen=True)
class Plan:
    """How the sums are taken.

    Attributes:
        mode: 'grouped' or 'layerwise'.
        groups: names of the layers whose sums are held together, in the order of the sweeps.
        statistics: where the sums live.
        inputs: where the blocks' inputs are kept, layer by layer.
        micro_batch: samples that run together.
        peak: pool -> predicted bytes at the peak, the model included.
        budget: pool -> the most that may be.
        cost: in forward-equivalents.
    """

    mode: str
    groups: tuple[tuple[str, ...], ...]
    statistics: Place
    inputs: Place
    micro_batch: int
    peak: Mapping[str, int] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)
    cost: float = math.nan

    @classmethod
    def from_dict(cls, values: dict) -> Plan:
        return cls(**{**values, "groups": tuple(tuple(group) for group in values["groups"])})

    def __str__(self) -> str:
        layers, groups = sum(map(len, self.groups)), len(self.groups)
        samples = f"{self.micro_batch} sample{'s' if self.micro_batch > 1 else ''} at a time"
        if self.mode == "layerwise":
            how = f"layer by layer: {groups} blocks, one after the other, their inputs kept on the {self.inputs}"
        else:
            how = f"{groups} sweep{'s from the top down' if groups > 1 else ''}"
        lines = [f"plan: {layers} layers, {how}; sums on the {self.statistics}; {samples}"]
        if self.mode == "grouped" and groups > 1:
            for number, group in enumerate(self.groups, start=1):
                lines.append(f"sweep {number}: {len(group)} layers, {group[0]} to {group[-1]}")
        peaks = ", ".join(
            f"{show_size(self.peak[pool])} of {show_size(self.budget[pool])} on {_pool_name(pool)}"
            for pool in self.peak
        )
        lines.append(f"predicted peak {peaks}")
        lines.append(f"predicted cost {self.cost:.2f} forward-equivalents (a plain LoRA forward and backward is 2)")
        return "\n      ".join(lines)


def make_plan(measured: Measured, taken: Mapping[str, int], budget: Mapping[str, int], batch_size: int) -> Plan:
    """The cheapest plan whose predicted peak stays within the budget.

    Args:
        taken: pool -> bytes that are held already, by the model above all.
        budget: pool -> the most that may be held.
        batch_size: the most samples that may run together.

    Raises:
        ConfigError: none does; with the smallest budget that would do.
    """
    plans = list(_plans(measured, taken, budget, 1 if measured.one_at_a_time else batch_size))
    fitting = [plan for plan in plans if _fits(plan)]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)  # the first of several: the larger batch, the nearer place
    device = next(iter(measured.activations))

    def excess(plan: Plan) -> tuple[float, float]:
        over = {pool: max(0, plan.peak[pool] - budget[pool]) for pool in plan.peak}
        return over.get(device, 0), sum(over.values())

    least = min(plans, key=excess)
    needs = [
        f"{'host_memory' if pool == HOST else 'max_memory' if pool != DISK else 'free disk'} of at least "
        f"{show_size(1.01 * least.peak[pool])} (found {show_size(budget[pool])})"
        for pool in least.peak
        if least.peak[pool] > budget[pool]
    ]
    raise ConfigError(
        f"this run does not fit its memory budget, whatever the plan: expected {' and '.join(needs)}, of which "
        f"{show_size(taken.get(device, 0))} is taken already. That would run {least.micro_batch} sample(s) at a time, "
        f"{'block by block' if least.mode == 'layerwise' else 'layer by layer in sweeps'}; granularity='factor' needs "
        "less than 'delta', and a shorter max_length less still"
    )


def _fits(plan: Plan) -> bool:
    return all(plan.peak[pool] <= plan.budget[pool] for pool in plan.peak)


def _plans(measured: Measured, taken: Mapping[str, int], budget: Mapping[str, int], batch_size: int) -> Iterator[Plan]:
    micro_batch = min(batch_size, measured.samples)
    while True:
        for place in _places(measured):
            yield _grouped(measured, taken, budget, micro_batch, place)
        if measured.has_chain:
            for place in _places(measured):
                yield _layerwise(measured, taken, budget, micro_batch, place)
        if micro_batch == 1:
            return
        micro_batch = math.ceil(micro_batch / 2)


def _places(measured: Measured) -> tuple[Place, ...]:
    """On a CPU the device is the host."""
    return ("device", "disk") if set(measured.activations) == {HOST} else PLACES


def _grouped(
    measured: Measured, taken: Mapping[str, int], budget: Mapping[str, int], micro_batch: int, place: Place
) -> Plan:
    working = _working(measured, measured.activations, micro_batch)
    # Filled from the bottom: the fewest sweeps, and each goes back no further than it must.
    groups: list[list[LayerCost]] = []
    held = _Held()
    for layer in measured.layers:
        more = held.plus(layer)
        if groups and _within(more.peak(working, taken, place), budget):
            held = more
            groups[-1].append(layer)
        else:
            held = _Held().plus(layer)
            groups.append([layer])
    groups = [group[::-1] for group in reversed(groups)]
    peaks = [_peak(group, working, taken, place) for group in groups]
    cost = 0.0
    for group in groups:
        depth = max(layer.after for layer in group) / measured.size
        cost += 1 + depth * (2 if measured.recomputes else 1)
    cost += measured.formed / measured.size
    batches = measured.samples / micro_batch
    crossing = 0 if place == "device" else batches * sum(layer.statistic for layer in measured.layers)
    return _finished(
        Plan("grouped", _names(groups), place, "device", micro_batch),
        _largest(peaks),
        budget,
        cost + crossing * _operations_per_byte(measured)[place] / (2 * measured.size * measured.tokens),
        measured,
    )


def _layerwise(
    measured: Measured, taken: Mapping[str, int], budget: Mapping[str, int], micro_batch: int, place: Place
) -> Plan:
    working = _working(measured, measured.block_activations, micro_batch)
    by_block: dict[int, list[LayerCost]] = {}
    for layer in reversed(measured.layers):
        by_block.setdefault(measured.blocks if layer.block is None else layer.block, []).append(layer)
    groups = [by_block[block] for block in sorted(by_block, reverse=True)]
    peaks = [_peak(group, working, taken, "device") for group in groups]
    # The inputs of all blocks from the lowest target up, and the gradient at one boundary.
    inputs = (measured.blocks - measured.lowest_block + 1) * measured.block_input + measured.arguments
    if place == "host" and set(measured.activations) != {HOST}:
        # Pinned memory comes in powers of two.
        of_batch = max(1.0, micro_batch * measured.block_input / measured.samples)
        inputs = int(inputs * 2 ** math.ceil(math.log2(of_batch)) / of_batch)
    peak = _largest(peaks)
    pool = {"device": next(iter(measured.activations)), "host": HOST, "disk": DISK}[place]
    peak[pool] = peak.get(pool, taken.get(pool, 0)) + inputs
    depth = max(layer.after for layer in measured.layers) / measured.size
    cost = 1 + 2 * depth
    cost += measured.formed / measured.size
    # Written and read once each; the boundary's gradient is written and read at every block.
    crossing = 4 * inputs * _operations_per_byte(measured)[place]
    return _finished(
        Plan(
            "layerwise", tuple(tuple(layer.name for layer in group) for group in groups), "device", place, micro_batch
        ),
        peak,
        budget,
        cost + crossing / (2 * measured.size * measured.tokens),
        measured,
    )


def _finished(plan: Plan, peak: Mapping[str, int], budget: Mapping[str, int], cost: float, measured: Measured) -> Plan:
    length = measured.tokens / measured.samples
    cost *= 1 + _TOKENS_OF_OVERHEAD / (plan.micro_batch * length)
    return dataclasses.replace(plan, peak=dict(peak), budget=dict(budget), cost=cost)


@dataclass(frozen=True)
class _Held:
    """What a group of layers holds: pool -> bytes of both sets' sums, and of the largest layer's in one set."""

    sums: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)

    def plus(self, layer: LayerCost) -> _Held:
        pool, size = layer.pool, layer.statistic
        return _Held(
            {**self.sums, pool: self.sums.get(pool, 0) + 2 * size},
            {**self.largest, pool: max(self.largest.get(pool, 0), size)},
        )

    def peak(self, working: Mapping[str, int], taken: Mapping[str, int], place: Place) -> dict[str, int]:
        """Both sets' sums, and beside them either what a batch needs or what one layer's edit needs."""
        peak = {}
        for pool in working:
            sums = self.sums.get(pool, 0) if place == "device" else 0
            peak[pool] = taken.get(pool, 0) + sums + max(working[pool], _EDIT_COPIES * self.largest.get(pool, 0))
        if place != "device":
            pool = HOST if place == "host" else DISK
            peak[pool] = peak.get(pool, taken.get(pool, 0)) + sum(self.sums.values())
        return peak


def _peak(group: list[LayerCost], working: Mapping[str, int], taken: Mapping[str, int], place: Place) -> dict[str, int]:
    return functools.reduce(_Held.plus, group, _Held()).peak(working, taken, place)


def _names(groups: list[list[LayerCost]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(layer.name for layer in group) for group in groups)


def _working(measured: Measured, activations: Mapping[str, int], micro_batch: int) -> dict[str, int]:
    """Pool -> bytes that a batch needs while it runs."""
    return {pool: micro_batch * size + measured.fixed.get(pool, 0) for pool, size in activations.items()}


def _largest(peaks: list[dict[str, int]]) -> dict[str, int]:
    return {pool: max(peak.get(pool, 0) for peak in peaks) for pool in peaks[0]}


def _within(peak: Mapping[str, int], budget: Mapping[str, int]) -> bool:
    return all(size <= budget[pool] for pool, size in peak.items())


def _operations_per_byte(measured: Measured) -> Mapping[str, float]:
    return _CPU_OPERATIONS_PER_BYTE if set(measured.activations) == {HOST} else _GPU_OPERATIONS_PER_BYTE


def _pool_name(pool: str) -> str:
    return {HOST: "the host", DISK: "the disk"}.get(pool, pool)
