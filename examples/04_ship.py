"""How strong must the negative adapter be, and how do I ship it?

Two unlearning requests arrive one after the other. Each becomes its own negative adapter, at the largest strength that
raises the loss of held-out retain rows by at most a tolerance. The adapters stack, and either can be withdrawn. For a
server that takes one adapter per request, they are fused with the task adapter. For a server that takes none, the first
one is merged into a full-precision copy of the base.

    python examples/04_ship.py [--output shipped]
"""

import argparse
from pathlib import Path

from peft_perta import (
    PerTAConfig,
    attach_adapters,
    fuse_adapters,
    get_perta_state_dict,
    load_base,
    merge_adapters,
    save_perta_adapter,
    stack_adapters,
    train_forget_adapter,
    verify_adapter,
)
from peft_perta.comparison import ASSETS
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import losses_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("shipped"))
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--rows", type=int, default=20, help="forget rows of each request (default: 20)")
    parser.add_argument("--retain-rows", type=int, default=80, help="retain rows (default: 80)")
    options = parser.parse_args()

    base, task = str(ASSETS / "base"), str(ASSETS / "task_adapter")
    forget, retain = read_rows(ASSETS / "forget.jsonl"), read_rows(ASSETS / "retain.jsonl")
    retain = retain[: options.retain_rows]
    model, tokenizer = load_base(base)
    requests = {"first": forget[: options.rows], "second": forget[-options.rows :]}
    for name, rows in requests.items():
        model = train_forget_adapter(
            model, rows, tokenizer, adapter_name=f"learned_{name}", num_train_epochs=options.epochs, learning_rate=2e-3
        )
    attach_adapters(model, {"task": task})
    for name, rows in requests.items():
        lora_config, state_dict, provenance = get_perta_state_dict(
            model,
            PerTAConfig(strength="auto", retain_tolerance=0.2),
            rows,
            retain,
            forget_adapter=f"learned_{name}",
            task_adapter="task",
            tokenizer=tokenizer,
        )
        save_perta_adapter(options.output / name, lora_config, state_dict, provenance)
        attach_adapters(model, {name: options.output / name})
        print(provenance)

    # In the last stack, the first request is withdrawn.
    for stack in (["task"], ["task", "first"], ["task", "first", "second"], ["task", "second"]):
        losses = {
            name: float(losses_of(model, load_samples(rows, tokenizer), adapters=stack).mean())
            for name, rows in requests.items()
        }
        parts = [f"loss on the {name} request's rows {loss:.2f}" for name, loss in losses.items()]
        print(f"{' + '.join(stack)}: {', '.join(parts)}")
    stack_adapters(model, ["task", "first", "second"])

    fused = fuse_adapters(model, ["task", "first", "second"])
    save_perta_adapter(options.output / "fused", *fused)
    print(fused[-1])
    merged = merge_adapters(base, {task: 1.0, str(options.output / "first"): 1.0}, options.output / "merged")
    print(merged)
    for check in verify_adapter(options.output / "fused", base):
        print(check)


if __name__ == "__main__":
    main()
