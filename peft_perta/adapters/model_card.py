"""The model card of an emitted adapter: how it was made, how to use it, and what it does not do."""

from __future__ import annotations

from .provenance import Provenance


def model_card(provenance: Provenance) -> str:
    """The model card in Markdown, with the metadata that model hubs read."""
    base = provenance.base_name
    is_hub_name = not base.startswith((".", "/", "~")) and base.count("/") <= 1 and "\\" not in base and " " not in base
    metadata = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "license: other",  # base model and data may both restrict it
        "license_name: as-the-base-model",
        *([f"base_model: {base}", "base_model_relation: adapter"] if is_hub_name else []),
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


def _how_to_use(base: str, auto_class: str | None) -> list[str]:
    auto_class = auto_class or "AutoModelForCausalLM"
    return [
        "## How to use it",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{base}")',
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
