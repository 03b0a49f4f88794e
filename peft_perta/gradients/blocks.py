"""Decoder blocks, run one at a time: each block's input and its other arguments are kept for a second call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..data import Batch
from ..model import base_model
from .gradient_sums import Place
from .passes import run_backward


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's decoder blocks, in the order in which they are listed; empty if there is no such list.

    They are the largest ``nn.ModuleList`` whose modules are all of one class (``model.layers`` in most models).
    """
    lists = [
        list(module)
        for name, module in base_model(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and "lora_" not in name
    ]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    return max(alike, key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_states(output: Any) -> Tensor:
    """The hidden states among a block's outputs."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class _Stored:
    where: Tensor | Path
    device: torch.device  # where the tensor came from, and where it is returned
    copied: Any = None  # the CUDA event of its copy to the host


@dataclass(frozen=True)
class _Shelved:
    key: Any  # of a tensor on a shelf


class Shelf:
    """Tensors by key, kept on the device, on the host or on the disk.

    Between a GPU and the host, tensors travel through pinned memory on two CUDA streams, one each way, while the GPU
    computes.

    Args:
        place: where the tensors are kept.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._stored: dict[Any, _Stored] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="perta-inputs-") if place == "disk" else None
        self._streams: dict[tuple[torch.device, str], Any] = {}

    def put(self, key: Any, tensor: Tensor) -> None:
        """Keep a tensor under a key; a tensor already under that key is replaced."""
        tensor = tensor.detach()
        if self.place == "device" or (self.place == "host" and not tensor.is_cuda):
            self._stored[key] = _Stored(tensor, tensor.device)
        elif self.place == "host":
            stream = self._stream(tensor.device, "to host")
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                pinned.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # the allocator must not reuse it before the copy is done
            self._stored[key] = _Stored(pinned, tensor.device, stream.record_event())
        else:
            path = self._path_of(key)
            torch.save(tensor.cpu(), path)
            self._stored[key] = _Stored(path, tensor.device)

    def get(self, key: Any) -> Tensor:
        """The tensor of a key, on the device that it came from."""
        stored = self._stored[key]
        if isinstance(stored.where, Path):
            return torch.load(stored.where, weights_only=True).to(stored.device)
        if stored.where.device == stored.device:
            return stored.where
        stream = self._stream(stored.device, "to device")
        stream.wait_event(stored.copied)
        with torch.cuda.stream(stream):
            tensor = stored.where.to(stored.device, non_blocking=True)
        current = torch.cuda.current_stream(stored.device)
        current.wait_stream(stream)
        tensor.record_stream(current)
        return tensor

    def drop(self, key: Any) -> None:
        """Forget the tensor of a key."""
        stored = self._stored.pop(key)
        if isinstance(stored.where, Path):
            stored.where.unlink()

    def close(self) -> None:
        """Forget all tensors, and delete their files."""
        self._stored.clear()
        if self._directory is not None:
            self._directory.cleanup()

    def _path_of(self, key: Any) -> Path:
        stored = self._stored.get(key)
        if stored is not None and isinstance(stored.where, Path):
            return stored.where
        assert self._directory is not None
        return Path(self._directory.name) / str(len(self._stored))

    def _stream(self, device: torch.device, way: str) -> Any:
        if (device, way) not in self._streams:
            self._streams[device, way] = torch.cuda.Stream(device)
        return self._streams[device, way]


class Call:
    """The arguments of one call of a block, except its hidden states: the block can be called so again.

    Tensors among the arguments (masks, position embeddings) go to the shelf, once for all blocks that share them.

    Args:
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        shelf: where tensors are kept.
        key: the batch's key.
        shelved: id of a tensor -> the tensor, of those that this batch has on the shelf already; it is added to.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], shelf: Shelf, key: Any, shelved: dict[int, Tensor]) -> None:
        self._by_position = bool(args)
        self._shelf, self._key = shelf, key
        rest = args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        leaves, self._structure = pytree.tree_flatten(rest)
        self._leaves = [self._put(leaf, shelved) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call a block with these arguments and other hidden states; returns the hidden states that come out."""
        leaves = [self._shelf.get(leaf.key) if isinstance(leaf, _Shelved) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        output = block(hidden, *args, **kwargs) if self._by_position else block(hidden_states=hidden, **kwargs)
        return hidden_states(output)

    def _put(self, leaf: Tensor, shelved: dict[int, Tensor]) -> _Shelved:
        key = self._key, "argument", id(leaf)
        if id(leaf) not in shelved:
            shelved[id(leaf)] = leaf  # keeps the tensor alive, so that its id stays unique within the batch
            self._shelf.put(key, leaf)
        return _Shelved(key)


@contextmanager
def at_each_block(
    blocks: list[nn.Module],
    before: Callable[[int, tuple, dict], Any] | None = None,
    after: Callable[[int, Any], Any] | None = None,
) -> Iterator[None]:
    """Within the context, call ``before`` and ``after`` around every block's forward.

    Args:
        blocks: the blocks.
        before: (index of the block, args, kwargs) -> (args, kwargs) to use instead, or None.
        after: (index of the block, output) -> an output to use instead, or None.
    """
    handles = []
    try:
        for index, block in enumerate(blocks):
            if before is not None:

                def on_entry(module: nn.Module, args: tuple, kwargs: dict, index: int = index) -> Any:
                    return before(index, args, kwargs)

                handles.append(block.register_forward_pre_hook(on_entry, with_kwargs=True))
            if after is not None:

                def on_exit(module: nn.Module, args: tuple, output: Any, index: int = index) -> Any:
                    return after(index, output)

                handles.append(block.register_forward_hook(on_exit))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Chain:
    """The blocks from ``lowest`` up: batches run forward through the whole model, and backward block by block.

    Args:
        model: the model.
        blocks: its decoder blocks.
        lowest: the index of the lowest block to run backward through.
        place: where the blocks' inputs and the gradient at the boundary are kept.

    Attributes:
        calls: key of a batch -> the call of each block from the lowest up.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], lowest: int, place: Place) -> None:
        self.model, self.blocks, self.lowest = model, blocks, lowest
        self._inputs, self._gradients = Shelf(place), Shelf(place)
        self.calls: dict[Any, list[Call]] = {}

    def forward(self, batch: Batch, key: Any, name: str) -> None:
        """Run a batch forward; keep its input to every block, and its loss's gradient at the last block's output.

        Nothing below that output requires a gradient, so no graph is built there.

        Raises:
            NumericalError: a sample's loss is not finite; ``name`` is the data set in the message.
        """
        calls: list[Call] = []
        shelved: dict[int, Tensor] = {}
        last: list[Tensor] = []

        def before(index: int, args: tuple, kwargs: dict) -> None:
            if index >= self.lowest:
                self._inputs.put((key, index), first_tensor(args, kwargs))
                calls.append(Call(args, kwargs, self._inputs, key, shelved))

        def after(index: int, output: Any) -> Any:
            if index < len(self.blocks) - 1:
                return None
            last.append(hidden_states(output).detach().requires_grad_(True))
            return last[0] if isinstance(output, Tensor) else (last[0], *output[1:])

        with at_each_block(self.blocks, before, after):
            run_backward(self.model, batch, name)
        self.calls[key] = calls
        self._gradients.put(key, last[0].grad)  # type: ignore[arg-type]

    def back(self, index: int, key: Any, *, to_input: bool) -> Tensor | None:
        """Run a batch through one block again, and backward through it.

        Args:
            index: the block.
            key: the batch.
            to_input: whether to compute the gradient at the block's input, which then replaces the one at its output.

        Returns:
            The gradient at the block's input; None if it is not wanted, or if none reaches the input.
        """
        hidden = self._inputs.get((key, index)).requires_grad_(to_input)
        output = self.calls[key][index - self.lowest].again(self.blocks[index], hidden)
        output.backward(self._gradients.get(key))
        self._inputs.drop((key, index))
        if to_input and hidden.grad is not None:
            self._gradients.put(key, hidden.grad)
        return hidden.grad

    def close(self) -> None:
        """Free everything that is kept."""
        self._inputs.close()
        self._gradients.close()
