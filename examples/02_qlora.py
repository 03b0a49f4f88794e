"""How do I do it on a 4-bit model from the hub, with one consumer GPU?

The base is loaded in NF4, the forget adapter is trained with QLoRA, and gradients are computed through the 4-bit
weights. Rows are JSON lines of {question, answer}, {prompt, completion}, {messages} or {text}.

    python examples/02_qlora.py --model meta-llama/Llama-3.1-8B-Instruct --forget forget.jsonl --retain retain.jsonl

If an adapter of your own brought the knowledge, name it with --task-adapter: the negative adapter stacks on it.
"""

import argparse

from peft_perta import PerTAConfig, add_perta_adapter, attach_adapters, load_base, stack_adapters, train_forget_adapter
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import losses_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--task-adapter")
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--strength", type=float, default=2.0)
    parser.add_argument("--samples", type=int, default=200, help="rows of each set that give gradients (default: 200)")
    parser.add_argument("--rows", type=int, help="forget rows to train on (default: all)")
    parser.add_argument("--judged-rows", type=int, default=50, help="rows of each set to judge (default: 50)")
    options = parser.parse_args()

    forget, retain = read_rows(options.forget)[: options.rows], read_rows(options.retain)
    base, tokenizer = load_base(options.model, four_bit=True)  # NF4, double-quantised
    model = train_forget_adapter(
        base, forget, tokenizer, "forget_adapter", num_train_epochs=options.epochs, learning_rate=2e-4
    )
    full = []  # the adapters of the full model
    if options.task_adapter:
        attach_adapters(model, {"task": options.task_adapter})
        full = ["task"]

    # If memory or time is short, input_directions=False keeps the gradient sums as small as the adapter itself.
    config = PerTAConfig(strength=options.strength, max_samples=options.samples, batch_size=4, dtype="bfloat16")
    provenance = add_perta_adapter(model, config, forget, retain, forget_adapter="forget", tokenizer=tokenizer)
    print(provenance)

    for name, rows in (("forget", forget), ("retain", retain)):
        of_full, of_unlearned = (
            losses_of(
                model, load_samples(rows[: options.judged_rows], tokenizer), adapters=adapters, batch_size=4
            ).mean()
            for adapters in (full, [*full, "perta_unlearn"])
        )
        print(f"{name}: loss {of_full:.3f} -> {of_unlearned:.3f} nats per token")

    stack_adapters(model, [*full, "perta_unlearn"])  # the model is now the unlearned one


if __name__ == "__main__":
    main()
