"""What a run was made with: the base model, and the versions of the packages."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch import nn

from ...model import auto_class, base_model, base_name, base_revision, identify_base


def describe_base(model: nn.Module) -> dict[str, Any]:
    """The base model as provenance records it: name, revision, class that loads it, identity, quantisation."""
    config = base_model(model).config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "name": base_name(model),
        "revision": base_revision(model),
        "auto_class": getattr(auto_class(config), "__name__", None),
        **identify_base(model),
        "quantization": quantization
        and {key: value for key, value in quantization.items() if isinstance(value, (str, int, float, bool))},
    }


def versions() -> dict[str, str]:
    """Package -> version, of the packages that take part in a run."""
    return {
        name.replace("-", "_"): importlib.metadata.version(name)
        for name in ("peft-perta", "torch", "transformers", "peft", "bitsandbytes")
    }
