"""What if I would rather train the model to forget?

On the full model, an adapter is trained to forget some rows (NPO) and to keep others. SAGO combines the two gradients
so that neither undoes the other. The result is plain LoRA, and stacks on the full model. Refined along the input
directions of its layers, it keeps more of the rows that it was not trained on.

    python examples/06_train.py [--output trained] [--four-bit]
"""

import argparse
from pathlib import Path

from peft_perta import UnlearningSettings, attach_adapters, load_base, refine_adapter, train_unlearning
from peft_perta.comparison import ASSETS
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import losses_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument(
        "--rows", type=int, default=40, help="rows of each set to train on, and held-out rows to judge (default: 40)"
    )
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl")[: options.rows], read_rows(ASSETS / "retain.jsonl")
    retain, held_out = retain[: options.rows], retain[-options.rows :]
    model, tokenizer = load_base(str(ASSETS / "base"), four_bit=options.four_bit)
    model = attach_adapters(model, {"task": ASSETS / "task_adapter"})
    *_, provenance = train_unlearning(
        model, forget, retain, tokenizer, UnlearningSettings(forget_loss="npo", combiner="sago"),
        task_adapter="task", output_dir=options.output, num_train_epochs=options.epochs, learning_rate=2e-3,
    )  # fmt: skip
    attach_adapters(model, {"sago": options.output})
    refined = refine_adapter(model, "sago", forget, retain, task_adapter="task", tokenizer=tokenizer)
    refined.save(options.output.with_name(f"{options.output.name}_refined"))
    refined.add_to(model, "refined")

    print(f"\n{provenance}\n{'adapters':<16}{'forget loss':>14}{'held-out loss':>16}")
    for adapters in (["task"], ["task", "sago"], ["task", "refined"]):
        losses = [
            losses_of(model, load_samples(rows, tokenizer), adapters=adapters).mean() for rows in (forget, held_out)
        ]
        print(f"{' + '.join(adapters):<16}{losses[0]:>14.3f}{losses[1]:>16.3f}")
    print(f"The adapters are in {options.output} and {options.output}_refined.")
    print("To forget more or less without training, see examples/08_extrapolate.py")


if __name__ == "__main__":
    main()
