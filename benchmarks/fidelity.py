"""How much does fitting an edit at a rank lose, and which fit loses least?

For each seed, a forget adapter is trained on the shipped model, and dense edits of it are fitted at ranks r/2, r, 2r
and 4r by every fit, where r is the rank of the forget adapter. Measured are the share of energy kept; the KL divergence
of the fitted adapter's next-token distributions from the dense edit's, on the judged retain rows, both at the strength
where the dense edit matches forgetting; and retain and general loss at matched forgetting.

    python -m benchmarks.fidelity [--seeds 0 1 2] [--weightings grad] [--quick] [--json FILE]

``--quick`` measures only the ranks around r, and no further variants. ``--json`` appends to the file after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.matched_forgetting import DENSE, Change, Edit, EditBench, edit_of
from peft_perta import PerTAConfig
from peft_perta.adapters import Factors, factorize
from peft_perta.comparison import BenchSettings, small
from peft_perta.data import batches
from peft_perta.gradients import GradientSums
from peft_perta.model import Target, adapter_strength, preserved, quiet
from peft_perta.perta import FITS, ratio

RANK = BenchSettings().rank
RANKS = (RANK // 2, RANK, 2 * RANK, 4 * RANK)


def edits_of(weighting: str, quick: bool) -> dict[Edit, tuple[int, ...]]:
    """The edits at full rank, and the ranks to fit them at; the factor edit is exact from the forget adapter's rank."""
    edits = {
        edit_of("delta", weighting): (RANK, 2 * RANK) if quick else RANKS,
        edit_of("factor", weighting, directions=True): (RANK // 2, RANK) if quick else RANKS,
    }
    return edits | ({edit_of("factor+delta", "grad", directions=True): (RANK,)} if weighting == "grad" else {})


def loha(rank: int) -> Change:
    """W (*) (B A) with W of a low rank: PEFT's LoHa form. It is as large as a LoRA adapter of the sum of both ranks."""

    def change(layer: Target, pair: Mapping[str, GradientSums], factors: Factors) -> Factors:
        W = ratio(*(pair[name].magnitudes()["weight"] for name in ("forget", "retain")), 1.0)
        fitted = factorize(W, rank)
        return factorize(-layer.scaling * (layer.B @ layer.A) * (fitted.B @ fitted.A), DENSE)

    return change


def without_middle_layers(layer: Target, pair: Mapping[str, GradientSums], factors: Factors) -> Factors:
    """Leave the middle third of the shipped model's six blocks unedited."""
    skipped = any(f".layers.{index}." in layer.name for index in (2, 3))
    return replace(factors, B=factors.B * (not skipped))


# Label, rank of a LoRA adapter of the same size, config of the edit, and the change to its factors.
VARIANTS: list[tuple[str, int, PerTAConfig, Change]] = [
    ("LoHa, W at rank r", 2 * RANK, PerTAConfig(granularity="delta", input_directions=False, rank=DENSE), loha(RANK)),
    ("LoHa, W at rank 3r", 4 * RANK, PerTAConfig(granularity="delta", input_directions=False, rank=DENSE),
     loha(3 * RANK)),
    ("factor grad, directions, middle layers skipped", RANK, PerTAConfig(), without_middle_layers),
]  # fmt: skip


def fit_kl(bench: EditBench, p: str, q: str, strength: float) -> float:
    """KL(p || q) in nats, as a mean over the judged retain rows' tokens with a loss; both adapters at one strength."""
    total = count = 0.0
    for batch in batches(bench.samples["retain"], 50):
        log_probabilities = []
        with ExitStack() as strengths:
            for name in (p, q):
                strengths.enter_context(adapter_strength(bench.model, name, strength))
            for name in (p, q):
                with preserved(bench.model, ["task", name]), torch.no_grad():
                    output = bench.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                    logits = output.logits[:, :-1][batch.labels[:, 1:] != -100]
                    log_probabilities.append(torch.log_softmax(logits, dim=-1))
        log_p, log_q = log_probabilities
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(log_p)
    return total / count


def run(seed: int, weightings: Sequence[str] = ("grad",), quick: bool = False) -> list[dict]:
    bench = EditBench(BenchSettings(seed=seed), small())
    edits = {edit: ranks for weighting in weightings for edit, ranks in edits_of(weighting, quick).items()}
    results = []

    def judge(name: str, edit: str, fit: str, rank: int | None, energy: float, **measured: float) -> float:
        match = bench.match(bench.edited(name), tolerance=0.005)
        losses = bench.losses(bench.edited(name, match.strength))
        results.append({"seed": seed, "edit": edit, "fit": fit, "rank": rank, "strength": match.strength,
                        "energy_kept": energy, **measured, **losses})  # fmt: skip
        return match.strength

    with bench.edited_by(PerTAConfig(weighting="uniform"), "negation") as energy:
        judge("negation", "plain negation", "", None, energy)
    with tqdm(total=sum(map(len, edits.values())), desc=f"ranks, seed {seed}") as bar:
        for edit, ranks in edits.items():
            with bench.edited_by(replace(edit.config, rank=DENSE), "dense") as energy:
                strength = judge("dense", edit.name, "dense", None, energy)
                for rank in ranks:
                    exact = edit.config.granularity == "factor" and rank >= RANK
                    for fit in ("truncated",) if exact else FITS:
                        with bench.edited_by(replace(edit.config, rank=rank, fit=fit), "fitted") as energy:
                            kl = fit_kl(bench, "dense", "fitted", strength)
                            label = "exact" if exact else fit
                            judge("fitted", edit.name, label, rank, energy, kl=kl)
                    bar.update()
    variants = [] if quick or "grad" not in weightings else VARIANTS
    for name, rank, config, change in tqdm(variants, desc=f"variants, seed {seed}"):
        with bench.edited_by(config, "variant", change=change) as energy:
            judge("variant", name, "tried", rank, energy)
    return results


def table(results: list[dict]) -> str:
    """Mean and standard deviation over seeds, as Markdown.

    'gain' is what the edit saves against plain negation, as a share of what the paper's dense edit (delta grad) saves.
    """
    lines = ["| edit | fit | rank | energy kept | KL | retain | general | gain |", "|---|---|---|---|---|---|---|---|"]

    def of(edit: str, fit: str) -> dict[int, dict]:
        return {r["seed"]: r for r in results if (r["edit"], r["fit"]) == (edit, fit)}

    negation, paper = of("plain negation", ""), of("delta grad", "dense")
    for key in dict.fromkeys((r["edit"], r["fit"], r["rank"]) for r in results):
        runs = [r for r in results if (r["edit"], r["fit"], r["rank"]) == key]
        gain = ""
        if paper and key[0] != "plain negation":
            gains = [_gain(r, negation[r["seed"]], paper[r["seed"]]) for r in runs]
            gain = f"{stats.mean(gains):.0%}" + (f" ± {stats.stdev(gains):.0%}" if len(gains) > 1 else "")
        kl = f"{stats.mean(r['kl'] for r in runs):.3f}" if "kl" in runs[0] else ""
        energy = f"{stats.mean(r['energy_kept'] for r in runs):.0%}"
        cells = [_spread([r[split] for r in runs]) for split in ("retain", "general")]
        lines.append(f"| {key[0]} | {key[1]} | {key[2] or ''} | {energy} | {kl} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def _gain(result: dict, negation: dict, paper: dict) -> float:
    """Retain plus general loss that the edit saves against plain negation, as a share of what the dense edit saves."""
    saved, by_paper = (sum(negation[s] - r[s] for s in ("retain", "general")) for r in (result, paper))
    return saved / by_paper


def _spread(values: list[float]) -> str:
    return f"{stats.mean(values):.3f}" + (f" ± {stats.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weightings", nargs="+", default=["grad"], help="weightings of the edits (default: grad)")
    parser.add_argument("--quick", action="store_true", help="measure only the ranks around r")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append every result as JSON lines, and show all results of the file"
    )
    options = parser.parse_args()
    quiet()
    results = []
    for seed in options.seeds:
        of_seed = run(seed, options.weightings, options.quick)
        results += of_seed
        if options.json:
            with open(options.json, "a") as file:
                file.writelines(json.dumps(result) + "\n" for result in of_seed)
    if options.json:
        results = [json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()]
    print(table(list({(r["seed"], r["edit"], r["fit"], r["rank"]): r for r in results}.values())))


if __name__ == "__main__":
    main()
