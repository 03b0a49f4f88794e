"""The model card of an emitted adapter: what was done, and what it does not do."""

from __future__ import annotations

from .provenance import FusedProvenance, InfluenceProvenance, PerTAProvenance, Provenance, TrainedProvenance


def model_card(provenance: Provenance, license_name: str | None = None) -> str:
    """Markdown with the metadata that hubs read."""
    base = provenance.base_model["name"] or "the base model"
    is_hub_name = not base.startswith((".", "/", "~")) and base.count("/") <= 1 and "\\" not in base and " " not in base
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", f"license: {license_name or 'other'}"]
    if license_name is None:
        front.append("license_name: as-the-base-model")
    if is_hub_name:
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    front += ["tags:", "- lora", "- peft", "- unlearning", "- perta", "---", ""]
    if isinstance(provenance, InfluenceProvenance):
        done = _influence(provenance, base)
    elif isinstance(provenance, TrainedProvenance):
        done = _trained(provenance, base)
    else:
        done = _fused(provenance, base) if isinstance(provenance, FusedProvenance) else _negative(provenance, base)
    return "\n".join([*front, *done, *_how_to_use(base), *LIMITS, ""])


def _fused(provenance: FusedProvenance, base: str) -> list[str]:
    parts = [f"| {part['name']} | {part['strength']:g} | `{part['sha256'][:16]}` |" for part in provenance.parts]
    return [
        "# Fused adapter",
        "",
        f"Several LoRA adapters of `{base}` as one, fused by peft_perta, for servers that take one adapter a request.",
        "",
        "| part | strength | SHA-256 |",
        "|---|---|---|",
        *parts,
        "",
        f"Rank {provenance.rank}; {provenance.energy_kept:.1%} of the sum's energy kept"
        + (" (nothing was cut)." if provenance.energy_kept == 1 else "."),
        "",
    ]


def _influence(provenance: InfluenceProvenance, base: str) -> list[str]:
    edited = provenance.form == "edited"
    change = {
        "erase_instances": "without some rows of its training set",
        "modify_queries": "with other queries in some rows of its training set",
        "correct_responses": "with other responses in some rows of its training set",
    }[provenance.kind]
    means = "is the adapter" if edited else "makes of the adapter, when it is stacked on it, the adapter"
    use = "in the place of the old one" if edited else "beside the old one, at twice its rank, exactly"
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in provenance.data.items()]
    losses = [f"| {name} | {before:.3f} | {after:.3f} |" for name, (before, after) in provenance.losses.items()]
    return [
        "# Edited adapter" if edited else "# Difference adapter",
        "",
        f"A LoRA adapter of `{base}` that {means} `{provenance.adapter['name']}` as if it had been trained "
        f"{change} (LLMEraser, arXiv 2412.00383): an estimate by its curvature, without training again. Made with "
        f"peft_perta {provenance.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- edited: `{provenance.adapter['name']}`, SHA-256 `{provenance.adapter['sha256'][:16]}`; this one goes {use}",
        *[f"- on beside it: `{a['name']}`, SHA-256 `{a['sha256'][:16]}`" for a in provenance.with_adapters],
        f"- {provenance.config['curvature']} curvature, damping {provenance.damping:.3g}, {provenance.stopping}",
        f"- rank: {provenance.rank} (lora_alpha equals it), {provenance.dtype}",
        "",
        "| rows | samples | SHA-256 |",
        "|---|---|---|",
        *sets,
        "",
        "Mean loss, nats per token:",
        "",
        "| rows | before | after |",
        "|---|---|---|",
        *losses,
        "",
    ]


