"""What a job needs, measured by one forward pass: the order of the layers, and what a backward pass would keep."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..data import Sample, batches
from ..model import HOST, input_device, preserved, sample_losses
from ._taps import Taps
from .blocks import at_each_block, find_blocks, first_tensor
from .gradient_sums import rows_of_a_gram_block
from .job import Job
from .plan import LayerCost, Measured

_TRANSIENT = 3  # gradients of the size of the largest tensor kept, beside it
_HEAP = 1.6  # host memory that the C allocator holds for temporary tensors, over the bytes in them
_GATHERED_COPIES = 4  # of a block's weights: it runs while the next one is fetched, and each came in a buffer
_INPUT_COPIES = 3  # of an input while its moments are taken: one in 32 bits on a CPU, and a part of it, masked
_CPU_WORKSPACE, _GPU_WORKSPACE = 32 * 2**20, 192 * 2**20


def measure(job: Job) -> Measured:
    """Run the longest sample forward once, with the taps on, and count what its backward pass would keep.

    Nothing is kept and nothing is summed.
    """
    samples = [sample for of_set in job.samples.values() for sample in of_set]
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    blocks = find_blocks(job.model)
    trace = _traced_forward(job, longest, blocks)
    layers = _layer_costs(job, trace, blocks)
    tokens = sum(
        batch.input_ids.numel() for of_set in job.samples.values() for batch in batches(of_set, job.limits.batch_size)
    )
    devices = [str(input_device(job.model)), *(str(target.A.device) for target in job.targets), *trace.saved.pools]
    pools = list(dict.fromkeys(devices))
    with_moments = any(job.collector.moment_shapes(target) for target in job.targets)
    copied = {pool: with_moments * _INPUT_COPIES * trace.largest_input.get(pool, 0) for pool in pools}
    by_block = trace.saved.by_block()
    any_experts = any(target.parameter for target in job.targets)
    return Measured(
        layers=tuple(layers),
        size=max(trace.elements, 1),
        activations={pool: _needed(by_block.values(), pool) + copied[pool] for pool in pools},
        block_activations={
            pool: max((_needed([of_block], pool) for of_block in by_block.values()), default=0) + copied[pool]
            for pool in pools
        },
        block_input=trace.hidden_bytes * tokens // len(longest.input_ids),
        blocks=len(blocks) if _in_sequence(blocks, trace.order) else 0,
        samples=len(samples),
        tokens=tokens,
        formed=sum(map(job.collector.formed, job.targets)),
        one_at_a_time=job.statistic == "squares" and (trace.flat_inputs or any_experts),
        arguments=trace.argument_bytes * len(samples),
        fixed={pool: _fixed(job, layers, pool) for pool in pools},
        recomputes=any(getattr(module, "gradient_checkpointing", False) for module in job.model.modules()),
    )


class _Trace:
    """What hooks see during the forward pass.

    Attributes:
        order: id of a module -> its place in the forward order.
        before: id of a module -> elements of the weights that ran before it.
        elements: elements of all weights that ran.
        flat_inputs: whether a tapped layer's input has lost the batch dimension.
        largest_input: pool -> bytes of the largest input of a tapped layer.
        hidden_bytes: bytes of the first block's hidden states.
        argument_bytes: bytes of the first block's other arguments.
        saved: what autograd wants to save.
    """

    def __init__(self, model: nn.Module, tapped: Collection[int]) -> None:
        self.order: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.elements = 0
        self.flat_inputs = False
        self.largest_input: dict[str, int] = {}
        self.hidden_bytes = self.argument_bytes = 0
        self.saved = _SavedBytes(model)
        self._tapped = tapped

    def on_module(self, module: nn.Module, args: tuple) -> None:
        """A forward pre-hook of every module that owns a weight or is tapped."""
        if id(module) in self.order:
            return
        self.saved.exclude(module.parameters())  # FSDP2 has just gathered them, and frees them after the forward pass
        self.order[id(module)] = len(self.order)
        self.before[id(module)] = self.elements
        self.elements += _elements(module)
        if id(module) in self._tapped and args and isinstance(args[0], Tensor):
            self.flat_inputs = self.flat_inputs or args[0].dim() != 3
            pool = str(args[0].device)
            self.largest_input[pool] = max(self.largest_input.get(pool, 0), args[0].nbytes)

    def on_block(self, index: int, args: tuple, kwargs: dict) -> None:
        """Called before every decoder block."""
        self.saved.block = index
        if index == 0:
            sizes = [leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.hidden_bytes = first_tensor(args, kwargs).nbytes
            self.argument_bytes = sum(sizes) - self.hidden_bytes

    def on_block_end(self, index: int, output: Any) -> None:
        """Called after every decoder block."""
        self.saved.block = None


class _SavedBytes:
    """Bytes that autograd saves for a backward pass, by block and by pool. The tensors themselves are dropped.

    Attributes:
        block: the index of the block that runs; None outside of the blocks.
        pools: the pools of the saved tensors, in the order of their first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.block: int | None = None
        self.pools: list[str] = []
        self._sizes: dict[tuple[int | None, str], list[int]] = defaultdict(list)
        self._seen: dict[int, StorageWeakRef] = {}
        self._weights: set[int] = set()
        self.exclude((*model.parameters(), *model.buffers()))

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Take these tensors for weights, which are in memory anyway. A storage is known by its own address: that of
        its bytes changes when it is freed and filled again."""
        whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        self._weights |= {tensor.untyped_storage()._cdata for tensor in whole if not tensor.is_meta}

    def pack(self, tensor: Tensor) -> None:
        """The pack hook of ``saved_tensors_hooks``; each storage counts once, the model's own not at all."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        seen = self._seen.get(address)
        if storage._cdata in self._weights or (seen is not None and not seen.expired()):
            return
        self._seen[address] = StorageWeakRef(storage)
        pool = str(tensor.device)
        if pool not in self.pools:
            self.pools.append(pool)
        self._sizes[self.block, pool].append(storage.nbytes())

    def by_block(self) -> dict[int | None, dict[str, list[int]]]:
        """Block -> pool -> sizes of the saved tensors."""
        by_block: dict[int | None, dict[str, list[int]]] = defaultdict(dict)
        for (block, pool), sizes in self._sizes.items():
            by_block[block][pool] = sizes
        return by_block


