"""What would this adapter be if it had never been trained on these rows?

LLMEraser estimates that change from the adapter's own curvature, without training it again. Here it erases some rows of
the task adapter's training set; the result is an adapter to stack on the task adapter.

    python examples/07_erase.py [--output erased] [--four-bit]
"""

import argparse
from pathlib import Path

from peft_perta import InfluenceSettings, attach_adapters, erase_instances, load_base, save_perta_adapter
from peft_perta.comparison import ASSETS
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import losses_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("erased"))
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--rows", type=int, default=20, help="rows to erase (default: 20)")
    parser.add_argument("--iterations", type=int, default=10, help="conjugate gradient steps, at most")
    parser.add_argument("--curvature-samples", type=int, default=60)
    parser.add_argument("--judged-rows", type=int, default=40, help="retain rows to judge (default: 40)")
    parser.add_argument("--training-rows", type=int, help="rows of the task adapter's training set (default: all)")
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl")[: options.rows], read_rows(ASSETS / "retain.jsonl")
    training_rows = read_rows(ASSETS / "forget.jsonl") + retain
    model, tokenizer = load_base(str(ASSETS / "base"), four_bit=options.four_bit)
    model = attach_adapters(model, {"task": ASSETS / "task_adapter"})
    settings = InfluenceSettings(max_iterations=options.iterations, curvature_samples=options.curvature_samples)
    result = erase_instances(model, training_rows[: options.training_rows], forget, tokenizer, settings=settings)
    print(result.provenance)
    directory = save_perta_adapter(options.output, *result.difference())
    attach_adapters(model, {"erased": directory})

    print(f"\n{'adapters':<16}{'forget loss':>14}{'retain loss':>14}")
    for adapters in (["task"], ["task", "erased"]):
        losses = [
            losses_of(model, load_samples(rows, tokenizer), adapters=adapters).mean()
            for rows in (forget, retain[: options.judged_rows])
        ]
        print(f"{' + '.join(adapters):<16}{losses[0]:>14.3f}{losses[1]:>14.3f}")
    print(f"The adapter is in {options.output}")


if __name__ == "__main__":
    main()
