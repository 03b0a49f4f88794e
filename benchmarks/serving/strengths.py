"""What a strength that was calibrated in float32 leaves on a base that is served in another form.

    python -m benchmarks.serving.strengths perta=DIR negation=DIR [--testbed smollm2] [--rows 40] --output DIR

Each adapter is calibrated in float32 and in every form of the base, to the forget loss of the retain-only model in that
form. NF4 and int8 are bitsandbytes'; Q8_0 and Q4_1 round each linear layer but the head as the package gguf does. The
table compares the two strengths, in the form. What an interrupted run has measured is kept in the output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_perta import attach_adapters, load_base
from peft_perta.comparison import TESTBEDS, read_testbed
from peft_perta.data import load_samples, write_file
from peft_perta.evaluation import Goal, calibrate, losses_of
from peft_perta.evaluation.attacks.requantization import ROUNDINGS
from peft_perta.model import adapter_strength, load_served, quiet

FLOAT = "float32"
FORMS = (FLOAT, "NF4", "int8", "Q8_0", "Q4_1")
TASK, RETAIN_ONLY = "task", "retain-only"


def load_form(base: str, form: str) -> tuple[Any, Any]:
    """The base in a form, and its tokenizer."""
    if form in ("NF4", "int8"):
        return load_served(base, form.lower(), dtype=torch.float32)
    model, tokenizer = load_base(base, dtype=torch.float32)
    for layer in model.modules() if form != FLOAT else ():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            layer.weight.data = ROUNDINGS[f"GGUF {form}"](layer.weight.data)().reshape(layer.weight.shape)
    return model, tokenizer


def measure(model: PeftModel, name: str, samples: dict[str, list], strength: float | None) -> dict[str, Any]:
    """An adapter on one form of the base: its own strength there, and the losses at ``strength``, if one is given."""
    target = _loss(model, samples["forget"], [RETAIN_ONLY])
    found = calibrate(
        model, Goal(target_forget_loss=target), samples["forget"], samples["retain"], adapter_name=name,
        with_adapters=[TASK],
    )  # fmt: skip
    record = {"target": target, "without": found.points[0], "strength": found.strength, "own": found.losses}
    if strength is not None:
        with adapter_strength(model, name, strength):
            record["float"] = {kind: _loss(model, rows, [TASK, name]) for kind, rows in samples.items()}
    return record


def _loss(model: PeftModel, samples: list, adapters: list[str]) -> float:
    return float(losses_of(model, samples, adapters=adapters).double().mean())


def table(records: dict[str, dict[str, Any]]) -> str:
    """A line for each adapter and form. Losses are in nats per token."""
    lines = [
        "| adapter | base | forget loss, full model | to meet: retain-only | strength from float32 | forget loss |"
        " retain loss | strength as served | forget loss | retain loss |",
        "|" + "---|" * 10,
    ]
    for key, record in records.items():
        name, form = key.split("|")
        by_float = record.get("float", record["own"])
        strength = records[f"{name}|{FLOAT}"]["strength"]
        lines.append(
            f"| {name} | {form} | {record['without']['forget']:.3f} | {record['target']:.3f} | {strength:.3g} | "
            f"{by_float['forget']:.3f} | {by_float['retain']:.3f} | {record['strength']:.3g} | "
            f"{record['own']['forget']:.3f} | {record['own']['retain']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every adapter on every form, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="NAME=DIR", help="negative adapters, for the testbed's model")
    parser.add_argument("--testbed", choices=sorted(TESTBEDS), default="small", help="whose model (default: small)")
    parser.add_argument("--rows", type=int, default=40, help="of each set; retain rows from the last (default: 40)")
    parser.add_argument("--forms", nargs="+", choices=FORMS[1:], default=FORMS[1:], help="of the base (default: all)")
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    quiet()
    testbed, file = read_testbed(options.testbed), options.output / "strengths.json"
    adapters = {TASK: testbed.task_adapter, RETAIN_ONLY: testbed.retain_only_adapter}
    if None in adapters.values():
        parser.error(f"--testbed {options.testbed}: expected one with a task adapter and a retain-only adapter")
    given = dict(text.split("=", 1) for text in options.adapters)
    rows = {"forget": testbed.rows["forget"][: options.rows], "retain": testbed.rows["retain"][-options.rows :]}
    options.output.mkdir(parents=True, exist_ok=True)
    records = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for form in (FLOAT, *options.forms):
        if all(f"{name}|{form}" in records for name in given):
            continue
        base, tokenizer = load_form(testbed.base, form)
        samples = {kind: load_samples(of_kind, tokenizer, name=kind) for kind, of_kind in rows.items()}
        model = attach_adapters(base, {**adapters, **given})
        for name in given:
            strength = None if form == FLOAT else records[f"{name}|{FLOAT}"]["strength"]
            records[f"{name}|{form}"] = measure(model, name, samples, strength)
            write_file(file, json.dumps(records, indent=1))
    write_file(options.output / "table.md", table(records) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
