"""Two unlearning requests, one after the other: is a stack of their adapters as good as an adapter of their union?

The forget set is split by author into a first and a second request. A forget adapter is trained on each request and on
their union. Each becomes a negative adapter, scaled until the loss of its own rows is the retain-only model's. The
losses of the stack (as it is, and scaled by one common factor to match again) are compared with those of the union's
adapter.

    python -m benchmarks.requests [--seeds 0 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from peft_perta import PerTAConfig, attach_adapters, get_perta_state_dict, load_base, train_forget_adapter
from peft_perta.adapters import fuse_adapters
from peft_perta.comparison import ASSETS, SPLITS, DemoSettings
from peft_perta.data import encode_row, read_rows, spread
from peft_perta.evaluation import losses_of, match_forgetting
from peft_perta.model import adapter_strength, quiet
from peft_perta.training import default_lora_config


def run(seed: int, settings: DemoSettings) -> list[dict]:
    rows = {name: read_rows(ASSETS / f"{name}.jsonl") for name in SPLITS}
    first, second = rows["forget"][:60], rows["forget"][60:]  # three authors and two, of twenty rows each
    requests = {"first": first, "second": second, "union": rows["forget"]}
    model, tokenizer = load_base(str(ASSETS / "base"))
    for name, request in requests.items():
        model = train_forget_adapter(
            model, request, tokenizer, adapter_name=f"learned_{name}", lora_config=default_lora_config(settings.rank),
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size, warmup_steps=0.05, logging_strategy="no", seed=seed,
        )  # fmt: skip
    attach_adapters(model, {"task": ASSETS / "task_adapter", "retain-only": ASSETS / "retain_adapter"})
    judged = {"first": first, "second": second, "retain": spread(rows["retain"][1::2], 100),
              "general": spread(rows["general"], 100)}  # fmt: skip
    samples = {name: [encode_row(row, tokenizer) for row in split] for name, split in judged.items()}
    samples["union"] = samples["first"] + samples["second"]

    def loss(name: str, *adapters: str) -> float:
        return float(losses_of(model, samples[name], adapters=list(adapters)).mean())

    def match(adapter: str, name: str) -> float:
        def loss_at(strength: float) -> float:
            with adapter_strength(model, adapter, strength):
                return loss(name, "task", adapter)

        return match_forgetting(loss_at, loss(name, "retain-only"), tolerance=0.005).strength

    results = []

    def record(label: str, *adapters: str) -> None:
        results.append({"seed": seed, "model": label, **{name: loss(name, *adapters) for name in judged}})

    record("full model", "task")
    for name, request in requests.items():
        negative = get_perta_state_dict(
            model, PerTAConfig(seed=seed), request, rows["retain"][::2][: settings.weight_samples],
            forget_adapter=f"learned_{name}", tokenizer=tokenizer, show_progress_bar=False,
        )  # fmt: skip
        negative.add_to(model, "unscaled")
        strength = match("unscaled", name)
        model.delete_adapter("unscaled")
        negative.scaled(strength).add_to(model, name)
    for name in ("first", "second", "union"):
        record(f"{name} alone", "task", name)
    record("first + second", "task", "first", "second")
    fuse_adapters(model, ["first", "second"]).add_to(model, "both")
    strength = match("both", "union")
    with adapter_strength(model, "both", strength):
        record(f"first + second, both at {strength:.2f} of that", "task", "both")
    record("retain-only model", "retain-only")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="training epochs of the forget adapters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    settings = DemoSettings() if options.epochs is None else replace(DemoSettings(), epochs=options.epochs)
    results = [result for seed in options.seeds for result in run(seed, settings)]
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    print("| seed | model | first | second | retain | general |\n|---|---|---|---|---|---|")
    for r in results:
        losses = " | ".join(f"{r[name]:.3f}" for name in ("first", "second", "retain", "general"))
        print(f"| {r['seed']} | {r['model']} | {losses} |")


if __name__ == "__main__":
    main()
