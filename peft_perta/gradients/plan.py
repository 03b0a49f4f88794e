"""A plan: which layers are summed in which pass, where sums and inputs live, and how many samples run together.

Everything here is pure: the same measurements and budgets give the same plan.

Costs are in forward-equivalents: 1 is a forward pass over all samples of both sets. Bytes that cross to the host or to
the disk are charged as the floating-point operations that would take as long. The rates are fixed figures of a common
GPU or CPU, not measurements, so that every run gets the same plan.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model import DISK, HOST, show_size
from .gradient_sums import Place

_GPU_OPERATIONS_PER_BYTE = {"device": 0.0, "host": 5_000.0, "disk": 50_000.0}
_CPU_OPERATIONS_PER_BYTE = {"device": 0.0, "host": 0.0, "disk": 100.0}
_EDIT_COPIES = 3  # of one layer's sums while it is edited: magnitudes, weights, edit
_TOKENS_OF_OVERHEAD = 64  # the fixed cost of a batch (dequantising, kernel launches), in tokens
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LayerCost:
    """What one target layer costs.

    Attributes:
        name: the layer's name.
        pool: the memory pool of the layer's device.
        sum_bytes: bytes of one set's sums.
        size: elements of the weight.
        after: elements of all weights that run with this layer or after it.
        block: the index of the layer's decoder block; None outside of the blocks.
    """

    name: str
    pool: str
    sum_bytes: int
    size: int
    after: int
    block: int | None


@dataclass(frozen=True)
class Measured:
    """What a forward pass of the longest sample showed.

    Attributes:
        layers: the target layers, in forward order.
        size: elements of all weights that run.
        activations: pool -> bytes per sample that a backward pass through the whole model keeps and needs.
        block_activations: pool -> the same for the most demanding block, or for the part after the blocks.
        block_input: bytes of one block's input, over both sets.
        blocks: the number of decoder blocks; 0 if they do not run one after the other.
        samples: the number of samples in both sets.
        tokens: the number of tokens in both sets, padding included.
        formed: elements that are formed for all layers' sums; each takes a product with every token.
        one_at_a_time: whether samples must run one at a time, because a batch would not say which token belongs to
            which sample.
        recomputes: whether gradient checkpointing is on.
        arguments: bytes of the blocks' other arguments (masks), over both sets.
        fixed: pool -> bytes that are needed whatever the batch size: unpacked weights, work space, and what an edit
            needs beyond a few copies of its sums (input directions, fits).
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
    def on_host(self) -> bool:
        """Whether the model runs on the CPU alone: its device is then the host."""
        return set(self.activations) == {HOST}

    @property
    def lowest_block(self) -> int:
        """The lowest block that holds a target."""
        return min((layer.block for layer in self.layers if layer.block is not None), default=0)

    @property
    def has_chain(self) -> bool:
        """Whether all targets lie in blocks that run one after the other, or after the last block."""
        last = max((i for i, layer in enumerate(self.layers) if layer.block is not None), default=-1)
        return self.blocks > 0 and last >= 0 and all(layer.block is not None for layer in self.layers[:last])