def _trained(provenance: TrainedProvenance, base: str) -> list[str]:
    settings, training = provenance.settings, provenance.training
    start = provenance.start_adapter
    began = f"as `{start['name']}`, SHA-256 `{start['sha256'][:16]}`" if start else "at zero"
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in provenance.data.items()]
    return [
        "# Unlearning adapter",
        "",
        f"A LoRA adapter that takes the knowledge of one forget set out of `{base}` when it is stacked on it. It was "
        "trained to forget one set and to keep another, with peft_perta "
        f"{provenance.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- forget loss: `{settings['forget_loss']}`, weight {settings['forget_weight']:g}; retain loss: "
        f"`{settings['retain_loss']}`, weight {settings['retain_weight']:g}",
        f"- the two gradients combined by `{settings['combiner']}`",
        f"- {training['steps']} steps of {training['global_batch']} samples of each set, learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}; it began {began}",
        *([f"- trained on top of the adapter `{provenance.task_adapter}`"] if provenance.task_adapter else []),
        f"- rank: {provenance.rank} (lora_alpha equals it), {provenance.dtype}",
        "",
        "| set | samples | SHA-256 |",
        "|---|---|---|",
        *sets,
        "",
        "Everything else is in `perta_provenance.json`.",
        "",
    ]


def _negative(provenance: PerTAProvenance, base: str) -> list[str]:
    config = provenance.config
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in provenance.data.items()]
    weighting = config["weighting"] + (f" (power {config['power']:g})" if config["power"] is not None else "")
    return [
        "# Negative adapter",
        "",
        f"A LoRA adapter that takes the knowledge of one forget set out of `{base}` when it is stacked on it. "
        "It was made by weighing a forget adapter parameter by parameter and negating it (PerTA, arXiv 2601.22030), "
        "with peft_perta "
        f"{provenance.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- weights: `{weighting}` per `{config['granularity']}`, gradients at `{config['gradients_at']}`",
        *_directions(provenance),
        f"- strength: {config['strength']:g}, folded into B together with the sign",
        f"- rank: {provenance.rank} (lora_alpha equals it), {config['dtype']}, {len(provenance.layers)} layers edited",
        f"- energy of the edit kept at this rank: {provenance.energy_kept:.1%}; lost in the fit's own "
        f"measure (`{config['fit'] or 'default'}`): {provenance.metric_error:.1%}; {_fit_kl(provenance)}",
        f"- forget adapter: `{provenance.forget_adapter['name']}`, SHA-256 `{provenance.forget_adapter['sha256'][:16]}`",
        "",
        *(["| set | samples | SHA-256 |", "|---|---|---|", *sets, ""] if sets else []),
        *_results(provenance),
        "Everything else, layer by layer, is in `perta_provenance.json`.",
        "",
    ]


def _directions(provenance: PerTAProvenance) -> list[str]:
    left = [layer.left_on_inputs for layer in provenance.layers if layer.left_on_inputs]
    if not left:
        return []
    forget, retain = (sum(found[name] for found in left) / len(left) for name in ("forget", "retain"))
    return [
        f"- input directions weighed: of the edit's squared output, {forget:.0%} is left on the forget set's inputs "
        f"and {retain:.0%} on the retain set's (mean over layers)"
    ]


def _fit_kl(provenance: PerTAProvenance) -> str:
    if provenance.fit_kl is None:
        return "KL to the edit at full rank: not measured"
    return f"KL to the edit at full rank: {provenance.fit_kl:.2g} nats per token"


def _results(provenance: PerTAProvenance) -> list[str]:
    if provenance.calibration is None:
        return []
    found = provenance.calibration
    before, after = found["points"][0], found["losses"]
    return [
        "## Results",
        "",
        "Mean loss, nats per token, on the forget set and on retain rows that were held out:",
        "",
        "| | forget | retain |",
        "|---|---|---|",
        f"| without this adapter | {before['forget']:.3f} | {before['retain']:.3f} |",
        f"| with it | {after['forget']:.3f} | {after['retain']:.3f} |",
        "",
        "The whole strength curve is in `strength.json`.",
        "",
    ]


def _how_to_use(base: str) -> list[str]:
    return [
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
    ]


LIMITS = (
    "## What it does not do",
    "",
    "- **The base still knows.** The knowledge is suppressed by this adapter, not erased from the base model's "
    "file: switching the adapter off (`disable_adapter`, or `set_adapter` to another name) brings it back. To hand "
    "out a model without the knowledge, merge the adapters into a full-precision copy of the base "
    "(`peft-perta merge`) and hand out that alone.",
    "- Do not merge it into 4-bit weights: rounding undoes small edits. Stack it, or merge in full precision.",
    "- How much was forgotten, and at what cost, is a measurement on your own data: see the evaluation "
    "beside it, or run one. An edit at one strength proves nothing about another.",
)