def _traced_forward(job: Job, sample: Sample, blocks: list[nn.Module]) -> _Trace:
    """Run one sample forward, and see what happens."""
    model = job.model
    batch = next(batches([sample], 1)).to(input_device(model))
    batch.attention_mask[0, -1] = 0  # a padded batch has masks, which an unpadded one goes without
    tapped = {id(target.base_layer) for target in job.targets}
    trace = _Trace(model, tapped)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hooked = {*tapped, *map(id, blocks), *(id(m) for m in model.modules() if m._parameters.get("weight") is not None)}
    modules = [m for m in model.modules() if id(m) in hooked and m is not embeddings]
    taps = Taps(job.targets, job.collector, job.statistic)
    with preserved(model, job.adapters), torch.enable_grad(), taps, ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(trace.on_module).remove)
        hooks.enter_context(at_each_block(blocks, trace.on_block, trace.on_block_end))
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(trace.saved.pack, _no_backward))
        sample_losses(model, batch)
    return trace


def _layer_costs(job: Job, trace: _Trace, blocks: list[nn.Module]) -> list[LayerCost]:
    """The costs of the target layers, in forward order."""
    block_of = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    element_bytes = torch.promote_types(job.targets[0].A.dtype, torch.float32).itemsize
    return [
        LayerCost(
            name=target.name,
            pool=str(target.A.device),
            sum_bytes=element_bytes * job.collector.elements(target),
            size=target.A.shape[1] * len(target.B),
            after=trace.elements - trace.before.get(id(target.base_layer), 0),
            block=block_of.get(id(target.base_layer)),
        )
        for target in sorted(job.targets, key=lambda target: trace.order.get(id(target.base_layer), -1))
    ]


def _needed(blocks: Iterable[Mapping[str, Sequence[int]]], pool: str) -> int:
    """Bytes of a pool that the backward pass through these blocks keeps and needs."""
    sizes = [size for by_pool in blocks for size in by_pool.get(pool, [])]
    needed = sum(sizes) + _TRANSIENT * max(sizes, default=0)
    return int(_HEAP * needed) if pool == HOST else needed


def _fixed(job: Job, layers: Sequence[LayerCost], pool: str) -> int:
    """Bytes of a pool that are needed whatever the batch size.

    They are the libraries' work space, a packed weight while it is unpacked, the weights that FSDP2 has gathered, a
    block of a second moment while it is formed, and the copies that an edit makes: those are counted beside a batch,
    because the heap does not reuse for an edit what a batch has left fragmented.
    """
    packed = any(not parameter.is_floating_point() for parameter in job.model.parameters())
    unpacked = max((4 * _elements(target.base_layer) for target in job.targets), default=0) if packed else 0
    edited = job.edit_copies * max((layer.sum_bytes for layer in layers if layer.pool == pool), default=0)
    widths = {target.A.shape[1] for target in job.targets if job.collector.moment_shapes(target)}
    block = 4 * max((rows_of_a_gram_block(width) * width for width in widths), default=0)
    return _gathered(job.model, pool) + unpacked + (_CPU_WORKSPACE if pool == HOST else _GPU_WORKSPACE) + block + edited


def _gathered(model: nn.Module, pool: str) -> int:
    """Bytes of a pool that FSDP2 fills with gathered weights: all outside of the blocks, and two blocks."""

    def size(module: nn.Module) -> int:
        sharded = [parameter for parameter in module.parameters() if isinstance(parameter, DTensor)]
        return sum(parameter.numel() * parameter.itemsize for parameter in sharded if str(parameter.device) == pool)

    of_blocks = [size(block) for block in find_blocks(model)]
    return size(model) - sum(of_blocks) + _GATHERED_COPIES * max(of_blocks, default=0)


def _no_backward(packed: None) -> Tensor:
    raise RuntimeError("nothing was kept for a backward pass")


def _elements(module: Any) -> int:
    """Elements of a module's weights, packed or not."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


def _in_sequence(blocks: list[nn.Module], order: Mapping[int, int]) -> bool:
    """Whether the blocks ran one after the other, in the order in which they are listed."""
    spans = []
    for block in blocks:
        times = [order[id(module)] for module in block.modules() if id(module) in order]
        if not times:
            return False
        spans.append((min(times), max(times)))
    return bool(spans) and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
