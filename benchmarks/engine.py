"""The cost of the gradient engine on this CPU, as ratios to named alternatives that are timed in the same run.

    python -m benchmarks.engine [--json FILE] [--rounds 5] [--only NAME ...]

The model is a Llama of 49M parameters in float32, on 2 threads. Each round runs every arm once. A ratio is the median
over rounds of the arm's time divided by the alternative's time in the same round. Memory is the process's peak beyond
the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics as stats
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_perta import PerTAConfig, get_perta_state_dict
from peft_perta.adapters import factorize
from peft_perta.data import Sample, batches
from peft_perta.gradients import Collector, InputMoments, Job, MomentSource, Plan, StatisticName, gather, sweep
from peft_perta.model import Target, quiet, resolve_targets, sample_losses
from peft_perta.perta import GRANULARITIES

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HIDDEN, LAYERS, VOCABULARY = 512, 14, 4096
SAMPLES, TOKENS, BATCH = 16, 128, 8
GOALS = {
    "delta_mean": 1.65,
    "delta_squares": 2.0,
    "factor": 1.15,
    "separable": 1.15,
    "factor_directions": 1.15,
    "dense_time": 1.05,
    "dense_memory": 0.35,
    "layerwise": 1.7,
    "layerwise_directions": 1.7,
    "svd_time": 1 / 15,
    "svd_excess_error": 0.01,
}
KEEP_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
MEANINGS = {
    "delta_mean": "delta, mean gradient: time over that of a plain LoRA forward and backward pass",
    "delta_squares": "delta, per-sample squares: time over the same",
    "factor": "factor, mean gradient: time over the same",
    "separable": "separable, mean gradient: time over the same",
    "factor_directions": "factor with input directions (the default edit): time over the same",
    "dense_time": "delta, mean gradient: time over dense autograd",
    "dense_memory": "peak memory beyond the model, with a budget of 1/4 of the gradient sums, over dense autograd's",
    "layerwise": "layer by layer, delta: time over that of a plain LoRA forward and backward pass",
    "layerwise_directions": "layer by layer, the default edit: time over the same",
    "svd_time": "rank-16 factors of a 4096 x 4096 edit: time over torch.linalg.svd's",
    "svd_excess_error": "the same: squared error above the best rank-16 error, as a share of it",
}


def adapted_llama() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=11 * HIDDEN // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), adapter, adapter_name="forget")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.eval()


def drawn_samples(seed: int, count: int = SAMPLES) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)
    return [Sample(row, row.clone()) for row in rows]


def plain_lora(model: PeftModel, samples: list[Sample]) -> None:
    """The cost of training the adapter: forward, and backward to A and B alone."""
    for batch in batches(samples, BATCH):
        sample_losses(model, batch).sum().backward()


def dense_autograd(model: PeftModel, targets: list[Target], samples: list[Sample]) -> dict[str, Tensor]:
    """The obvious alternative: autograd computes and keeps the gradients of the weights. No LoRA branch runs."""
    weights = {target.name: target.base_layer.weight for target in targets}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    with model.disable_adapter():
        for batch in batches(samples, BATCH):
            sample_losses(model, batch).sum().backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    return gradients  # type: ignore[return-value]


def times(rounds: int) -> dict[str, list[float]]:
    """Arm -> seconds of each round."""
    model = adapted_llama()
    targets = resolve_targets(model, "forget")
    samples = drawn_samples(0)

    def swept(granularity: str, statistic: StatisticName, *moments: MomentSource) -> Callable[[], object]:
        collector = Collector((GRANULARITIES[granularity],), moments)
        job = Job(model, targets, {"forget": samples}, collector, statistic, show_progress_bar=False)
        return lambda: sweep(job, "forget", BATCH)

    def layer_by_layer(granularity: str, *moments: MomentSource) -> Callable[[], object]:
        blocks = tuple(
            tuple(t.name for t in targets if f".layers.{index}." in t.name) for index in reversed(range(LAYERS))
        )
        plan = Plan("layerwise", blocks, "device", "device", BATCH)
        sets = {"forget": samples[: SAMPLES // 2], "retain": samples[SAMPLES // 2 :]}
        collector = Collector((GRANULARITIES[granularity],), moments)
        job = Job(model, targets, sets, collector, "mean", show_progress_bar=False)
        return lambda: deque(gather(job, plan), maxlen=0)

    def plain() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        plain_lora(model, samples)
        model.zero_grad(set_to_none=True)

    arms: dict[str, Callable[[], object]] = {
        "plain": plain,
        "delta_mean": swept("delta", "mean"),
        "delta_squares": swept("delta", "squares"),
        "factor": swept("factor", "mean"),
        "separable": swept("separable", "mean"),
        "factor_directions": swept("factor", "mean", InputMoments()),
        "layerwise": layer_by_layer("delta"),
        "layerwise_directions": layer_by_layer("factor", InputMoments()),
        "dense": lambda: dense_autograd(model, targets, samples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            gc.collect()
            start = time.perf_counter()
            arm()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Peak:
    """The process's peak resident size within the block, beyond its size before."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.process = psutil.Process()
        self.before = self.most = self.process.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *exception: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def beyond(self) -> int:
        return self.most - self.before


