"""Requantization attack: merge the adapters in full precision, round to 4 and 8 bit, and measure what comes back; and
round the base to 4 bit below the adapters, as QLoRA serves them.

An edit smaller than half a quantisation step is rounded away, and one that just suffices may not on a base that moved.
Each linear layer computes with its merged weight W + sum s B A [O, I], taken in float32, rounded, and cast to the
model's own dtype:

- NF4 in blocks of 64 with double quantisation, as QLoRA loads a model (arXiv 2305.14314);
- int8 scaled by the largest absolute value of each row, as LLM.int8 stores weights (arXiv 2208.07339). LLM.int8 also
  rounds activations except outliers; here they stay, so that only the effect of rounding the weights is measured;
- Q8_0 and Q4_1 in blocks of 32, as llama.cpp and Ollama serve a GGUF, by the package gguf where it is installed. (Its
  Q4_K needs llama.cpp's own tool: convert the merged model, and evaluate the file.)

Output head and embeddings are not rounded, as in every loader. Layers are merged and rounded one at a time. The rounded
weights stand beside the model's own: unpacked if twice the memory for them is free, else packed (half a byte or one
byte per weight), and then unpacked in each forward.

Reference: Zhang et al. 2024, arXiv 2410.16454.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import NumericalError, UnsupportedLayerError
from ...model import (
    LAYER_KINDS,
    Target,
    base_model,
    check_lora_config,
    free_memory,
    input_device,
    preserved,
    require_adapter,
    resolve_layers,
    tuner_modules,
)
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import measured
from .projections import Projection, projections
from .stand_in import standing_in


def _nf4(weight: Tensor) -> Callable[[], Tensor]:
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return partial(dequantize_4bit, packed, state)


def _int8(weight: Tensor) -> Callable[[], Tensor]:
    codes, scales, _ = int8_vectorwise_quant(weight.half())  # LLM.int8 rounds float16
    return partial(int8_vectorwise_dequant, codes, scales)


def _gguf(name: str, weight: Tensor) -> Callable[[], Tensor]:
    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[name]
    if weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16  # as converters do with rows that are no whole number of blocks
    packed = gguf.quants.quantize(weight.cpu().numpy(), kind)
    return lambda: torch.from_numpy(gguf.quants.dequantize(packed, kind))


# Weight [O, I], float32 -> a function that returns the rounded weight.
ROUNDINGS: dict[str, Callable[[Tensor], Callable[[], Tensor]]] = {"NF4": _nf4, "int8": _int8}
if importlib.util.find_spec("gguf"):
    ROUNDINGS |= {f"GGUF {name}": partial(_gguf, name) for name in ("Q8_0", "Q4_1")}


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        AdapterError: an adapter's delta is not s B A, or the adapter is merged.
        UnsupportedLayerError: a weight cannot be read, or a model has packed experts.
    """
    check_victims(victims, settings)
    for _, subject in victims.subjects():
        with preserved(subject.model, subject.adapters):
            _deltas(subject.model)
            _check_layers(subject.model)


BESIDE = "NF4 below the adapters"


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """Every model as it is, with its merged weights rounded in each way, and with its base's weights rounded to NF4."""
    rows = attacked_rows(victims, settings)
    ways = {**{rounding: (rounding, True) for rounding in ROUNDINGS}, BESIDE: ("NF4", False)}

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        numbers = {"as it is": measured(subject, rows, settings, name)}
        for way, (rounding, merged) in ways.items():
            with preserved(subject.model, subject.adapters), rounded(subject.model, rounding, merged=merged):
                numbers[way] = measured(subject, rows, settings, f"{name}, {way}")
        return numbers

    return compare("requantization", victims, measure)


ATTACK = Attack("requantization", "Merge the model and round its weights to fewer bits.", check, run)


