"""How do I use a weighting of my own?

A weighting is a function of two tensors of one shape (magnitudes >= 0): how much each parameter matters to the forget
set, and how much to the retain set. It returns weights in [0, 1]. Name it 'module:attribute' in the config; the package
itself needs no change, and the adapter's provenance holds the name. The weighting below gives weight 0 to every
parameter that matters more to the retain set.

    python examples/03_own_weighting.py [--epochs 10]
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from peft_perta import PerTAConfig, Weighting, add_perta_adapter, attach_adapters, load_base, train_forget_adapter
from peft_perta.comparison import ASSETS
from peft_perta.data import read_rows
from peft_perta.evaluation import Subject, evaluate_split


def only_forget(forget: Tensor, retain: Tensor, power: float) -> Tensor:
    """1 - (r / f)^tau where f > r, else 0; f and r are the magnitudes of the forget and of the retain set."""
    safe = forget.clamp_min(1e-30)
    return (1 - (retain / safe) ** power).clamp(0, 1)


# With 'mean' the magnitudes are |mean gradient|; with 'squares' they are root mean squares over samples.
MARGIN = Weighting("margin", only_forget, statistic="mean", power=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--rows", type=int, help="forget rows to use (default: all)")
    parser.add_argument("--samples", type=int, default=50, help="rows of each set that give gradients (default: 50)")
    parser.add_argument("--judged-rows", type=int, default=20, help="rows of each set to judge (default: 20)")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # makes the module '03_own_weighting' importable

    forget, retain = read_rows(ASSETS / "forget.jsonl")[: options.rows], read_rows(ASSETS / "retain.jsonl")
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = train_forget_adapter(base, forget, tokenizer, num_train_epochs=options.epochs)
    attach_adapters(model, {"task": ASSETS / "task_adapter"})

    for name, weighting in (("grad", "grad"), ("margin", "03_own_weighting:MARGIN")):
        config = PerTAConfig(weighting=weighting, strength=2.0, max_samples=options.samples)
        add_perta_adapter(model, config, forget, retain[::2], adapter_name=name, tokenizer=tokenizer)
        subject = Subject(model, tokenizer, ["task", name])
        scores = [
            evaluate_split(subject, rows[: options.judged_rows], is_forget=is_forget).probability
            for rows, is_forget in ((forget, True), (retain[1::2], False))
        ]
        print(f"{name}: answer probability {scores[0]:.3f} on forget rows, {scores[1]:.3f} on retain rows")


if __name__ == "__main__":
    main()