def peak_memory(arm: str) -> dict[str, float]:
    """Peak memory of computing both sets' gradients (and, for 'ours', the adapter too), in bytes.

    It must run in a fresh process.
    """
    model = adapted_llama()
    targets = resolve_targets(model, "forget")
    sets = {"forget": drawn_samples(0), "retain": drawn_samples(1)}
    gradient_bytes = sum(2 * 4 * target.A.shape[1] * len(target.B) for target in targets)
    plain_lora(model, drawn_samples(2, 1))  # the first pass allocates the libraries' own buffers
    model.zero_grad(set_to_none=True)
    with Peak() as peak:
        if arm == "dense":
            gradients = [dense_autograd(model, targets, samples) for samples in sets.values()]
            assert len(gradients) == 2
        else:
            rows = [[{"input_ids": s.input_ids, "labels": s.labels} for s in samples] for samples in sets.values()]
            host_memory = peak.before + gradient_bytes // 4
            config = PerTAConfig(granularity="delta", batch_size=BATCH, input_directions=False, host_memory=host_memory)
            get_perta_state_dict(model, config, *rows)
    return {"beyond": peak.beyond, "gradient_sums": gradient_bytes}


def apart(*arguments: str, **environment: str) -> dict:
    """The measurements of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.engine", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if finished.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def svd(rounds: int) -> tuple[list[float], float]:
    """Time over torch.linalg.svd's in each round, and excess squared error."""
    torch.manual_seed(0)
    size, rank = 4096, 16
    forget, retain = torch.randn(size, size).abs(), torch.randn(size, size).abs()
    edit = torch.randn(size, rank) @ torch.randn(rank, size) * forget / (forget + retain)
    ratios, excess = [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        fitted = factorize(edit, rank)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        S = torch.linalg.svd(edit, full_matrices=False).S
        ratios.append(ours / (time.perf_counter() - start))
        best = float(S[rank:].double().square().sum())
        error = float((edit - fitted.B @ fitted.A).double().square().sum())
        excess = max(excess, error / best - 1)
    return ratios, excess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median over (default: 5)")
    parser.add_argument("--only", nargs="+", choices=["time", "memory", "svd"], default=["time", "memory", "svd"])
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=["dense", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(2)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of)))
        return
    if options.times:
        print(json.dumps(times(options.rounds)))
        return
    ratios: dict[str, float] = {}
    if "time" in options.only:
        # The process keeps freed memory. Otherwise an arm sometimes pays for pages that another arm gave back, which
        # costs more than the differences of interest.
        seconds = apart("--times", "--rounds", str(options.rounds), **KEEP_PAGES)
        for name in seconds.keys() - {"plain", "dense"}:
            ratios[name] = stats.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        ratios["dense_time"] = stats.median(a / b for a, b in zip(seconds["delta_mean"], seconds["dense"], strict=True))
    if "memory" in options.only:
        peaks = [(apart("--memory-of", "ours"), apart("--memory-of", "dense")) for _ in range(options.rounds)]
        ratios["dense_memory"] = stats.median(ours["beyond"] / dense["beyond"] for ours, dense in peaks)
    if "svd" in options.only:
        of_time, excess = svd(options.rounds)
        ratios["svd_time"], ratios["svd_excess_error"] = stats.median(of_time), excess
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds\n")
    print("| measure | ratio | goal |\n|---|---|---|")
    for name in (name for name in GOALS if name in ratios):
        print(f"| {name}: {MEANINGS[name]} | {ratios[name]:.4g} | <= {GOALS[name]:.3g} |")
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
