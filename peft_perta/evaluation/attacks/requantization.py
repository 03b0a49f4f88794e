"""The stack merged in full precision, then rounded to 4 and 8 bit: does rounding undo the edit?

An edit smaller than half a step of the grid is rounded away, and what was unlearned is back. Each linear layer's weight
with its adapters' deltas, W + sum s B A, is taken in float32, rounded and multiplied with in the model's own type:

- NF4 in blocks of 64 with double quantisation, as QLoRA loads a model (arXiv 2305.14314);
- int8 by the largest absolute value of each row, as LLM.int8 stores weights (arXiv 2208.07339). Its activations are
  rounded too, all but outliers; here they are not, so that the weights' part stands alone.

The output head and embeddings are not rounded: no loader does. The model is never copied: a layer is merged and rounded
at a time, and kept as bitsandbytes packs it (half a byte a weight, or one) beside the model's own.

Reference: Zhang et al. 2024, arXiv 2410.16454.
"""

from __future__ import annotations

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
    preserved,
    require_adapter,
    resolve_layers,
    tuner_modules,
)
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import measured
from .projections import Projection, projections


def _nf4(weight: Tensor) -> Callable[[], Tensor]:
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return partial(dequantize_4bit, packed, state)


def _int8(weight: Tensor) -> Callable[[], Tensor]:
    codes, scales, _ = int8_vectorwise_quant(weight.half())  # LLM.int8 rounds float16
    return partial(int8_vectorwise_dequant, codes, scales)


# Weight [O, I], float32 -> what gives the rounded weight back.
ROUNDINGS: dict[str, Callable[[Tensor], Callable[[], Tensor]]] = {"NF4": _nf4, "int8": _int8}


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        AdapterError: an adapter's delta is not s * B @ A, or is merged.
        UnsupportedLayerError: a weight cannot be read, or a model has experts.
    """
    check_victims(victims, settings)
    for _, subject in victims.subjects():
        with preserved(subject.model, subject.adapters):
            _deltas(subject.model)
            _check_layers(subject.model)


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Numbers]:
        numbers = {"as it is": measured(subject, rows, settings, name)}
        for rounding in ROUNDINGS:
            with preserved(subject.model, subject.adapters), rounded(subject.model, rounding):
                numbers[rounding] = measured(subject, rows, settings, f"{name}, {rounding}")
        return numbers

    return compare("requantization", victims, measure)


ATTACK = Attack("requantization", "Merge the model and round its weights to fewer bits.", check, run)


@contextmanager
def rounded(model: nn.Module, rounding: str) -> Iterator[None]:
    """Within the block every linear layer but the head computes with its merged and rounded weight, whatever adapters
    are switched to.

    Raises:
        NumericalError: a merged weight is not finite.
    """
    deltas = _deltas(model)
    with ExitStack() as replaced, torch.no_grad():
        for projection in projections(model):
            weight = _merged(projection, deltas.get(id(projection.layer), []))
            replaced.enter_context(_forward_of(projection, ROUNDINGS[rounding](weight)))
        yield


def _merged(projection: Projection, targets: list[Target]) -> Tensor:
    """W + sum s B A, [O, I], float32."""
    with align_module_device(projection.layer):  # an offloaded layer has its weight only while it runs
        weight = projection.kind.dense(projection.layer).to(torch.float32, copy=True)  # type: ignore[union-attr,misc]
    for target in targets:
        weight += target.scaling * (target.B.to(weight.device) @ target.A.to(weight.device))
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{projection.name}: the merged weight is not finite; look at the base and the adapters")
    return weight.contiguous()


@contextmanager
def _forward_of(projection: Projection, weight: Callable[[], Tensor]) -> Iterator[None]:
    """What the model calls computes x W^T + bias with this weight."""
    layer: Any = projection.layer
    held = vars(projection.module)
    before = held.get("forward")  # accelerate keeps one there

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.device, x.dtype)
        return nn.functional.linear(x, weight().to(x.device, x.dtype), bias)

    held["forward"] = forward
    try:
        yield
    finally:
        held.pop("forward")
        if before is not None:
            held["forward"] = before


def _deltas(model: nn.Module) -> dict[int, list[Target]]:
    """id of a layer -> its deltas, of the adapters that are on."""
    found: dict[int, list[Target]] = {}
    tuners = [m for m in tuner_modules(model.modules()) if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for name in sorted({name for tuner in tuners for name in tuner.active_adapters}):
        check_lora_config(require_adapter(model, name), name)
        for target in resolve_layers(model, name):
            if name in target.adapted.active_adapters and not target.adapted.disable_adapters:
                found.setdefault(id(target.base_layer), []).append(target)
    return found


def _check_layers(model: nn.Module) -> None:
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
                f"{where} was repacked by an inference forward on this CPU (bitsandbytes does so in eval mode), after "
                "which its weight cannot be read; reload the model and attack it before any inference"
            )
    for name, module in base_model(model).named_modules():
        held = module._parameters.values()
        if any(p is not None and p.dim() == 3 and len(p) > 1 for p in held) and not isinstance(module, nn.Conv1d):
            raise UnsupportedLayerError(
                f"{name}: experts in one tensor [E, out, in] are not rounded alike by all loaders, expected linear "
                "layers; leave the requantization attack out"
            )
