"""What do input directions need, and what do they give to the adapters of other methods?

For each seed, one adapter is negated (plain negation of the forget adapter) and one is trained (SAGO). Each is judged
as it is, and refined: with other weights of the retain inputs, other dampings, fewer retain rows, and with retain rows
that are unlike those that are judged (the general rows). Forgetting is matched in both measures; retain rows that no
method saw are judged.

    python -m benchmarks.refinement [--testbed small|smollm2|DIR] [--seeds 0 1 2] [--adapters NAME ...]
        [--only NAME ...] [--json FILE]

An interrupted run goes on from the JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.matched_forgetting import table
from peft_perta import NumericalError, RefinementSettings, refine_adapter
from peft_perta.adapters import add_adapter
from peft_perta.comparison import MEASURES, METHODS, Bench, BenchSettings, read_testbed
from peft_perta.data import spread, write_file
from peft_perta.model import quiet

_START, _REFINED = "start", "refined"  # adapters on the model


_DEFAULT = RefinementSettings()


@dataclass(frozen=True)
class Variant:
    """One way to refine an adapter.

    Attributes:
        name: as the table prints it, after the adapter's.
        settings: of the refinement; None leaves the adapter as it is.
        retain_rows: how many retain rows it reads, spread over those that methods may use; None for all.
        unlike: read the general rows in their place.
    """

    name: str
    settings: RefinementSettings | None = _DEFAULT
    retain_rows: int | None = None
    unlike: bool = False


AS_IT_IS = "as it is"
VARIANTS = [
    Variant(AS_IT_IS, None),
    Variant("refined"),
    *[Variant(f"refined, retain weight {w:g}", RefinementSettings(retain_weight=w)) for w in (0.1, 0.3, 3.0, 10.0)],
    *[Variant(f"refined, damping {d:g}", RefinementSettings(damping=d)) for d in (0.0001, 0.001, 0.1, 1.0)],
    *[Variant(f"refined, {n} retain rows", retain_rows=n) for n in (4, 8, 16)],
    Variant("refined, general rows in place of retain rows", unlike=True),
]


@contextmanager
def judged(bench: Bench, variant: Variant) -> Iterator[str]:
    """Within the block, the variant of the start adapter is on the model. Yields its name."""
    setup = bench.setup
    if variant.settings is None:
        yield _START
        return
    retain = bench.judged_rows["general"] if variant.unlike else setup.retain_rows
    if variant.retain_rows is not None:
        retain = spread(retain, variant.retain_rows)
    emitted = refine_adapter(
        setup.model,
        _START,
        setup.forget_rows,
        retain,
        variant.settings,
        task_adapter=setup.task_adapter,
        tokenizer=setup.tokenizer,
        show_progress_bar=False,
    )
    emitted.add_to(setup.model, _REFINED)
    try:
        yield _REFINED
    finally:
        setup.model.delete_adapter(_REFINED)


def run(bench: Bench, adapter: str, variants: list[Variant], finished: Callable[[dict], None]) -> None:
    """Make the adapter once, and judge its variants."""
    made = METHODS[adapter].make(bench.setup)
    add_adapter(bench.model, made.lora_config, made.state_dict, _START)
    try:
        for variant in tqdm(variants, desc=f"{adapter}, seed {bench.settings.seed}"):
            with judged(bench, variant) as name:
                path = bench.path(bench.edited(name))
                for measure in MEASURES:
                    try:
                        match = path.match(measure, tolerance=0.005)
                    except NumericalError as error:
                        tqdm.write(f"{adapter}, {variant.name}: {error}")
                        continue
                    scores = bench.row_scores(bench.edited(name, match.strength))
                    finished({"edit": f"{adapter}, {variant.name}", "matched": measure, "strength": match.strength,
                              "rows": scores})  # fmt: skip
    finally:
        bench.model.delete_adapter(_START)


def as_it_is(edit: str) -> str:
    """The name of the same adapter before it is refined."""
    return f"{edit.partition(',')[0]}, {AS_IT_IS}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="small", help="small, smollm2, or a directory that a build.py wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adapters", nargs="+", default=["negation", "sago"], choices=list(METHODS), metavar="NAME")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of variants, as the table prints them")
    for name in ("epochs", "rank", "batch_size", "weight_samples", "judged_rows", "forget_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{name} of the bench")
    parser.add_argument("--learning-rate", type=float, help="learning rate of the forget adapter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    given = {f.name: value for f in fields(BenchSettings) if (value := getattr(options, f.name, None)) is not None}
    variants = [variant for variant in VARIANTS if not options.only or variant.name in options.only]
    lines = options.json.read_text(encoding="utf-8").splitlines() if options.json and options.json.exists() else []
    results = [json.loads(line) for line in lines]
    testbed = read_testbed(options.testbed)
    for seed in options.seeds:
        bench: Bench | None = None

        def finished(result: dict, seed: int = seed) -> None:
            results.append({"seed": seed, **result})
            if options.json:
                write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))

        for adapter in options.adapters:
            done = {result["edit"] for result in results if result["seed"] == seed}
            left = [variant for variant in variants if f"{adapter}, {variant.name}" not in done]
            if left:
                bench = bench or Bench(BenchSettings(**{"epochs": 12, **given, "seed": seed}), testbed=testbed)
                run(bench, adapter, left, finished)
    print(table(results, as_it_is, "as it is"))


if __name__ == "__main__":
    main()
