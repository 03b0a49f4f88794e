"""At equal forgetting, does PerTA raise the loss of retain and general rows less than plain negation?

For each seed, a forget adapter is trained on the shipped model. Every edit of it is scaled until the forget loss is the
retain-only model's. Then the losses on general rows and on retain rows that gave no gradients are measured.

    python -m benchmarks.matched_forgetting [--seeds 0 1 2] [--four-bit] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from peft_perta import PerTAConfig
from peft_perta.adapters import Factors, add_adapter, build_adapter, servable_rank, torch_dtype
from peft_perta.comparison import SPLITS, DemoSettings, prepare
from peft_perta.data import encode_row, spread
from peft_perta.evaluation import Match, losses_of, match_forgetting
from peft_perta.gradients import Collector, GradientSums, InputMoments, Job, StatisticName, sweep
from peft_perta.model import Target, adapter_strength, quiet, resolve_targets
from peft_perta.perta import FITS, GRANULARITIES, edit_layer, resolve_weighting

DENSE = 256  # no layer of the shipped model has a larger rank, so a fit at rank 256 is the dense edit
EVERYTHING = sum((fit.collector for fit in FITS.values()), Collector(tuple(GRANULARITIES.values()), (InputMoments(),)))


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


class Bench:
    """The shipped model with one seed's forget adapter, its gradient sums, and the judged rows."""

    def __init__(self, seed: int, four_bit: bool, settings: DemoSettings) -> None:
        self.settings = settings
        self.model, tokenizer, rows = prepare(replace(settings, seed=seed), four_bit=four_bit)
        samples = {name: [encode_row(row, tokenizer) for row in split] for name, split in rows.items()}
        self.weighed = {"forget": samples["forget"], "retain": samples["retain"][::2][: settings.weight_samples]}
        self.held_out = samples["retain"][::2][settings.weight_samples :]  # give no gradients, and are not judged
        self.judged = {name: spread(samples[name][1::2] if name == "retain" else samples[name], 100) for name in SPLITS}
        self.targets = resolve_targets(self.model, "forget")
        self.target_loss = self.losses("retain-only", splits=("forget",))["forget"]
        self.full_loss = self.losses("task", splits=("forget",))["forget"]
        self._sums: dict[str, dict[str, dict[str, GradientSums]]] = {}

    def losses(self, *adapters: str, splits=SPLITS) -> dict[str, float]:
        return {n: float(losses_of(self.model, self.judged[n], adapters=list(adapters)).mean()) for n in splits}

    def gradient_sums(self, statistic: StatisticName | None) -> Mapping[str, dict[str, GradientSums]]:
        """Set -> layer -> all sums that the edits and fits here use."""
        if statistic is None:
            return {}
        if statistic not in self._sums:
            job = Job(self.model, self.targets, self.weighed, EVERYTHING, statistic, show_progress_bar=False)
            self._sums[statistic] = {name: sweep(job, name, 16) for name in self.weighed}
        return self._sums[statistic]

    @contextmanager
    def edited(
        self, config: PerTAConfig, name: str = "edit", swapped: bool = False, change: Change | None = None
    ) -> Iterator[float]:
        """Within the block, the edit is an adapter of that name. Yields the share of its energy that the fit keeps.

        Args:
            config: of the edit.
            name: of the adapter.
            swapped: exchange the input moments of the two sets.
            change: (layer, its gradient sums, its factors) -> other factors, for edits that no config describes.
        """
        weighting = resolve_weighting(config.weighting, config.power)
        rank = config.rank or self.settings.rank
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

    def matched(self, name: str = "edit", guess: float = 1.0) -> Match:
        """The strength of matched forgetting. A good guess saves evaluations."""

        def loss_at(share: float) -> float:
            if share == 0:
                return self.full_loss
            with adapter_strength(self.model, name, share * guess):
                return self.losses("task", name, splits=("forget",))["forget"]

        match = match_forgetting(loss_at, self.target_loss, tolerance=0.005)
        return replace(match, strength=match.strength * guess)


def _with_moments_swapped(pair: dict[str, GradientSums]) -> dict[str, GradientSums]:
    others = {"forget": "retain", "retain": "forget"}
    return {name: replace(sums, moments=pair[others[name]].moments) for name, sums in pair.items()}


def run(seed: int, four_bit: bool, edits: list[Edit], settings: DemoSettings) -> list[dict]:
    start = time.perf_counter()
    bench = Bench(seed, four_bit, settings)
    results = [
        {"seed": seed, "edit": name, "strength": None, **bench.losses(*adapters)}
        for name, adapters in (("full model", ["task"]), ("retain-only model", ["retain-only"]))
    ]
    alone = bench.losses("forget")
    print(
        f"seed {seed}: the forget adapter on the origin model: {alone}, {time.perf_counter() - start:.0f} s so far",
        flush=True,
    )
    for edit in tqdm(edits, desc=f"edits, seed {seed}"):
        with bench.edited(edit.config, swapped=edit.swapped) as energy:
            match = bench.matched()
            with adapter_strength(bench.model, "edit", match.strength):
                losses = bench.losses("task", "edit")
        results.append({"seed": seed, "edit": edit.name, "strength": match.strength, "energy_kept": energy, **losses})
    return results


def table(results: list[dict]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| edit | strength | energy kept | forget | retain | general |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result["edit"] for result in results):
        runs = [result for result in results if result["edit"] == name]
        cells = [_spread([r[split] for r in runs]) for split in SPLITS]
        strength = "" if runs[0]["strength"] is None else f"{stats.mean(r['strength'] for r in runs):.2f}"
        energy = f"{stats.mean(r['energy_kept'] for r in runs):.0%}" if "energy_kept" in runs[0] else ""
        lines.append(f"| {name} | {strength} | {energy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{stats.mean(values):.3f}" + (f" ± {stats.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of edits, as the table prints them")
    parser.add_argument("--epochs", type=int, help="training epochs of the forget adapter")
    parser.add_argument("--rank", type=int, help="rank of the forget adapter")
    parser.add_argument("--learning-rate", type=float, help="learning rate of the forget adapter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    given = {k: getattr(options, k) for k in ("epochs", "rank", "learning_rate") if getattr(options, k) is not None}
    settings = replace(DemoSettings(), **given)
    edits = [edit for edit in EDITS if not options.only or edit.name in options.only]
    results = [result for seed in options.seeds for result in run(seed, options.four_bit, edits, settings)]
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(table(results))


if __name__ == "__main__":
    main()