@dataclass(frozen=True)
class Memory:
    """Memory by pool: a GPU, the host or the disk.

    Attributes:
        taken: pool -> bytes in use already, mainly by the model.
        budget: pool -> the most bytes in use at any time.
    """

    taken: Mapping[str, int]
    budget: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """How the sums are computed.

    Attributes:
        mode: the name of the mode that runs the plan.
        groups: layers whose sums are in memory together, in the order in which the groups are computed.
        sums_place: where the sums live.
        inputs_place: where the blocks' inputs live, if the mode keeps them.
        micro_batch: the number of samples that run together.
        description: how the mode visits the layers, in words; further entries are shown on lines of their own.
        peak: pool -> the predicted peak in bytes, the model included.
        budget: pool -> the most bytes allowed.
        cost: the predicted cost in forward-equivalents.
    """

    mode: str
    groups: Groups
    sums_place: Place
    inputs_place: Place
    micro_batch: int
    description: tuple[str, ...] = ()
    peak: Mapping[str, int] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)
    cost: float = math.nan

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan whose ``dataclasses.asdict`` went through JSON."""
        groups = tuple(tuple(group) for group in values["groups"])
        return cls(**{**values, "groups": groups, "description": tuple(values["description"])})

    def fits(self) -> bool:
        """Whether the predicted peak is within the budget of every pool."""
        return within(self.peak, self.budget)

    def __str__(self) -> str:
        how, *further = self.description or (self.mode,)
        samples = f"{self.micro_batch} sample{'s' if self.micro_batch > 1 else ''} at a time"
        layers = sum(map(len, self.groups))
        peaks = ", ".join(
            f"{show_size(self.peak[pool])} of {show_size(self.budget[pool])} on {_pool_name(pool)}"
            for pool in self.peak
        )
        lines = [
            f"plan: {layers} layers, {how}; sums on the {self.sums_place}; {samples}",
            *further,
            f"predicted peak {peaks}",
            f"predicted cost {self.cost:.2f} forward-equivalents (a plain LoRA forward and backward is 2)",
        ]
        return "\n      ".join(lines)


# The arithmetic that the modes share.


@dataclass(frozen=True)
class GroupSums:
    """The sums of a group of layers.

    Attributes:
        bytes_by_pool: pool -> bytes of both sets' sums.
        largest: pool -> bytes of one set's sums of the largest layer.
    """

    bytes_by_pool: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)

    def plus(self, layer: LayerCost) -> GroupSums:
        """The sums of the group and one more layer."""
        pool, size = layer.pool, layer.sum_bytes
        return GroupSums(
            {**self.bytes_by_pool, pool: self.bytes_by_pool.get(pool, 0) + 2 * size},
            {**self.largest, pool: max(self.largest.get(pool, 0), size)},
        )

    def peak(self, working: Mapping[str, int], taken: Mapping[str, int], place: Place) -> dict[str, int]:
        """Pool -> peak: both sets' sums, and beside them what a batch or one layer's edit needs, whichever is more."""
        peak = {}
        for pool in working:
            sums = self.bytes_by_pool.get(pool, 0) if place == "device" else 0
            peak[pool] = taken.get(pool, 0) + sums + max(working[pool], _EDIT_COPIES * self.largest.get(pool, 0))
        if place != "device":
            pool = HOST if place == "host" else DISK
            peak[pool] = peak.get(pool, taken.get(pool, 0)) + sum(self.bytes_by_pool.values())
        return peak


def peak_of_groups(
    groups: Iterable[Iterable[LayerCost]], working: Mapping[str, int], taken: Mapping[str, int], place: Place
) -> dict[str, int]:
    """Pool -> the peak of the group that needs most of it.

    Args:
        groups: the layers of each group.
        working: pool -> bytes that a batch needs, as ``working_memory`` gives them.
        taken: pool -> bytes in use already.
        place: where the sums live.
    """
    peaks = [functools.reduce(GroupSums.plus, group, GroupSums()).peak(working, taken, place) for group in groups]
    return {pool: max(peak.get(pool, 0) for peak in peaks) for pool in peaks[0]}


def working_memory(measured: Measured, activations: Mapping[str, int], micro_batch: int) -> dict[str, int]:
    """Pool -> bytes that a batch needs while it runs."""
    return {pool: micro_batch * size + measured.fixed.get(pool, 0) for pool, size in activations.items()}


def within(peak: Mapping[str, int], budget: Mapping[str, int]) -> bool:
    """Whether no pool's peak exceeds its budget."""
    return all(size <= budget[pool] for pool, size in peak.items())


def names_of(groups: Iterable[Iterable[LayerCost]]) -> Groups:
    """The layers' names."""
    return tuple(tuple(layer.name for layer in group) for group in groups)


def crossing_cost(measured: Measured, moved: float, place: Place) -> float:
    """Forward-equivalents of moving ``moved`` bytes to a place and back."""
    per_byte = (_CPU_OPERATIONS_PER_BYTE if measured.on_host else _GPU_OPERATIONS_PER_BYTE)[place]
    return moved * per_byte / (2 * measured.size * measured.tokens)


def priced(plan: Plan, peak: Mapping[str, int], budget: Mapping[str, int], cost: float, measured: Measured) -> Plan:
    """The plan with its peak, its budget, and its cost with every batch's fixed overhead."""
    length = measured.tokens / measured.samples
    cost *= 1 + _TOKENS_OF_OVERHEAD / (plan.micro_batch * length)
    return dataclasses.replace(plan, peak=dict(peak), budget=dict(budget), cost=cost)


def _pool_name(pool: str) -> str:
    return {HOST: "the host", DISK: "the disk"}.get(pool, pool)
