"""At equal forgetting, which edit of a forget adapter costs retain and general rows least?

For each seed, a forget adapter is trained. Every edit of it is scaled until the forget loss is the retain-only model's,
and once more until the share of forget tokens that are not the first choice is. Then general rows, retain rows that
gave gradients (seen) and retain rows that gave none (unseen) are scored, row by row.

    python -m benchmarks.matched_forgetting [--testbed small|smollm2|DIR] [--seeds 0 1 2] [--four-bit] [--only NAME ...]
        [--json FILE]

An interrupted run goes on from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as stats
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm.auto import tqdm

from peft_perta import PerTAConfig
from peft_perta.adapters import Factors, add_adapter, build_adapter, servable_rank, torch_dtype
from peft_perta.comparison import MEASURES, Bench, BenchSettings, Testbed, kept_against, read_testbed
from peft_perta.data import encode_row, write_file
from peft_perta.gradients import Collector, GradientSums, InputMoments, Job, StatisticName, sweep
from peft_perta.model import Target, quiet, resolve_targets
from peft_perta.perta import FITS, GRANULARITIES, edit_layer, resolve_weighting

DENSE = 256  # no layer of the shipped model has a larger rank, so a fit at rank 256 is the dense edit
EVERYTHING = sum((fit.collector for fit in FITS.values()), Collector(tuple(GRANULARITIES.values()), (InputMoments(),)))


_EDIT = "edit"  # name of the adapter that is judged
Change = Callable[[Target, Mapping[str, GradientSums], Factors], Factors]


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit to measure."""

    name: str
    config: PerTAConfig
    swapped: bool = False  # exchange the input moments of the two sets: a control for input directions


def edit_of(
    granularity: str, weighting: str, power: float | None = None, rank: int | None = None, directions: bool = False
) -> Edit:
    tau = "" if power is None else f" tau={power:g}"
    along = ", directions" if directions else ""
    size = {None: "", DENSE: ", dense"}.get(rank, f", rank {rank}")
    config = PerTAConfig(
        weighting=weighting, granularity=granularity, power=power, rank=rank, input_directions=directions
    )
    return Edit(f"{granularity} {weighting}{tau}{along}{size}", config)


EDITS = [
    Edit("plain negation", PerTAConfig(weighting="uniform")),
    *[edit_of("factor", w, directions=True) for w in ("grad", "fisher", "empirical-fisher")],
    *[edit_of("factor", w) for w in ("grad", "fisher", "empirical-fisher")],
    *[edit_of("factor", "grad", power) for power in (0.5, 4.0)],
    *[edit_of("delta", w) for w in ("grad", "fisher", "empirical-fisher")],
    *[edit_of("delta", w, rank=DENSE) for w in ("grad", "fisher")],
    *[edit_of("delta", "grad", rank=DENSE, directions=True)],
    *[edit_of("factor+delta", "grad", rank=DENSE, directions=along) for along in (False, True)],
    *[edit_of("separable", w) for w in ("grad", "fisher", "empirical-fisher")],
    edit_of("separable", "grad", directions=True),
    Edit("factor grad, directions swapped", PerTAConfig(), swapped=True),
    *[edit_of("factor", f"grad-{control}", directions=True) for control in ("shuffled", "mean")],
    *[edit_of("factor", f"{w}-{control}") for w in ("grad", "fisher") for control in ("shuffled", "mean")],
    *[edit_of("delta", f"grad-{control}", rank=DENSE) for control in ("shuffled", "mean")],
]


class EditBench(Bench):
    """A testbed with one seed's forget adapter, and its gradient sums."""

    def __init__(
        self, settings: BenchSettings, testbed: Testbed, *, four_bit: bool = False, cache: Path | None = None
    ) -> None:
        super().__init__(settings, four_bit=four_bit, testbed=testbed, cache=cache)
        rows = {"forget": self.setup.forget_rows, "retain": self.setup.retain_rows}
        self.weighed = {name: [encode_row(row, self.tokenizer) for row in split] for name, split in rows.items()}
        self.targets = resolve_targets(self.model, "forget")
        self._sums: dict[str, dict[str, dict[str, GradientSums]]] = {}

    def gradient_sums(self, statistic: StatisticName | None) -> Mapping[str, dict[str, GradientSums]]:
        """Set -> layer -> all sums that the edits and fits here use."""
        if statistic is None:
            return {}
        if statistic not in self._sums:
            job = Job(self.model, self.targets, self.weighed, EVERYTHING, statistic, show_progress_bar=False)
            self._sums[statistic] = {name: sweep(job, name, 16) for name in self.weighed}
        return self._sums[statistic]

    @contextmanager
    def edited_by(
        self, config: PerTAConfig, name: str = _EDIT, swapped: bool = False, change: Change | None = None
    ) -> Iterator[float]:
        """Within the block, the edit is an adapter of that name. Yields the share of its energy that the fit keeps.

        Args:
            config: of the edit.
            name: of the adapter.
            swapped: exchange the input moments of the two sets.
            change: (layer, its gradient sums, its factors) -> other factors, for edits that no config describes.
        """
        weighting = resolve_weighting(config.weighting, config.power)
        rank = config.rank or self.setup.rank
        sums, factors, layers = self.gradient_sums(weighting.statistic), {}, []
        for layer in self.targets:
            pair = {name: per_layer[layer.name] for name, per_layer in sums.items()}
            if swapped:
                pair = _with_moments_swapped(pair)
            edited = edit_layer(layer, config, weighting, pair, rank)
            factors[layer.name] = edited.factors
            layers.append(edited.provenance)
            if change is not None:
                original = {name: per_layer[layer.name] for name, per_layer in sums.items()}
                factors[layer.name] = change(layer, original, factors[layer.name])
        lora_config, state_dict = build_adapter(
            self.model, factors, servable_rank(int(rank)), torch_dtype(config.dtype)
        )
        add_adapter(self.model, lora_config, state_dict, name)
        try:
            total = sum(layer.edit_norm**2 for layer in layers)
            yield sum(layer.energy_kept * layer.edit_norm**2 for layer in layers) / total
        finally:
            self.model.delete_adapter(name)


