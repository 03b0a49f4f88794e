"""What a run will need, from one sample's forward pass: the order of the layers, and what a backward would keep."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..data import Sample, batches
from ..model import HOST, Target, input_device, preserved, sample_losses
from ._taps import Taps
from .blocks import Chain, at_each_block, find_blocks, first_tensor
from .gradient_sums import MOMENT, StatisticName
from .input_moments import Collector
from .plan import LayerCost, Measured

_TRANSIENT = 3  # gradients of the largest tensor kept, beside it


_HEAP = 1.6  # what a C allocator holds of the host for tensors that come and go, over what they are


_CPU_WORKSPACE, _GPU_WORKSPACE = 32 * 2**20, 192 * 2**20


def measure(
    model: nn.Module,
    targets: Sequence[Target],
    sets: Mapping[str, list[Sample]],
    collector: Collector,
    statistic: StatisticName,
    adapters: Sequence[str],
    batch_size: int,
    edit_copies: int = 0,
) -> Measured:
    """Run the longest sample forward once, with the taps on, and drop what its backward would keep after counting it.

    ``edit_copies``: copies of one layer's sums that its edit needs, beyond the three that every edit does.

    Raises:
        NumericalError: via the caller's checks only; nothing is summed here.
    """
    everything = [sample for samples in sets.values() for sample in samples]
    longest = max(everything, key=lambda sample: len(sample.input_ids))
    batch = next(batches([longest], 1)).to(input_device(model))
    batch.attention_mask[0, -1] = 0  # as if padded: masks, which whole samples go without, are counted
    blocks = find_blocks(model)
    count = _Count(model)
    order: dict[int, int] = {}  # id of a module -> when it first ran
    after: dict[int, int] = {}  # id of a module -> elements of the weights that had run before it
    ran = 0
    flat_inputs = False
    largest_input: dict[str, int] = {}  # pool -> bytes of the largest input of a tapped layer
    hidden_bytes = arguments = 0
    tapped = {id(target.base_layer) for target in targets}

    def on_module(module: nn.Module, args: tuple) -> None:
        nonlocal ran, flat_inputs
        if id(module) in order:
            return
        order[id(module)] = len(order)
        after[id(module)] = ran
        ran += _elements(module)
        if id(module) in tapped and args and isinstance(args[0], Tensor):
            flat_inputs = flat_inputs or args[0].dim() != 3
            pool = str(args[0].device)
            largest_input[pool] = max(largest_input.get(pool, 0), args[0].nbytes)

    def before(index: int, args: tuple, kwargs: dict) -> None:
        nonlocal hidden_bytes, arguments
        count.where = index
        if index == 0:
            held = [leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            hidden_bytes = first_tensor(args, kwargs).nbytes
            arguments = sum(held) - hidden_bytes

    def leave(index: int, output: Any) -> None:
        count.where = None

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    leaves = [m for m in model.modules() if m is not embeddings and (id(m) in tapped or _owns_weight(m))]
    with preserved(model, adapters), torch.enable_grad(), Taps(targets, collector, statistic):
        handles = [module.register_forward_pre_hook(on_module) for module in leaves]
        try:
            with (
                at_each_block(blocks, before, leave),
                torch.autograd.graph.saved_tensors_hooks(count.pack, _no_backward),
            ):
                sample_losses(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    members = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    bytes_of = {"mean": 4, "squares": 4}[statistic] * (2 if targets[0].A.dtype == torch.float64 else 1)
    layers = [
        LayerCost(
            name=target.name,
            pool=str(target.A.device),
            statistic=bytes_of * sum(map(math.prod, collector.shapes(target).values())),
            size=target.A.shape[1] * len(target.B),
            after=ran - after.get(id(target.base_layer), 0),
            block=members.get(id(target.base_layer)),
        )
        for target in sorted(targets, key=lambda target: order.get(id(target.base_layer), -1))
    ]
    tokens = sum(found.input_ids.numel() for samples in sets.values() for found in batches(samples, batch_size))
    by_place = count.by_place()
    pools = list(dict.fromkeys([str(input_device(model)), *(str(t.A.device) for t in targets), *count.pools]))
    # Moments are of masked copies of the inputs; the heap keeps one that was freed beside the next.
    copies = 4 if any(key.startswith(MOMENT) for target in targets for key in collector.shapes(target)) else 0
    masked = {pool: copies * largest_input.get(pool, 0) for pool in pools}
    return Measured(
        layers=tuple(layers),
        size=max(ran, 1),
        activations={pool: count.needed(by_place.values(), pool) + masked[pool] for pool in pools},
        block_activations={
            pool: max((count.needed([found], pool) for found in by_place.values()), default=0) + masked[pool]
            for pool in pools
        },
        block_input=hidden_bytes * tokens // len(longest.input_ids),
        blocks=len(blocks) if _in_sequence(blocks, order) else 0,
        samples=len(everything),
        tokens=tokens,
        formed=sum(math.prod(shape) for target in targets for shape in collector.shapes(target).values()),
        one_at_a_time=statistic == "squares" and (flat_inputs or any(target.parameter for target in targets)),
        arguments=arguments * len(everything),
        fixed={
            # The heap does not hand out again for an edit what a batch has left in pieces: both are counted.
            pool: _fixed(model, targets, pool)
            + edit_copies * max((layer.statistic for layer in layers if layer.pool == pool), default=0)
            for pool in pools
        },
        recomputes=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    )


def why_no_chain(model: nn.Module, sets: Mapping[str, list[Sample]], adapters: Sequence[str]) -> str | None:
    """Whether the blocks, run one after the other by themselves, give the gradient that the model as a whole gives; a
    reason where they do not.

    The gradient of a short sample's loss at the first block's input is taken both ways.
    """
    sample = min((s for samples in sets.values() for s in samples), key=lambda s: len(s.input_ids))
    batch = next(batches([sample], 1)).to(input_device(model))
    blocks = find_blocks(model)
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    entered: list[Tensor] = []

    def before(index: int, args: tuple, kwargs: dict) -> Any:
        if index:
            return None
        entered.append(first_tensor(args, kwargs).detach().requires_grad_(True))
        if args:
            return (entered[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": entered[0]}

    with preserved(model, adapters), torch.enable_grad():
        # An offloaded model's weights would otherwise all stay on the GPU for the length of the graph.
        with at_each_block(blocks, before), torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            sample_losses(model, batch).sum().backward()
        whole = entered[0].grad
        gradient = None
        with closing(Chain(model, blocks, 0, "device")) as chain:
            chain.forward(batch, "sample", "the shortest sample")
            if len(chain.calls["sample"]) != len(blocks):
                return f"{len(blocks)} blocks were called {len(chain.calls['sample'])} times"
            for index in reversed(range(len(blocks))):
                gradient = chain.back(index, "sample", to_input=True)
                if gradient is None:
                    return f"no gradient reaches the input of block {index}"
    if whole is None or gradient is None or whole.shape != gradient.shape:
        return "the model as a whole passes no gradient to its first block"
    error = float((whole.double() - gradient.double()).norm() / whole.double().norm().clamp_min(1e-300))
    if not error < (1e-3 if whole.dtype in (torch.float32, torch.float64) else 3e-2):
        return f"block by block the gradient differs by {error:.1%}: blocks share more than their hidden states"
    return None


class _Count:
    """Bytes that a backward would keep, by block and by device; nothing is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.where: int | None = None  # the block that runs
        self.pools: list[str] = []
        self._saved: dict[tuple[int | None, str], list[int]] = defaultdict(list)
        self._seen: dict[int, StorageWeakRef] = {}
        self._weights = {
            t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if not t.is_meta
        }

    def pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        known = self._seen.get(address)
        if address in self._weights or (known is not None and not known.expired()):
            return
        self._seen[address] = StorageWeakRef(storage)
        pool = str(tensor.device)
        if pool not in self.pools:
            self.pools.append(pool)
        self._saved[self.where, pool].append(storage.nbytes())

    def by_place(self) -> dict[int | None, dict[str, list[int]]]:
        found: dict[int | None, dict[str, list[int]]] = defaultdict(dict)
        for (where, pool), sizes in self._saved.items():
            found[where][pool] = sizes
        return found

    @staticmethod
    def needed(places: Any, pool: str) -> int:
        sizes = [size for place in places for size in place.get(pool, [])]
        needed = sum(sizes) + _TRANSIENT * max(sizes, default=0)
        return int(_HEAP * needed) if pool == HOST else needed


def _no_backward(packed: None) -> Tensor:
    raise RuntimeError("nothing was kept for a backward")


def _owns_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def _elements(module: Any) -> int:
    """Elements of a module's weights, packed or not."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


def _fixed(model: nn.Module, targets: Sequence[Target], pool: str) -> int:
    """Bytes that any batch needs on a device: work space of the libraries, and a packed weight as it is unpacked."""
    packed = any(not parameter.is_floating_point() for parameter in model.parameters())
    unpacked = max((4 * _elements(target.base_layer) for target in targets), default=0) if packed else 0
    return unpacked + (_CPU_WORKSPACE if pool == HOST else _GPU_WORKSPACE)


def _in_sequence(blocks: list[nn.Module], order: dict[int, int]) -> bool:
    """Whether the blocks ran one after the other as they are listed."""
    spans = []
    for block in blocks:
        times = [order[id(module)] for module in block.modules() if id(module) in order]
        if not times:
            return False
        spans.append((min(times), max(times)))
    return bool(spans) and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