@contextmanager
def rounded(model: nn.Module, rounding: str, *, merged: bool = True) -> Iterator[None]:
    """Within the block, every linear layer but the head computes with its rounded weight.

    Args:
        model: the model.
        rounding: a key of ``ROUNDINGS``.
        merged: merge the adapters that are on when the block is entered, before rounding; switching adapters inside
            has then no effect. Otherwise the base alone is rounded, and the adapters compute beside it.

    Raises:
        NumericalError: a merged weight is not finite.
    """
    deltas, layers = _deltas(model) if merged else {}, projections(model)
    weights = sum(outputs * inputs for outputs, inputs in (projection.shape for projection in layers))
    dtype: Any = base_model(model).dtype
    unpacked = 2 * weights * dtype.itemsize <= free_memory(input_device(model))
    with ExitStack() as replaced, torch.no_grad():
        for projection in layers:
            weight = _merged(projection, deltas.get(id(projection.layer), []))
            forward = _forward_of(projection, ROUNDINGS[rounding](weight), unpacked=unpacked)
            replaced.enter_context(standing_in(projection.module if merged else projection.layer, forward))
        yield


def _merged(projection: Projection, targets: list[Target]) -> Tensor:
    """W + sum s B A, [O, I], float32."""
    with align_module_device(projection.layer):  # loads the weight of an offloaded layer
        weight = projection.kind.dense(projection.layer).to(torch.float32, copy=True)  # type: ignore[union-attr,misc]
    for target in targets:
        weight += target.scaling * (target.B.to(weight.device) @ target.A.to(weight.device))
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(
            f"{projection.name}: the merged weight is not finite; check the base and the adapters for overflow"
        )
    return weight.contiguous()


def _forward_of(projection: Projection, weight: Callable[[], Tensor], *, unpacked: bool) -> Callable[..., Tensor]:
    """x -> x W^T + bias with this weight, which is kept unpacked from the first call on, or unpacked in each."""
    layer: Any = projection.layer

    def weight_as(device: torch.device, dtype: torch.dtype) -> Tensor:
        return weight().to(device, dtype)

    weight_as = functools.lru_cache(maxsize=1)(weight_as) if unpacked else weight_as

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.device, x.dtype)
        return nn.functional.linear(x, weight_as(x.device, x.dtype), bias)

    return forward


def _deltas(model: nn.Module) -> dict[int, list[Target]]:
    """id of a base layer -> its targets in the active adapters."""
    deltas: dict[int, list[Target]] = {}
    tuners = [m for m in tuner_modules(model.modules()) if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for name in sorted({name for tuner in tuners for name in tuner.active_adapters}):
        check_lora_config(require_adapter(model, name), name)
        for target in resolve_layers(model, name):
            if name in target.adapted.active_adapters and not target.adapted.disable_adapters:
                deltas.setdefault(id(target.base_layer), []).append(target)
    return deltas


def _check_layers(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedLayerError: a weight cannot be read, or the model has packed experts.
    """
    for projection in projections(model):
        where, layer = projection.name, projection.layer
        if projection.kind is None or projection.kind.dense is None:
            accepted = ", ".join(kind.name for kind in LAYER_KINDS if kind.dense)
            raise UnsupportedLayerError(
                f"{where}: the weight of a {type(layer).__name__} cannot be read to be rounded, expected one of: "
                f"{accepted}; leave the requantization attack out"
            )
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedLayerError(
                f"{where} was repacked by an inference forward on this CPU (bitsandbytes does so in eval mode) and "
                "cannot be read; reload the model and attack it before any inference"
            )
    for name, module in base_model(model).named_modules():
        parameters = module._parameters.values()
        if any(p is not None and p.dim() == 3 and len(p) > 1 for p in parameters) and not isinstance(module, nn.Conv1d):
            raise UnsupportedLayerError(
                f"{name.replace('.base_layer', '')}: expected linear layers, found experts in one tensor [E, out, in], "
                "which loaders round in different ways; leave the requantization attack out"
            )
