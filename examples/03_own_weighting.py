"""How do I use a weighting of my own?

A weighting is a function of how much each parameter matters to the forget set and to the retain set (magnitudes >= 0
of one shape) that returns weights in [0, 1]. Name it 'module:attribute' in the config: nothing of the package is
changed, and the name is in the adapter's provenance. This one leaves alone whatever matters more to the retain set.

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
    """1 - (r / f)^tau where the forget set has the larger say, else 0."""
    safe = forget.clamp_min(1e-30)
    return (1 - (retain / safe) ** power).clamp(0, 1)


# 'mean' asks for |mean gradient|; 'squares' would ask for the root mean square over samples.
MARGIN = Weighting("margin", only_forget, statistic="mean", power=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=10)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # so that '03_own_weighting' can be imported by its name

    forget, retain = read_rows(ASSETS / "forget.jsonl"), read_rows(ASSETS / "retain.jsonl")
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = train_forget_adapter(base, forget, tokenizer, num_train_epochs=options.epochs)
    attach_adapters(model, {"task": ASSETS / "task_adapter"})

    for name, weighting in (("grad", "grad"), ("margin", "03_own_weighting:MARGIN")):
        config = PerTAConfig(weighting=weighting, strength=2.0, max_samples=50)
        add_perta_adapter(model, config, forget, retain[::2], adapter_name=name, tokenizer=tokenizer)
        scores = [
            evaluate_split(Subject(model, tokenizer, ["task", name]), rows, is_forget=is_forget).probability
            for rows, is_forget in ((forget[:20], True), (retain[1:40:2], False))
        ]
        print(f"{name}: answer probability {scores[0]:.3f} on forget rows, {scores[1]:.3f} on retain rows")


if __name__ == "__main__":
    main()
