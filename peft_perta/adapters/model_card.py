"""The model card of an emitted adapter: what was done, and what it does not do."""

from __future__ import annotations

from .provenance import FusedReport, InfluenceReport, PerTAReport, Report, TrainedReport


def model_card(report: Report, license_name: str | None = None) -> str:
    """Markdown with the metadata that hubs read."""
    base = report.base_model["name"] or "the base model"
    is_hub_name = not base.startswith((".", "/", "~")) and base.count("/") <= 1 and "\\" not in base and " " not in base
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", f"license: {license_name or 'other'}"]
    if license_name is None:
        front.append("license_name: as-the-base-model")
    if is_hub_name:
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    front += ["tags:", "- lora", "- peft", "- unlearning", "- perta", "---", ""]
    if isinstance(report, InfluenceReport):
        done = _influence(report, base)
    elif isinstance(report, TrainedReport):
        done = _trained(report, base)
    else:
        done = _fused(report, base) if isinstance(report, FusedReport) else _negative(report, base)
    return "\n".join([*front, *done, *_how_to_use(base), *LIMITS, ""])


def _fused(report: FusedReport, base: str) -> list[str]:
    parts = [f"| {part['name']} | {part['strength']:g} | `{part['sha256'][:16]}` |" for part in report.parts]
    return [
        "# Fused adapter",
        "",
        f"Several LoRA adapters of `{base}` as one, fused by peft_perta, for servers that take one adapter a request.",
        "",
        "| part | strength | SHA-256 |",
        "|---|---|---|",
        *parts,
        "",
        f"Rank {report.rank}; {report.energy_kept:.1%} of the sum's energy kept"
        + (" (nothing was cut)." if report.energy_kept == 1 else "."),
        "",
    ]


def _influence(report: InfluenceReport, base: str) -> list[str]:
    edited = report.form == "edited"
    change = {
        "erase_instances": "without some rows of its training set",
        "modify_queries": "with other queries in some rows of its training set",
        "correct_responses": "with other responses in some rows of its training set",
    }[report.kind]
    means = "is the adapter" if edited else "makes of the adapter, when it is stacked on it, the adapter"
    use = "in the place of the old one" if edited else "beside the old one, at twice its rank, exactly"
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in report.data.items()]
    losses = [f"| {name} | {before:.3f} | {after:.3f} |" for name, (before, after) in report.losses.items()]
    return [
        "# Edited adapter" if edited else "# Difference adapter",
        "",
        f"A LoRA adapter of `{base}` that {means} `{report.adapter['name']}` as if it had been trained "
        f"{change} (LLMEraser, arXiv 2412.00383): an estimate by its curvature, without training again. Made with "
        f"peft_perta {report.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- edited: `{report.adapter['name']}`, SHA-256 `{report.adapter['sha256'][:16]}`; this one goes {use}",
        *[f"- on beside it: `{a['name']}`, SHA-256 `{a['sha256'][:16]}`" for a in report.with_adapters],
        f"- {report.config['curvature']} curvature, damping {report.damping:.3g}, {report.stopping}",
        f"- rank: {report.rank} (lora_alpha equals it), {report.dtype}",
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


def _trained(report: TrainedReport, base: str) -> list[str]:
    settings, training = report.settings, report.training
    start = report.start_adapter
    began = f"as `{start['name']}`, SHA-256 `{start['sha256'][:16]}`" if start else "at zero"
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in report.data.items()]
    return [
        "# Unlearning adapter",
        "",
        f"A LoRA adapter that takes the knowledge of one forget set out of `{base}` when it is stacked on it. It was "
        "trained to forget one set and to keep another, with peft_perta "
        f"{report.versions.get('peft_perta', '')}.",
        "",
        "## What was done",
        "",
        f"- forget loss: `{settings['forget_loss']}`, weight {settings['forget_weight']:g}; retain loss: "
        f"`{settings['retain_loss']}`, weight {settings['retain_weight']:g}",
        f"- the two gradients combined by `{settings['combiner']}`",
        f"- {training['steps']} steps of {training['global_batch']} samples of each set, learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}; it began {began}",
        *([f"- trained on top of the adapter `{report.task_adapter}`"] if report.task_adapter else []),
        f"- rank: {report.rank} (lora_alpha equals it), {report.dtype}",
        "",
        "| set | samples | SHA-256 |",
        "|---|---|---|",
        *sets,
        "",
        "Everything else is in `perta_provenance.json`.",
        "",
    ]


def _negative(report: PerTAReport, base: str) -> list[str]:
    config = report.config
    sets = [f"| {name} | {entry['samples']} | `{entry['sha256'][:16]}` |" for name, entry in report.data.items()]
    weighting = config["weighting"] + (f" (power {config['power']:g})" if config["power"] is not None else "")
    return [
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
        *_directions(report),
        f"- strength: {config['strength']:g}, folded into B together with the sign",
        f"- rank: {report.rank} (lora_alpha equals it), {config['dtype']}, {len(report.layers)} layers edited",
        f"- energy of the edit kept at this rank: {report.energy_kept:.1%}; lost in the fit's own "
        f"measure (`{config['fit'] or 'default'}`): {report.metric_error:.1%}; {_divergence(report)}",
        f"- forget adapter: `{report.forget_adapter['name']}`, SHA-256 `{report.forget_adapter['sha256'][:16]}`",
        "",
        *(["| set | samples | SHA-256 |", "|---|---|---|", *sets, ""] if sets else []),
        *_results(report),
        "Everything else, layer by layer, is in `perta_provenance.json`.",
        "",
    ]


def _directions(report: PerTAReport) -> list[str]:
    left = [layer.left_on_inputs for layer in report.layers if layer.left_on_inputs]
    if not left:
        return []
    forget, retain = (sum(found[name] for found in left) / len(left) for name in ("forget", "retain"))
    return [
        f"- input directions weighed: of the edit's squared output, {forget:.0%} is left on the forget set's inputs "
        f"and {retain:.0%} on the retain set's (mean over layers)"
    ]


def _divergence(report: PerTAReport) -> str:
    if report.divergence is None:
        return "KL to the edit at full rank: not measured"
    return f"KL to the edit at full rank: {report.divergence:.2g} nats per token"


def _results(report: PerTAReport) -> list[str]:
    if report.calibration is None:
        return []
    found = report.calibration
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
