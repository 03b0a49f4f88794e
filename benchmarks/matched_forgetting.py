"""Does PerTA cost the rows to keep less than plain negation, at equal forgetting?

For each seed a forget adapter is trained on the shipped model; every edit of it is scaled until the forget rows' loss
meets the retain-only reference's, and the losses on retain rows (none of which gave a gradient) and on general rows
are read.

    python -m benchmarks.matched_forgetting [--seeds 0 1 2] [--four-bit] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from peft_perta import PerTAConfig
from peft_perta.adapter import add_adapter, build_adapter, emitted_dtype
from peft_perta.config import servable_rank
from peft_perta.data import encode_row
from peft_perta.demo.run import SPLITS, DemoSettings, prepare, spread
from peft_perta.evaluation import losses_of
from peft_perta.gradients import sweep
from peft_perta.granularities import GRANULARITIES
from peft_perta.loading import quiet
from peft_perta.methods.perta import edit_layer
from peft_perta.stack import adapter_strength
from peft_perta.strength import match_forgetting
from peft_perta.targets import resolve_targets
from peft_perta.weightings import resolve_weighting

DENSE = 256  # no layer of the shipped model has a larger rank, so an edit refitted at 256 is the dense edit


@dataclass(frozen=True)
class Edit:
    name: str
    config: PerTAConfig


def _edit(granularity: str, weighting: str, power: float | None = None, rank: int | None = None) -> Edit:
    tau = "" if power is None else f" tau={power:g}"
    size = {None: "", DENSE: ", dense"}[rank]
    config = PerTAConfig(weighting=weighting, granularity=granularity, power=power, rank=rank)
    return Edit(f"{granularity} {weighting}{tau}{size}", config)


EDITS = [
    Edit("plain negation", PerTAConfig(weighting="uniform")),
    *[_edit("factor", w) for w in ("grad", "fisher", "empirical-fisher")],
    *[_edit("factor", "grad", power) for power in (0.5, 4.0)],
    *[_edit("delta", w) for w in ("grad", "fisher", "empirical-fisher")],
    *[_edit("delta", w, rank=DENSE) for w in ("grad", "fisher")],
    *[_edit("separable", w) for w in ("grad", "fisher", "empirical-fisher")],
    *[_edit("factor", f"{w}-{control}") for w in ("grad", "fisher") for control in ("shuffled", "mean")],
    *[_edit("delta", f"grad-{control}", rank=DENSE) for control in ("shuffled", "mean")],
]


def run(seed: int, four_bit: bool, edits: list[Edit], settings: DemoSettings) -> list[dict]:
    start = time.perf_counter()
    model, tokenizer, rows = prepare(replace(settings, seed=seed), four_bit=four_bit)
    samples = {name: [encode_row(row, tokenizer) for row in found] for name, found in rows.items()}
    weighed = {"forget": samples["forget"], "retain": samples["retain"][::2][: settings.weight_samples]}
    judged = {name: spread(samples[name][1::2] if name == "retain" else samples[name], 100) for name in SPLITS}

    def losses(*adapters: str, splits=SPLITS) -> dict[str, float]:
        return {name: float(losses_of(model, judged[name], adapters=list(adapters)).mean()) for name in splits}

    results = [
        {"seed": seed, "edit": name, "strength": None, **losses(*adapters)}
        for name, adapters in (("full model", ["task"]), ("retain-only reference", ["reference"]))
    ]
    forget_alone = losses("forget")
    print(f"seed {seed}: the forget adapter on theta_0: {forget_alone}, {time.perf_counter() - start:.0f} s so far")
    target = results[1]["forget"]
    targets = resolve_targets(model, "forget")
    known: dict[tuple, dict] = {}
    for edit in tqdm(edits, desc=f"edits, seed {seed}"):
        weighting = resolve_weighting(edit.config.weighting, edit.config.power)
        granularity = GRANULARITIES[edit.config.granularity]
        key = (edit.config.granularity == "delta", weighting.statistic)
        if weighting.statistic and key not in known:  # factor and separable read the same gradients
            known[key] = {
                name: sweep(model, targets, found, granularity, weighting.statistic, adapters=[], batch_size=16,
                            name=name, show_progress_bar=False)
                for name, found in weighed.items()
            }  # fmt: skip
        rank = edit.config.rank or settings.rank
        edited = {}
        for layer in targets:
            pair = {name: per_layer[layer.name] for name, per_layer in known.get(key, {}).items()}
            edited[layer.name] = edit_layer(layer, edit.config, weighting, pair, rank)
        factors, layers = {name: found[0] for name, found in edited.items()}, [found[1] for found in edited.values()]
        lora_config, state_dict = build_adapter(model, factors, servable_rank(rank), emitted_dtype(edit.config))
        add_adapter(model, lora_config, state_dict, "edit")

        def loss_at(strength: float) -> float:
            with adapter_strength(model, "edit", strength):
                return losses("task", "edit", splits=("forget",))["forget"]

        match = match_forgetting(loss_at, target, tolerance=0.005)
        with adapter_strength(model, "edit", match.strength):
            found = losses("task", "edit")
        energy = sum(layer.energy_kept * layer.edit_norm**2 for layer in layers) / sum(
            layer.edit_norm**2 for layer in layers
        )
        results.append(
            {"seed": seed, "edit": edit.name, "strength": match.strength, "rank": rank, "energy_kept": energy, **found}
        )
        model.delete_adapter("edit")
    return results


def table(results: list[dict]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| edit | strength | energy kept | forget | retain | general |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result["edit"] for result in results):
        found = [result for result in results if result["edit"] == name]
        cells = [_spread([r[split] for r in found]) for split in SPLITS]
        strength = "" if found[0]["strength"] is None else f"{stats.mean(r['strength'] for r in found):.2f}"
        energy = f"{stats.mean(r['energy_kept'] for r in found):.0%}" if "energy_kept" in found[0] else ""
        lines.append(f"| {name} | {strength} | {energy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{stats.mean(values):.3f}" + (f" ± {stats.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of edits, as the table prints them")
    parser.add_argument("--epochs", type=int, help="of the forget adapter")
    parser.add_argument("--rank", type=int, help="of the forget adapter")
    parser.add_argument("--learning-rate", type=float, help="of the forget adapter")
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
