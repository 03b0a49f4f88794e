"""Decoder blocks, run one at a time: what goes into each, and what they are called with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..data import Batch
from ..model import base_model, input_device, sample_losses
from .gradient_sums import Place
from .job import check_losses


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in the order in which they are listed; empty where there is no such list.

    They are the largest ``nn.ModuleList`` whose modules are of one class (in most models ``model.layers``).
    """
    lists = [
        list(module)
        for name, module in base_model(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and "lora_" not in name
    ]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    return max(alike, key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among what a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_states(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class _Kept:
    what: Any  # a tensor, or the path of one
    device: torch.device  # where it came from, and goes back to
    copied: Any = None  # the event of its copy to the host


@dataclass(frozen=True)
class _Shelved:
    key: Any


class Shelf:
    """Tensors by name, kept on the device, on the host or on the disk.

    Between a GPU and the host they travel through pinned memory on streams of their own, one each way, while the GPU
    computes.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._held: dict[Any, _Kept] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="perta-inputs-") if place == "disk" else None
        self._streams: dict[tuple[torch.device, str], Any] = {}

    def put(self, key: Any, tensor: Tensor) -> None:
        tensor = tensor.detach()
        if self.place == "device" or (self.place == "host" and not tensor.is_cuda):
            self._held[key] = _Kept(tensor, tensor.device)
        elif self.place == "host":
            stream = self._stream(tensor.device, "down")
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                kept.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # not to be reused before the copy is done
            self._held[key] = _Kept(kept, tensor.device, stream.record_event())
        else:
            assert self._directory is not None
            path = self._held[key].what if key in self._held else Path(self._directory.name) / str(len(self._held))
            torch.save(tensor.cpu(), path)
            self._held[key] = _Kept(path, tensor.device)

    def get(self, key: Any) -> Tensor:
        kept = self._held[key]
        if isinstance(kept.what, Path):
            return torch.load(kept.what, weights_only=True).to(kept.device)
        if kept.what.device == kept.device:
            return kept.what
        stream = self._stream(kept.device, "up")
        stream.wait_event(kept.copied)
        with torch.cuda.stream(stream):
            tensor = kept.what.to(kept.device, non_blocking=True)
        current = torch.cuda.current_stream(kept.device)
        current.wait_stream(stream)
        tensor.record_stream(current)
        return tensor

    def drop(self, key: Any) -> None:
        kept = self._held.pop(key)
        if isinstance(kept.what, Path):
            kept.what.unlink()

    def close(self) -> None:
        self._held.clear()
        if self._directory is not None:
            self._directory.cleanup()

    def _stream(self, device: torch.device, way: str) -> Any:
        if (device, way) not in self._streams:
            self._streams[device, way] = torch.cuda.Stream(device)
        return self._streams[device, way]


class Call:
    """How a block was called, but for its hidden states; it can be called so again.

    Tensors among the arguments (masks, position embeddings) go to the shelf, once for all blocks that share them.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], shelf: Shelf, key: Any, shelved: dict[int, Tensor]) -> None:
        self._by_position = bool(args)
        self._shelf, self._key = shelf, key
        rest = args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        leaves, self._structure = pytree.tree_flatten(rest)
        self._leaves = [self._put(leaf, shelved) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        leaves = [self._shelf.get(leaf.key) if isinstance(leaf, _Shelved) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        output = block(hidden, *args, **kwargs) if self._by_position else block(hidden_states=hidden, **kwargs)
        return hidden_states(output)

    def _put(self, leaf: Tensor, shelved: dict[int, Tensor]) -> _Shelved:
        key = self._key, "argument", id(leaf)
        if id(leaf) not in shelved:  # which also keeps the tensor, and so its id, until the whole batch is through
            shelved[id(leaf)] = leaf
            self._shelf.put(key, leaf)
        return _Shelved(key)


@contextmanager
def at_each_block(blocks: list[nn.Module], before: Any = None, after: Any = None) -> Iterator[None]:
    """Within the block, ``before(index, args, kwargs)`` and ``after(index, output)`` are called around every block;
    what they return, if anything, takes the place of the arguments or the output."""
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
    """The blocks from ``lowest`` up, for batches that run forward through the whole model, and back block by block.

    Args:
        place: where every block's input and the gradient at the boundary are kept.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], lowest: int, place: Place) -> None:
        self.model, self.blocks, self.lowest = model, blocks, lowest
        self._inputs, self._gradients = Shelf(place), Shelf(place)
        self.calls: dict[Any, list[Call]] = {}  # of a batch: one a block

    def forward(self, batch: Batch, key: Any, name: str) -> None:
        """Keep a batch's input to every block, and its loss's gradient at the last block's output.

        Nothing below that output requires a gradient, so no graph is built there.

        Raises:
            NumericalError: a sample's loss is not finite.
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
            losses = sample_losses(self.model, batch.to(input_device(self.model)))
        check_losses(losses, batch, name)
        losses.sum().backward()
        self.calls[key] = calls
        self._gradients.put(key, last[0].grad)  # type: ignore[arg-type]

    def back(self, index: int, key: Any, *, to_input: bool) -> Tensor | None:
        """Run a batch through one block again, and its gradient back; the gradient at the block's input takes the place
        of the one at its output, and is returned, where it is wanted."""
        hidden = self._inputs.get((key, index)).requires_grad_(to_input)
        output = self.calls[key][index - self.lowest].again(self.blocks[index], hidden)
        output.backward(self._gradients.get(key))
        self._inputs.drop((key, index))
        if to_input and hidden.grad is not None:
            self._gradients.put(key, hidden.grad)
        return hidden.grad

    def close(self) -> None:
        self._inputs.close()
        self._gradients.close()
