"""How do I take knowledge out of a model?

A small Llama (it ships with the package) has a task adapter that knows fictitious authors too well. This trains a
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
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl"), read_rows(ASSETS / "retain.jsonl")

    # theta_0, the forget adapter trained on it, and the task adapter that makes it the full model.
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = train_forget_adapter(base, forget, tokenizer, num_train_epochs=options.epochs)
    attach_adapters(model, {"task": ASSETS / "task_adapter"})

    # Weigh it, negate it, save it as plain LoRA. The model is not touched by the first two lines.
    config = PerTAConfig(strength=options.strength)
    lora_config, state_dict, provenance = get_perta_state_dict(model, config, forget, retain[::2], tokenizer=tokenizer)
    save_perta_adapter(options.output, lora_config, state_dict, provenance)
    print(provenance)

    # Stack it on the full model, beside the task adapter.
    add_adapter(model, lora_config, state_dict, "perta_unlearn")
    full = Subject(model, tokenizer, ["task"], show_progress_bar=False)
    unlearned = Subject(model, tokenizer, ["task", "perta_unlearn"], show_progress_bar=False)
    for name, rows in (("forget", forget[:20]), ("retain", retain[1:40:2])):
        before, after = (evaluate_split(subject, rows, is_forget=name == "forget") for subject in (full, unlearned))
        print(f"{name}: answer probability {before.probability:.3f} -> {after.probability:.3f}")

    question = forget[:1]
    print("\nQ:", question[0]["question"])
    print("true answer:  ", question[0]["answer"])
    print("full model:   ", *generate(full, question))
    print("with negative:", *generate(unlearned, question))


if __name__ == "__main__":
    main()
