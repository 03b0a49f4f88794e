"""The model card of an emitted adapter: how it was made, how to use it, and what it does not do."""

from __future__ import annotations

import os

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .provenance import Provenance


def model_card(provenance: Provenance) -> str:
    """The model card in Markdown, with the metadata that model hubs read."""
    base = provenance.base_name
    metadata = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "license: other",  # base model and data may both restrict it
        "license_name: as-the-base-model",
        *([f"base_model: {base}", "base_model_relation: adapter"] if is_on_hub(base) else []),
        "tags:",
        "- lora",
        "- peft",
        "- unlearning",
        "- perta",
        "---",
        "",
    ]
    return "\n".join(
        [
            *metadata,
            *provenance.card_section(),
            *_how_to_use(base, provenance.base_model.get("auto_class")),
            *_LIMITS,
            "",
        ]
    )


def is_on_hub(base: str) -> bool:
    """Whether a base's name can be one on the hub, whose names are plain YAML; a directory of that name is none."""
    try:
        validate_repo_id(base)
        return not os.path.exists(base)
    except (HFValidationError, ValueError):
        return False


def _how_to_use(base: str, auto_class: str | None) -> list[str]:
    if not (isinstance(auto_class, str) and auto_class.isidentifier()):
        auto_class = "AutoModelForCausalLM"
    return [
        "## How to use it",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"model = {auto_class}.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(model, "this directory", adapter_name="perta_unlearn")',
        "```",
        "",
        "If a task adapter holds the knowledge, load both adapters and turn both on:",
        '`model.base_model.set_adapter(["task", "perta_unlearn"], inference_mode=True)`.',
        "",
    ]


_LIMITS = (
    "## What it does not do",
    "",
    "- **The base still knows.** The adapter suppresses the knowledge. It does not erase it from the base model's "
    "file: switching the adapter off (`disable_adapter`, or `set_adapter` to another name) brings the knowledge back. "
    "To distribute a model without it, merge the adapters into a full-precision copy of the base (`peft-perta merge`) "
    "and distribute only that copy.",
    "- Do not merge it into 4-bit weights: rounding undoes small edits. Stack it, or merge it in full precision.",
    "- How much was forgotten, and at what cost, must be measured on your own data: read the evaluation beside this "
    "adapter, or run one. The measurements hold for one strength only.",
)
