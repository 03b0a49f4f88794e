"""The model card of an emitted adapter: what was done, and what it does not do."""

from __future__ import annotations

from .report import PerTAReport


def model_card(report: PerTAReport) -> str:
    """Markdown with the metadata that hubs read."""
    base = report.base_model["name"] or "the base model"
    is_hub_name = not base.startswith((".", "/", "~")) and base.count("/") <= 1 and "\\" not in base and " " not in base
    config = report.config
    front = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    if is_hub_name:
        front.append(f"base_model: {base}")
    front += ["tags:", "- lora", "- peft", "- unlearning", "- perta", "---"]
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in report.data.items()]
    weighting = config["weighting"] + (f" (power {config['power']:g})" if config["power"] is not None else "")
    lines = [
        *front,
        "",
        "# Negative adapter",
        "",
        f"A LoRA adapter that takes the knowledge of one forget set out of `{base}` when it is stacked on it. "
        "It was made by weighing a forget adapter parameter by parameter and negating it (PerTA, arXiv 2601.22030), "
        "with peft_perta "
        f"{report.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- weights: `{weighting}` per `{config['granularity']}`, gradients at `{config['reference_model']}`",
        f"- strength: {config['strength']:g}, folded into B together with the sign",
        f"- rank: {report.rank} (lora_alpha equals it), {config['dtype']}, {len(report.layers)} layers edited",
        f"- energy of the edit kept at this rank: {report.energy_kept:.1%}",
        f"- forget adapter: `{report.forget_adapter['name']}`, SHA-256 `{report.forget_adapter['sha256'][:16]}`",
        "",
        *(["| set | samples | SHA-256 |", "|---|---|---|", *sets, ""] if sets else []),
        "Everything else, layer by layer, is in `perta_provenance.json`.",
        "",
        "## How to use it",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "this directory", adapter_name="perta_unlearn")',
        "```",
        "",
        "If the knowledge came with a task adapter, load both and turn both on:",
        '`model.base_model.set_adapter(["task", "perta_unlearn"], inference_mode=True)`.',
        "",
        "## What it does not do",
        "",
        "- **The base still knows.** The knowledge is suppressed by this adapter, not erased from the base model's "
        "file: switching the adapter off (`disable_adapter`, or `set_adapter` to another name) brings it back. To hand "
        "out a model without the knowledge, merge the adapters into a full-precision copy of the base and hand out "
        "that alone.",
        "- Do not merge it into 4-bit weights: rounding undoes small edits. Stack it, or merge in full precision.",
        "- How much was forgotten, and at what cost, is a measurement on your own data: see the evaluation "
        "beside it, or run one. An edit at one strength proves nothing about another.",
        "",
    ]
    return "\n".join(lines)
