"""How do I do it on a 4-bit model from the hub, with one consumer GPU?

The base is loaded in NF4, the forget adapter is trained by QLoRA, and the gradients are taken through the 4-bit
weights. Your rows are JSON lines of {question, answer}, {prompt, completion}, {messages} or {text}.

    python examples/02_qlora.py --model meta-llama/Llama-3.1-8B-Instruct --forget forget.jsonl --retain retain.jsonl

If what must go came with an adapter of your own, name it with --task-adapter: the negative adapter stacks on both.
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
    parser.add_argument("--samples", type=int, default=200, help="of each set, for the gradients")
    options = parser.parse_args()

    base, tokenizer = load_base(options.model, four_bit=True)  # NF4, double-quantised
    model = train_forget_adapter(
        base, options.forget, tokenizer, "forget_adapter", num_train_epochs=options.epochs, learning_rate=2e-4
    )
    on = []
    if options.task_adapter:
        attach_adapters(model, {"task": options.task_adapter})
        on = ["task"]

    # Where memory or time is short, input_directions=False keeps statistics as small as the adapter itself.
    config = PerTAConfig(strength=options.strength, max_samples=options.samples, batch_size=4, dtype="bfloat16")
    provenance = add_perta_adapter(
        model, config, options.forget, options.retain, forget_adapter="forget", tokenizer=tokenizer
    )
    print(provenance)

    for name, path in (("forget", options.forget), ("retain", options.retain)):
        rows = read_rows(path)[:50]
        before = losses_of(model, load_samples(rows, tokenizer), adapters=on, batch_size=4).mean()
        after = losses_of(model, load_samples(rows, tokenizer), adapters=[*on, "perta_unlearn"], batch_size=4).mean()
        print(f"{name}: loss {before:.3f} -> {after:.3f} nats per token")

    stack_adapters(model, [*on, "perta_unlearn"])  # from here on the model generates without the forget set


if __name__ == "__main__":
    main()
