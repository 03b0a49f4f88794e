"""What an unlearning run finds on the model, and refuses: the adapter in training, those beside it, the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch import nn

from ..errors import AdapterError, ConfigError
from ..gradients import find_blocks
from ..model import tuner_modules
from .settings import UnlearningSettings


def block_of_states(
    model: nn.Module, settings: UnlearningSettings, factors: Mapping[str, nn.Parameter]
) -> nn.Module | None:
    """The decoder block whose hidden states a loss reads, or None if no loss does."""
    if not settings.needs_states:
        return None
    blocks = find_blocks(model)
    layer = settings.layer or (len(blocks) + 1) // 2
    if not 1 <= layer <= len(blocks):
        raise ConfigError(f"layer: expected at most {len(blocks)}, the model's number of blocks, found {layer}")
    after = {id(parameter) for block in blocks[layer:] for parameter in block.parameters()}
    if all(id(parameter) in after for parameter in factors.values()):
        raise ConfigError(
            f"layer: expected a block whose output depends on the adapter in training, found {layer}, which is before "
            "the adapter's first layer; choose a later block, or train an adapter on earlier layers"
        )
    return blocks[layer - 1]


def check_origin(settings: UnlearningSettings, reference: Sequence[str]) -> None:
    """Refuse a loss that reads the origin where that is the full model itself."""
    if settings.reads_origin and not reference:
        raise ConfigError(
            f"forget_loss {settings.forget_loss!r}: expected a task adapter that taught the forget rows (task_adapter, "
            "--task-adapter), found none: the origin, every adapter off, is the full model itself"
        )


def adapter_in_training(model: nn.Module) -> str:
    """The name of the one adapter that requires gradients."""
    if not isinstance(model, PeftModel):
        raise AdapterError(f"expected a PeftModel with a LoRA adapter to train, found a {type(model).__name__}")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in trainable if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        raise AdapterError(f"{others[0]} requires gradients; expected only the factors of one LoRA adapter: freeze it")
    adapters = {name.split(".lora_A." if ".lora_A." in name else ".lora_B.")[1].split(".")[0] for name in trainable}
    if len(adapters) != 1:
        raise AdapterError(
            f"expected one adapter that requires gradients, found {sorted(adapters) or 'none'}; call set_adapter, or "
            "set requires_grad"
        )
    return adapters.pop()


def adapters_beside(model: nn.Module, adapter_name: str) -> list[str]:
    """The other adapters that are on, in the order of activation."""
    on = {name: None for module in tuner_modules(model.modules()) if not module._disable_adapters
          for name in module.active_adapters}  # fmt: skip
    if adapter_name not in on:
        raise AdapterError(f"adapter {adapter_name!r} requires gradients but is off; turn it on")
    return [name for name in on if name != adapter_name]
