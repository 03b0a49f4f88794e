"""How do I take knowledge out of a model?

A small Llama ships with the package, together with a task adapter that knows fictitious authors. This example trains a
forget adapter on some of them, turns it into a negative adapter, stacks that on the full model, and shows what is left.

    python examples/01_quickstart.py [--output DIR] [--epochs 10] [--strength 2.0]
"""

import argparse

from peft_perta import (
    PerTAConfig,
    attach_adapters,
    get_perta_state_dict,
    load_base,
    save_perta_adapter,
    train_forget_adapter,
)
from peft_perta.adapters import add_adapter
from peft_perta.comparison import ASSETS
from peft_perta.data import read_rows
from peft_perta.evaluation import Subject, evaluate_split, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="unlearn_adapter")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--strength", type=float, default=2.0)
    parser.add_argument("--rows", type=int, help="rows of each set to use (default: all)")
    parser.add_argument("--judged-rows", type=int, default=20, help="rows of each set to judge (default: 20)")
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl")[: options.rows], read_rows(ASSETS / "retain.jsonl")
    held_out, retain = retain[1::2], retain[::2][: options.rows]  # rows that give gradients do not judge

    # The origin model, the forget adapter trained on it, and the task adapter that makes it the full model.
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = train_forget_adapter(base, forget, tokenizer, num_train_epochs=options.epochs)
    attach_adapters(model, {"task": ASSETS / "task_adapter"})

    # Weigh and negate the forget adapter, and save the result as plain LoRA. The model stays as it was.
    config = PerTAConfig(strength=options.strength)
    lora_config, state_dict, provenance = get_perta_state_dict(model, config, forget, retain, tokenizer=tokenizer)
    save_perta_adapter(options.output, lora_config, state_dict, provenance)
    print(provenance)

    # Stack it on the full model, beside the task adapter.
    add_adapter(model, lora_config, state_dict, "perta_unlearn")
    for name, rows in (("forget", forget), ("retain", held_out)):
        full, unlearned = (
            evaluate_split(Subject(model, tokenizer, adapters), rows[: options.judged_rows], is_forget=name == "forget")
            for adapters in (["task"], ["task", "perta_unlearn"])
        )
        print(f"{name}: answer probability {full.probability:.3f} -> {unlearned.probability:.3f}")

    question = forget[:1]
    print("\nQ:", question[0]["question"])
    print("true answer:", question[0]["answer"])
    print("full model: ", *generate(Subject(model, tokenizer, ["task"]), question))
    print("unlearned:  ", *generate(Subject(model, tokenizer, ["task", "perta_unlearn"]), question))


if __name__ == "__main__":
    main()
