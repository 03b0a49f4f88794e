"""What would this adapter be if it had never been trained on these rows?

LLMEraser solves for that change by the adapter's own curvature, without training it again: here some rows of the task
adapter's training set are erased, as an adapter to stack on it.

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
    parser.add_argument("--rows", type=int, default=20, help="to erase")
    parser.add_argument("--iterations", type=int, default=10, help="of conjugate gradients, at most")
    parser.add_argument("--curvature-samples", type=int, default=60)
    options = parser.parse_args()

    forget, retain = read_rows(ASSETS / "forget.jsonl"), read_rows(ASSETS / "retain.jsonl")
    model, tokenizer = load_base(str(ASSETS / "base"), four_bit=options.four_bit)
    model = attach_adapters(model, {"task": ASSETS / "task_adapter"})
    settings = InfluenceSettings(max_iterations=options.iterations, curvature_samples=options.curvature_samples)
    result = erase_instances(model, forget + retain, forget[: options.rows], tokenizer, settings=settings)
    print(result.provenance)
    directory = save_perta_adapter(options.output, *result.difference())
    attach_adapters(model, {"erased": directory})

    print(f"\n{'adapters':<16}{'loss: to forget':>18}{'rows that stay':>16}")
    for adapters in (["task"], ["task", "erased"]):
        sets = forget[: options.rows], retain[:40]
        losses = [losses_of(model, load_samples(rows, tokenizer), adapters=adapters).mean() for rows in sets]
        print(f"{' + '.join(adapters):<16}{losses[0]:>18.3f}{losses[1]:>16.3f}")
    print(f"The adapter is in {options.output}")


if __name__ == "__main__":
    main()
