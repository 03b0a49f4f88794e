"""Hashes of the weights that a model holds in memory.

This file imports nothing of the package: ``verify`` also runs it in a process that knows only PEFT and transformers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_WORD = 8  # bytes
_BLOCK = 1024  # words
_BLOCKS_AT_ONCE = 1024  # 8 MiB, whose products are in memory beside them
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # spreads small numbers over all bits, as in Fibonacci hashing


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a model's weights and persistent buffers.

    Offloaded weights and the scales of bitsandbytes are included, the weights of adapters are not.

    Args:
        model: the transformers model.
    """
    return _hash(model, rounded=False)


def hash_rounded_weights(model: nn.Module) -> str | None:
    """The same of the weights in bfloat16, whichever of float32 and bfloat16 they were loaded in.

    None where rounding does not give what other loads of the same files give: for quantised and float16 weights, and
    for a model without weights.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None or _is_empty(model):
        return None
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return None
    return _hash(model, rounded=True)


def hash_embeddings(model: Any) -> str | None:
    """SHA-256 of the input embeddings in bfloat16, which no quantisation touches.

    None for embeddings in float16, where rounding gives other numbers, and for a model without weights.
    """
    embeddings = model.get_input_embeddings()
    if _is_empty(model) or embeddings.weight.dtype == torch.float16:
        return None
    with align_module_device(embeddings):
        weight = _whole(embeddings.weight).to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    """The values of a tensor, gathered from all processes where FSDP2 shards it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _is_empty(model: nn.Module) -> bool:
    """Whether a weight is on the meta device and is not merely offloaded."""
    return any(
        parameter.is_meta and not hasattr(module, "_hf_hook")
        for name, module in model.named_modules()
        if "lora_" not in name
        for parameter in module.parameters(recurse=False)
    )


def _hash(model: nn.Module, *, rounded: bool) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        with align_module_device(module):
            for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in sorted(tensors.items()):  # PEFT takes parameters of experts out, and puts them back
                    if tensor is None or (kind == "buffer" and key in module._non_persistent_buffers_set):
                        continue
                    for part in (tensor, *_scales(module, tensor)):
                        values = _whole(part)
                        if rounded and values.is_floating_point():
                            values = values.to(torch.bfloat16)
                        path = f"{name}.{key}".replace(".base_layer", "")
                        digest.update(f"{path} {values.dtype} {tuple(values.shape)}".encode())
                        _add_values(digest, values)
    return digest.hexdigest()


def _add_values(digest: Any, values: Tensor) -> None:
    """Add every value: of each block the sum of its words, each times a number of its place, and all bytes of the rest.

    A sum of integers is exact in any order, so a GPU takes it as fast as it reads its memory, and only the sums leave
    it. The numbers are odd: the sum depends on every bit, and on the order of the words.
    """
    data = values.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % _WORD:
        data = data.clone()
    whole = data.numel() - data.numel() % (_WORD * _BLOCK)
    odd = (torch.arange(_BLOCK, device=data.device) * _FACTOR) | 1
    for blocks in data[:whole].view(torch.int64).view(-1, _BLOCK).split(_BLOCKS_AT_ONCE):
        digest.update((blocks * odd).sum(1).to("cpu").numpy().tobytes())
    digest.update(data[whole:].to("cpu").contiguous().numpy().tobytes())


def _scales(module: nn.Module, weight: Any) -> list[Tensor]:
    """The quantisation scales and offset of a bitsandbytes weight; empty for other weights."""
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)  # a shard has no state
    nested = getattr(state, "state2", None)
    row_scales = getattr(weight, "SCB", None)
    if row_scales is None:  # the first forward moved them to the layer's state
        row_scales = getattr(getattr(module, "state", None), "SCB", None)
    scales = [
        getattr(state, "absmax", None), getattr(state, "offset", None), getattr(nested, "absmax", None), row_scales
    ]  # fmt: skip
    return [part for part in scales if isinstance(part, Tensor)]
