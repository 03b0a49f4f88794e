"""How many rows an evaluation should score at once on a CPU: the processor time of each number, on one thread.

    python -m benchmarks.scoring [--testbed small smollm2] [--rows 64] [--rounds 3] [--json FILE]

The model is a testbed's full model, with its task adapter on. A ratio is the median over rounds of a number's processor
time divided by that of 32 rows at once in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch

from peft_perta import attach_adapters, load_base
from peft_perta.comparison import TESTBEDS, read_testbed
from peft_perta.data import load_samples
from peft_perta.evaluation import completions, losses_of
from peft_perta.model import quiet

ROWS_AT_ONCE = (1, 2, 4, 8, 16, 32)


def measure(testbed: str, rows: int, rounds: int) -> dict[int, float]:
    """Rows at once -> ratio."""
    found = read_testbed(testbed)
    base, tokenizer = load_base(found.base, dtype=torch.float32)
    model = attach_adapters(base, {"task": found.task_adapter}) if found.task_adapter else base
    samples = load_samples(found.rows["forget"][:rows], tokenizer, name="the forget set")
    times: dict[int, list[float]] = {number: [] for number in ROWS_AT_ONCE}
    with mock.patch.object(completions, "_ROWS_A_THREAD", max(ROWS_AT_ONCE)):  # lift the limit that is measured here
        for _ in range(rounds):
            for number in ROWS_AT_ONCE:
                began = time.process_time()
                losses_of(model, samples, batch_size=number)
                times[number].append(time.process_time() - began)
    return {
        number: statistics.median(a / b for a, b in zip(of_number, times[max(ROWS_AT_ONCE)], strict=True))
        for number, of_number in times.items()
    }


def main() -> None:
    """Print a line for each testbed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", nargs="+", choices=sorted(TESTBEDS), default=["small", "smollm2"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    ratios = {testbed: measure(testbed, options.rows, options.rounds) for testbed in options.testbed}
    print("| model | " + " | ".join(map(str, ROWS_AT_ONCE)) + " |")
    print("|---|" + "---|" * len(ROWS_AT_ONCE))
    for testbed, of_numbers in ratios.items():
        print(f"| {testbed} | " + " | ".join(f"{ratio:.2f}" for ratio in of_numbers.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
