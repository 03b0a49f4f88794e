"""bitsandbytes' Linear4bit (NF4, FP4): the weight is stored as packed bytes, which cannot require a gradient."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, bnb.nn.Linear4bit)


def _refusal(wrapper: nn.Module, base_layer: nn.Module) -> str | None:
    if not isinstance(wrapper, LoraLinear4bit):
        return (
            "is a 4-bit layer that PEFT wrapped as a plain one, because the model is not marked as loaded in 4-bit "
            "(expected model.is_loaded_in_4bit to be True); load it with AutoModelForCausalLM.from_pretrained and a "
            "BitsAndBytesConfig(load_in_4bit=True), then attach the adapter"
        )
    # FSDP2's shard of a weight has no state; the layer keeps its own.
    state = getattr(base_layer.weight, "quant_state", None) or getattr(base_layer, "quant_state", None)
    if state is None:
        return "is a 4-bit layer that is not quantised yet (expected a quant_state); move the model to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        # On CPUs with AVX512-BF16, bitsandbytes >= 0.49 repacks the weight in an eval-mode forward without gradients
        # and rounds the scales to bfloat16. The packed form has no backward: gradients would vanish silently.
        return (
            "was repacked by an inference forward on this CPU (bitsandbytes does so in eval mode): no gradient flows "
            "through it any more and its scales are rounded; reload the model and call this before any inference"
        )
    return None


def _dense(base_layer: nn.Module) -> Tensor:
    weight: Any = base_layer.weight
    return dequantize_4bit(weight.data, weight.quant_state)


KIND = LayerKind("linear4bit", _accepts, _refusal, keeps_training_flag=True, dense=_dense)
