"""An unlearning run stopped early: how far should its adapter be extrapolated?

UIPE scales the adapter's delta up, without training. Here the factor is the largest that the loss of held-out retain
rows allows, found by forward passes only. Any unlearning adapter can be extrapolated; this script trains a short one
first.

    python examples/08_extrapolate.py [--output extrapolated] [--tolerance 0.3] [--four-bit]
"""

import argparse
from pathlib import Path

from peft_perta import Goal, attach_adapters, extrapolate_adapter, load_base, save_perta_adapter, train_unlearning
from peft_perta.adapters import add_adapter
from peft_perta.comparison import ASSETS
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import losses_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("extrapolated"))
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.3,
        help="rise of the held-out retain loss that is allowed, in nats per token",
    )
    parser.add_argument("--epochs", type=float, default=2, help="epochs of the short run")
    parser.add_argument(
        "--rows", type=int, default=40, help="rows of each set to train on, and held-out rows to judge (default: 40)"
    )
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl")[: options.rows], read_rows(ASSETS / "retain.jsonl")
    retain, held_out = retain[: options.rows], retain[-options.rows :]
    model, tokenizer = load_base(str(ASSETS / "base"), four_bit=options.four_bit)
    model = attach_adapters(model, {"task": ASSETS / "task_adapter"})
    lora_config, state_dict, _ = train_unlearning(
        model, forget, retain, tokenizer, task_adapter="task", num_train_epochs=options.epochs
    )
    add_adapter(model, lora_config, state_dict, "early")
    lora_config, state_dict, provenance = extrapolate_adapter(
        model, "early", "auto", goal=Goal(retain_tolerance=options.tolerance), with_adapters=["task"],
        forget=load_samples(forget, tokenizer), retain=load_samples(held_out, tokenizer),
    )  # fmt: skip
    attach_adapters(model, {"further": save_perta_adapter(options.output, lora_config, state_dict, provenance)})

    print(f"\n{provenance}\n{'adapters':<18}{'forget loss':>14}{'held-out loss':>16}")
    for adapters in (["task"], ["task", "early"], ["task", "further"]):
        losses = [
            losses_of(model, load_samples(rows, tokenizer), adapters=adapters).mean() for rows in (forget, held_out)
        ]
        print(f"{' + '.join(adapters):<18}{losses[0]:>14.3f}{losses[1]:>16.3f}")
    print(f"The adapter is in {options.output}")


if __name__ == "__main__":
    main()
