"""Does a learned map from (g_f, g_r, task vector) to weights beat the ratio |g_f| / (|g_f| + |g_r|)?

The map is a step function. Each element of the task vector falls into one of 2 x 8 cells: by whether its removal raises
the retain loss to first order (the sign of g_r times the task vector), and by its ratio (eighths of [0, 1]). Each cell
has one weight, which starts at the mean ratio of the cell. Gradient descent on the weights lowers the held-out retain
loss at matched forgetting. The derivative with respect to a cell's weight is the inner product of the gradient and the
cell's part of the edit, so one backward pass over each held-out set gives all derivatives. The retain rows that fit the
map give no gradients to the ratio, and are not judged.

    python -m benchmarks.learned_map [--seeds 0 1 2] [--steps 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.matched_forgetting import DENSE, EditBench, edit_of, table
from peft_perta.adapters import Factors, factorize
from peft_perta.comparison import BenchSettings, small
from peft_perta.data import encode_row, spread
from peft_perta.evaluation import losses_of
from peft_perta.gradients import Collector, GradientSums, Job, sweep
from peft_perta.model import Target, adapter_strength, quiet
from peft_perta.perta import GRANULARITIES, ratio, task_vector

RATIOS = 8
CELLS = 2 * RATIOS
STEP = 0.5  # largest change of the logarithm of a weight in one step
EDIT = edit_of("delta", "grad", rank=DENSE)


def cells_of(layer: Target, pair: Mapping[str, GradientSums]) -> tuple[Tensor, Tensor]:
    """The cell [O, I] and the ratio [O, I] of each element."""
    gradients = [pair[name].magnitudes()["weight"] for name in ("forget", "retain")]
    signed = pair["retain"].gradients["weight"].reshape(len(layer.B), -1)
    weights = ratio(*gradients, 1.0)
    harmful = (
        signed * task_vector(layer.A, layer.B, layer.scaling) < 0
    ).long()  # removing the element raises the retain loss
    return harmful * RATIOS + (weights * RATIOS).long().clamp(0, RATIOS - 1), weights


def run(seed: int, steps: int, settings: BenchSettings) -> list[dict]:
    bench = EditBench(replace(settings, seed=seed), testbed := small())
    pairs = {
        layer.name: {name: bench.gradient_sums("mean")[name][layer.name] for name in ("forget", "retain")}
        for layer in bench.targets
    }
    cells = {layer.name: cells_of(layer, pairs[layer.name]) for layer in bench.targets}
    counts, sums = torch.zeros(CELLS), torch.zeros(CELLS)
    for cell, weights in cells.values():
        counts += torch.bincount(cell.flatten(), minlength=CELLS)
        sums += torch.bincount(cell.flatten(), weights.flatten(), minlength=CELLS)
    learned = (sums / counts.clamp_min(1)).log()
    held_out = {
        "forget": bench.samples["forget"],
        "retain": [
            encode_row(row, bench.tokenizer)
            for row in spread(testbed.rows["retain"][::2][settings.weight_samples :], 100)
        ],
    }

    def edit(layer: Target, pair: Mapping[str, GradientSums], factors: Factors) -> Factors:
        weights = learned.exp()[cells[layer.name][0]]
        return factorize(-task_vector(layer.A, layer.B, layer.scaling) * weights, DENSE)

    results = []

    def judge(label: str, strength: float) -> None:
        rows = bench.row_scores(bench.edited("edit", strength))
        results.append({"seed": seed, "edit": label, "matched": "loss", "strength": strength, "rows": rows})

    def matched() -> float:
        return bench.match(bench.edited("edit"), tolerance=0.005).strength

    with bench.edited_by(EDIT.config):
        judge("ratio", matched())
    best = float("inf"), learned.clone(), 1.0
    guess = results[0]["strength"]
    for _ in tqdm(range(steps + 1), desc=f"steps, seed {seed}"):
        with bench.edited_by(EDIT.config, change=edit):
            guess = matched()
            if not results[1:]:
                judge("step function, as the ratio", guess)
            with adapter_strength(bench.model, "edit", guess):
                retain = float(losses_of(bench.model, held_out["retain"], adapters=["task", "edit"]).mean())
                slopes = {name: _slopes(bench, cells, learned, samples) for name, samples in held_out.items()}
        best = min(best, (retain, learned.clone(), guess), key=lambda candidate: candidate[0])
        # Move along the surface of equal forgetting: the common scale of all weights is projected out.
        total = {name: slope.sum() for name, slope in slopes.items()}
        direction = slopes["retain"] - total["retain"] / total["forget"] * slopes["forget"]
        learned = learned - STEP * direction / direction.abs().max()
    _, learned, guess = best
    with bench.edited_by(EDIT.config, change=edit):
        judge("step function, learned", matched())
    shares = (learned - learned.max()).exp()
    shown = [[round(w, 2) for w in half] for half in shares.reshape(2, RATIOS).tolist()]
    print(f"seed {seed}: held-out retain loss {best[0]:.3f}; weights over the largest, by eighth of the ratio:")
    print(f"harmless {shown[0]}, harmful {shown[1]}", flush=True)
    return results


def _slopes(bench: EditBench, cells: Mapping[str, tuple[Tensor, Tensor]], learned: Tensor, samples: list) -> Tensor:
    """The derivative of the mean loss with respect to the logarithm of each cell's weight, [CELLS]."""
    collector = Collector((GRANULARITIES["delta"],))
    adapters = ["task", "edit"]
    job = Job(bench.model, bench.targets, {"slopes": samples}, collector, "mean", adapters, show_progress_bar=False)
    sums = sweep(job, "slopes", 16)
    slopes = torch.zeros(CELLS)
    for layer in bench.targets:
        edit = -task_vector(layer.A, layer.B, layer.scaling) * learned.exp()[cells[layer.name][0]]
        gradient = sums[layer.name].gradients["weight"].reshape(edit.shape) / len(samples)
        slopes += torch.bincount(cells[layer.name][0].flatten(), (gradient * edit).flatten(), minlength=CELLS)
    return slopes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8, help="descent steps on the weights (default: 8)")
    parser.add_argument("--epochs", type=int, help="training epochs of the forget adapter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON lines")
    options = parser.parse_args()
    quiet()
    settings = BenchSettings() if options.epochs is None else BenchSettings(epochs=options.epochs)
    results = [result for seed in options.seeds for result in run(seed, options.steps, settings)]
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
