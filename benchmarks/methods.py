"""Every method on the same bench: at matched forgetting, along the strength, over seeds and forget sets, with its cost.

    python -m benchmarks.methods [--testbed small|smollm2|DIR] [--quick | --config FILE] [--output DIR] [--json FILE]

The default is the shipped model. The same command resumes an interrupted run. The tables of docs/results.md:

    python -m benchmarks.methods --config benchmarks/methods_seeds.json
    python -m benchmarks.methods --config benchmarks/methods_first_choice.json --output perta_comparison_first_choice

On a GPU, with TOFU's forget01, forget05 and forget10 and a model of 90 million parameters:

    python examples/demo_model/build.py --size large
    python -m benchmarks.methods --testbed large_model --config benchmarks/methods_large.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft_perta.comparison import ComparisonSettings, format_table, read_testbed, run_comparison
from peft_perta.data import write_file
from peft_perta.model import quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--config", type=Path, metavar="FILE", help="settings of the comparison, as JSON")
    size.add_argument("--quick", action="store_true", help="one seed, one forget set, the main methods, few rows")
    parser.add_argument("--testbed", default="small", help="small, smollm2, or a directory that a build.py wrote")
    parser.add_argument("--output", type=Path, default=Path("perta_comparison"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    if options.config:
        settings = ComparisonSettings.read(options.config)
    else:
        settings = ComparisonSettings.quick() if options.quick else ComparisonSettings()
    results = run_comparison(options.output, settings, read_testbed(options.testbed))
    if options.json:
        write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))
    print(format_table(results))


if __name__ == "__main__":
    main()