def _with_moments_swapped(pair: dict[str, GradientSums]) -> dict[str, GradientSums]:
    others = {"forget": "retain", "retain": "forget"}
    return {name: replace(sums, moments=pair[others[name]].moments) for name, sums in pair.items()}


def judge(bench: EditBench, edit: Edit) -> Iterator[dict]:
    """The scores of an edit, at matched forgetting in each measure."""
    with bench.edited_by(edit.config, swapped=edit.swapped) as energy:
        stack = bench.edited(_EDIT)
        path = bench.path(stack)
        for measure in MEASURES:
            match = path.match(measure, tolerance=0.005)
            scores = bench.row_scores(stack.at(match.strength))
            yield {"matched": measure, "strength": match.strength, "energy_kept": energy, "rows": scores}


def run(bench: EditBench, edits: list[Edit], finished: Callable[[dict], None], done: set[tuple]) -> None:
    seed = bench.settings.seed
    for name, stack in (("full model", bench.full), ("retain-only model", bench.retain_only), ("origin", bench.origin)):
        if stack is not None and (seed, name) not in done:
            finished({"seed": seed, "edit": name, "strength": None, "rows": bench.row_scores(stack)})
    for edit in tqdm([edit for edit in edits if (seed, edit.name) not in done], desc=f"edits, seed {seed}"):
        for result in judge(bench, edit):
            finished({"seed": seed, "edit": edit.name, **result})


COLUMNS = {  # title -> a row's value, over the rows of a split
    "forget loss": ("forget", lambda scores: scores["loss"]),
    "first choices lost": ("forget", lambda scores: scores["missed"]),
    "unseen retain probability": ("retain", lambda scores: [math.exp(-loss) for loss in scores["loss"]]),
    "unseen retain loss": ("retain", lambda scores: scores["loss"]),
    "seen retain probability": ("seen", lambda scores: [math.exp(-loss) for loss in scores["loss"]]),
    "general loss": ("general", lambda scores: scores["loss"]),
}


def shuffled(edit: str) -> str:
    """The name of the same edit with shuffled weights."""
    return edit.replace(" grad", " grad-shuffled", 1).replace(" fisher", " fisher-shuffled", 1)


def table(results: list[dict], control_of: Callable[[str], str] = shuffled, control: str = "shuffled weights") -> str:
    """Mean and standard deviation over seeds, as Markdown: one table for each measure of forgetting.

    Args:
        results: of ``judge``.
        control_of: name of an edit -> name of the edit that it is compared with.
        control: what the control is called in the heading.
    """
    parts = []
    for measure in dict.fromkeys(r["matched"] for r in results if "matched" in r):
        own = [result for result in results if result.get("matched") in (None, measure)]
        lines = [
            f"Matched by the {MEASURES[measure]}:\n",
            f"| edit | strength | energy kept | {' | '.join(COLUMNS)} | unseen, against {control} |",
            "|---" * (4 + len(COLUMNS)) + "|",
        ]
        for name in dict.fromkeys(result["edit"] for result in own):
            runs = [result for result in own if result["edit"] == name]
            cells = [_spread([stats.fmean(read(r["rows"][split])) for r in runs]) for split, read in COLUMNS.values()]
            strength = "" if runs[0]["strength"] is None else f"{stats.fmean(r['strength'] for r in runs):.2f}"
            energy = f"{stats.fmean(r['energy_kept'] for r in runs):.0%}" if "energy_kept" in runs[0] else ""
            controls = [result for result in own if result["edit"] == control_of(name) != name]
            gain = kept_against(runs, controls) or ""
            lines.append(f"| {name} | {strength} | {energy} | {' | '.join(cells)} | {gain} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _spread(values: list[float]) -> str:
    return f"{stats.mean(values):.3f}" + (f" ± {stats.stdev(values):.3f}" if len(set(values)) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="small", help="small, smollm2, or a directory that a build.py wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of edits, as the table prints them")
    for name in ("epochs", "rank", "batch_size", "weight_samples", "judged_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{name} of the bench")
    parser.add_argument("--learning-rate", type=float, help="learning rate of the forget adapter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    given = {f.name: value for f in fields(BenchSettings) if (value := getattr(options, f.name, None)) is not None}
    edits = [edit for edit in EDITS if not options.only or edit.name in options.only]
    testbed = read_testbed(options.testbed)
    lines = options.json.read_text(encoding="utf-8").splitlines() if options.json and options.json.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(result["seed"], result["edit"]) for result in results}

    def finished(result: dict) -> None:
        results.append(result)
        if options.json:
            write_file(options.json, "".join(json.dumps(result) + "\n" for result in results))

    for seed in options.seeds:
        settings = BenchSettings(**{"epochs": 12, **given, "seed": seed})
        cache = Path(f"{options.json}.forget_adapter_{seed}") if options.json else None
        run(EditBench(settings, testbed, four_bit=options.four_bit, cache=cache), edits, finished, done)
    print(table(results))


if __name__ == "__main__":
    main()
