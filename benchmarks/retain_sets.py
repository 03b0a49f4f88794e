"""What is kept of rows that nobody listed, by the retain set that a job is given.

    python -m benchmarks.retain_sets --output DIR [--sets self default rows]

Three jobs on the small model that ships, which forget the same rows to the same loss: with the rows to keep ('rows'),
with the general rows that ship ('default'), and with rows that the full model writes itself ('self'). Each is judged by
the rows to keep that no job sees, and by general rows. A job that is done is not done again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_perta.comparison import ASSETS
from peft_perta.data import DEFAULT, SELF, load_samples, read_rows
from peft_perta.evaluation import losses_of
from peft_perta.job import Job
from peft_perta.model import attach_adapters, load_base, quiet

RETAIN = ASSETS / "retain.jsonl"
SETS = {"rows": str(RETAIN), SELF: SELF, DEFAULT: DEFAULT}
COMMON: dict[str, Any] = {
    "model": str(ASSETS / "base"),
    "task_adapter": str(ASSETS / "task_adapter"),
    "retain_only_adapter": str(ASSETS / "retain_adapter"),
    "forget": str(ASSETS / "forget.jsonl"),
    "method": "rmu+directions",
    "retain_tolerance": 0.3,
    "judging": {"attacked_rows": 0},
}


def judged_rows() -> dict[str, list[dict]]:
    """Set -> rows: those to forget, those to keep that no job sees, and general ones."""
    return {
        "forget": read_rows(COMMON["forget"]),
        "retain": read_rows(RETAIN)[1::2],
        "general": read_rows(ASSETS / "general.jsonl"),
    }


def figures(adapters: Mapping[str, Path], rows: Mapping[str, list[dict]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Model -> set -> (mean loss in nats per token, mean probability of the true answers)."""
    base, tokenizer = load_base(COMMON["model"])
    given = {"task": COMMON["task_adapter"], "retain-only": COMMON["retain_only_adapter"], **adapters}
    model = attach_adapters(base, given)
    stacks: dict[str, Sequence[str]] = {"full": ["task"], "retain-only": ["retain-only"]}
    stacks |= {name: ["task", name] for name in adapters}
    samples = {name: load_samples(of_set, tokenizer, max_length=512, name=name) for name, of_set in rows.items()}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, stack in stacks.items():
        for of_set, known in samples.items():
            losses = losses_of(model, known, adapters=stack, batch_size=32).double().tolist()
            probability = sum(math.exp(-loss) for loss in losses) / len(losses)
            found.setdefault(name, {})[of_set] = (sum(losses) / len(losses), probability)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory of the jobs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="the retain sets (default: all)")
    options = parser.parse_args()
    quiet()
    adapters = {}
    for name in options.sets:
        directory = options.output / name
        Job.of({**COMMON, "retain": SETS[name], "output": str(directory)}).run(print, show_progress_bar=False)
        adapters[name] = directory / "adapter"
    print("| model | forget loss | retain loss | retain probability | general loss | general probability |")
    print("|---|---|---|---|---|---|")
    for name, of_sets in figures(adapters, judged_rows()).items():
        (forget, _), (retain, kept), (general, known) = of_sets.values()
        print(f"| {name} | {forget:.2f} | {retain:.3f} | {kept:.1%} | {general:.3f} | {known:.1%} |")


if __name__ == "__main__":
    main()
