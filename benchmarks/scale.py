"""What the gradient engine would need for models that nobody here has run: the planner's own arithmetic, on paper.

    python -m benchmarks.scale            # the tables of docs/scale.md
    python -m benchmarks.scale --check    # the same arithmetic against what the engine finds on small models

No weight is made. What a forward pass of the longest sample would show (``Measured``) is written down from the shape of
the model; ``make_plan`` does the rest. ``--check`` compares it with what ``measure`` finds on a small model of the same
architecture, and the predicted cost with the measured times of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_perta import ConfigError, PerTAConfig
from peft_perta.data import load_samples
from peft_perta.gradients import Collector, InputMoments, Plan
from peft_perta.gradients._planning import make_plan
from peft_perta.gradients._probe import _GPU_WORKSPACE, _INPUT_COPIES, _TRANSIENT, _traced_forward, measure
from peft_perta.gradients.blocks import find_blocks
from peft_perta.gradients.gradient_sums import rows_of_a_gram_block
from peft_perta.gradients.plan import LayerCost, Measured
from peft_perta.model import DISK, HOST, quiet, resolve_targets, show_size
from peft_perta.perta import gradient_job
from peft_perta.perta._input_directions import COPIES
from peft_perta.perta.layer import collector_of, edit_copies

GIB = 2**30
SAMPLES, TOKENS, BATCH, RANK = 800, 256, 8, 16  # of both sets; each sample is as long
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per element: 4 bits, a scale of 8 bits per 64, one of 32 per 256 of those
SHARE = 0.4  # of a card's peak rate that is assumed
IN_USE = 8 * GIB  # of the host, by the process itself
SPARE = 0.9  # of the memory that the engine takes by default


@dataclass(frozen=True)
class Shape:
    """The shape of a model, as its config.json on the Hugging Face Hub has it.

    Attributes:
        hidden, intermediate, blocks, heads, kv_heads, head, vocabulary: the sizes of a Llama; ``intermediate`` of one
            expert.
        experts, chosen: of a mixture, and how many of them a token takes; 0 for a dense model.
        tapped: whether the adapter sits on the experts too, beside the attention.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    chosen: int = 0
    tapped: bool = False

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the target layers of one block."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        attention = {"q": (query, self.hidden), "k": (key, self.hidden), "v": (key, self.hidden)}
        attention["o"] = (self.hidden, query)
        if not self.experts:
            wide = (self.intermediate, self.hidden)
            return {**attention, "gate": wide, "up": wide, "down": (self.hidden, self.intermediate)}
        of_expert = {"gate_up": (2 * self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
        experts = {f"{name}[{number}]": of for number in range(self.experts) for name, of in of_expert.items()}
        return {**attention, **(experts if self.tapped else {})}

    @property
    def weights(self) -> dict[str, int]:
        """Elements of the weights: of a block's linear layers, of a block's experts, and of one vocabulary matrix."""
        linear = sum(o * i for name, (o, i) in self.layers.items() if "[" not in name) + self.experts * self.hidden
        return {
            "linear": linear,
            "experts": self.experts * 3 * self.hidden * self.intermediate,
            "vocabulary": self.vocabulary * self.hidden,
        }

    @property
    def active(self) -> int:
        """Elements of the weights that one token goes through."""
        of_block = self.weights["linear"] + self.chosen * 3 * self.hidden * self.intermediate
        return self.blocks * of_block + self.weights["vocabulary"]


SHAPES = {  # https://huggingface.co/NAME/blob/main/config.json
    "meta-llama/Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "meta-llama/Llama-3.1-70B": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "meta-llama/Llama-3.1-405B": Shape(16384, 53248, 126, 128, 8, 128, 128256),
    "Qwen/Qwen3-235B-A22B": Shape(4096, 1536, 94, 64, 4, 128, 151936, experts=128, chosen=8),
}
# number of cards, GiB of one, its dense bfloat16 rate by its data sheet (RTX 4090; A100), GiB of the host
CARDS = {"24 GB": (1, 24, 165e12, 128), "80 GB": (1, 80, 312e12, 256), "8 x 80 GB": (8, 80, 312e12, 1024)}
WORK = {
    "refine": (Collector(moments=(InputMoments(),)), COPIES),
    "unlearn, factor (default)": (collector_of(PerTAConfig()), edit_copies(PerTAConfig())),
    "unlearn, delta": tuple(
        of(PerTAConfig(granularity="delta", input_directions=False)) for of in (collector_of, edit_copies)
    ),
}


def saved_bytes(shape: Shape, tokens: int) -> tuple[int, int, int, int]:
    """Bytes that a backward pass keeps of one sample in bfloat16: (of one block, its largest tensor, of what comes
    after the blocks, the largest tensor of that)."""
    query, key, hidden, wide = shape.heads * shape.head, shape.kv_heads * shape.head, shape.hidden, shape.intermediate
    sizes = [4 * hidden, 4 * hidden, 4, 4, 2 * hidden, 2 * key, *[2 * query] * 4, 4 * shape.heads]
    if shape.experts:
        chosen = shape.chosen
        sizes += [4 * query, 4 * key, 4 * shape.heads, 4 * shape.kv_heads]  # queries and keys are normalised
        sizes += [4 * shape.experts, *[8 * chosen] * 4, 4 * chosen * wide, 2 * chosen * wide, 2 * chosen]
        sizes += [2 * chosen * hidden] * (2 if shape.tapped else 1) + [2 * chosen * wide] * shape.tapped
    else:
        sizes += [2 * hidden, *[2 * wide] * 4]
    after = [4 * hidden, 4, 2 * shape.vocabulary * (tokens - 1) / tokens]
    return (int(sum(sizes) * tokens), int(max(sizes) * tokens), int(sum(after) * tokens), int(max(after) * tokens))


def on_paper(shape: Shape, work: str, *, packed: bool, cards: int = 1, tokens: int = TOKENS) -> Measured:
    """What ``measure`` would find on GPUs, the blocks spread evenly over them."""
    collector, copies = WORK[work]
    fakes = {
        name: SimpleNamespace(
            A=torch.empty(RANK, inputs, device="meta"),
            B=torch.empty(outputs, RANK, device="meta"),
            parameter=name if "[" in name else None,
        )
        for name, (outputs, inputs) in shape.layers.items()
    }
    targets: Any = fakes
    size = shape.blocks * sum(o * i for o, i in shape.layers.values()) + shape.weights["vocabulary"]
    size += shape.blocks * shape.experts * shape.hidden
    layers, left = [], size
    for block in range(shape.blocks):
        for name, (outputs, inputs) in shape.layers.items():
            pool = f"cuda:{block * cards // shape.blocks}"
            sums = 4 * collector.elements(targets[name])
            layers.append(LayerCost(f"{block}.{name}", pool, sums, outputs * inputs, left, block))
            left -= outputs * inputs
    in_block, largest, after, largest_after = saved_bytes(shape, tokens)
    copied = _INPUT_COPIES * 2 * tokens * max(i for name, (_, i) in shape.layers.items() if "[" not in name)
    copied *= any(collector.moment_shapes(target) for target in targets.values())
    pools = [f"cuda:{card}" for card in range(cards)]
    spread = {pool: sum(block * cards // shape.blocks == card for block in range(shape.blocks)) * in_block
              for card, pool in enumerate(pools)}  # fmt: skip
    spread[pools[-1]] += after
    transient = {pool: _TRANSIENT * (max(largest, largest_after) if pool == pools[-1] else largest) for pool in pools}
    one = max(in_block + _TRANSIENT * largest, after + _TRANSIENT * largest_after)
    of_block = {pool: (one if pool == pools[-1] else in_block + _TRANSIENT * largest) + copied for pool in pools}
    widths = [target.A.shape[1] for target in targets.values() if collector.moment_shapes(target)]
    fixed = _GPU_WORKSPACE + 4 * max((rows_of_a_gram_block(width) * width for width in widths), default=0)
    fixed += copies * max(layer.sum_bytes for layer in layers)
    fixed += 4 * max(layer.size for layer in layers) if packed else 0
    return Measured(
        layers=tuple(layers),
        size=size,
        activations={pool: spread[pool] + transient[pool] + copied for pool in pools},
        block_activations=of_block,
        block_input=2 * shape.hidden * SAMPLES * tokens,
        blocks=shape.blocks,
        samples=SAMPLES,
        tokens=SAMPLES * tokens,
        formed=shape.blocks * sum(map(collector.formed, targets.values())),
        arguments=(tokens * shape.head * 4 + tokens**2 + 8 * tokens) * SAMPLES,
        fixed=dict.fromkeys(pools, fixed),
    )


def model_bytes(shape: Shape, *, packed: bool) -> int:
    """Bytes of the weights: NF4 packs the linear layers of the blocks, and neither experts nor the vocabulary."""
    linear = NF4 if packed else 2
    of_block = shape.weights["linear"] * linear + shape.weights["experts"] * 2
    adapter = 4 * RANK * sum(outputs + inputs for outputs, inputs in shape.layers.values())
    return int(shape.blocks * (of_block + adapter) + 2 * 2 * shape.weights["vocabulary"])


def planned(shape: Shape, work: str, card: str) -> tuple[str, Plan | str]:
    """(the weights' type, the plan): in bfloat16 if that fits, else in NF4; else what a card would have to hold."""
    cards, gib, _, host = CARDS[card]
    needed = ""
    for packed in (False, True):
        measured = on_paper(shape, work, packed=packed, cards=cards)
        pools = list(measured.activations)
        taken = {**dict.fromkeys(pools, model_bytes(shape, packed=packed) // cards), HOST: IN_USE, DISK: 0}
        budget = {**dict.fromkeys(pools, int(SPARE * gib * GIB)), HOST: int(SPARE * host * GIB), DISK: 2**40}
        try:
            return "NF4" if packed else "bf16", make_plan(measured, taken, budget, BATCH)
        except ConfigError as refusal:
            needed = re.findall(r"max_memory of at least ([\d.]+ \w+)", str(refusal))[0]
    return "NF4", needed


def table(name: str) -> Iterator[str]:
    """The rows of one model, in Markdown."""
    shape = SHAPES[name]
    for work in WORK:
        cells = []
        for card, (_, _, rate, _) in CARDS.items():
            kind, plan = planned(shape, work, card)
            if isinstance(plan, str):
                cells.append(f"does not fit: {kind} takes {plan} a card")
                continue
            minutes = plan.cost * 2 * shape.active * SAMPLES * TOKENS / (SHARE * rate) / 60
            how = "by layer" if plan.mode == "layerwise" else f"{len(plan.groups)} sweep{'s' * (len(plan.groups) > 1)}"
            peak = max(size for pool, size in plan.peak.items() if pool not in (HOST, DISK))
            beside = {"host": plan.peak.get(HOST, 0) - IN_USE, "disk": plan.peak.get(DISK, 0)}
            more = "".join(f" + {show_size(size)} on the {place}" for place, size in beside.items() if size > 0)
            cells.append(f"{kind}, {how}: {show_size(peak)}{more}, {plan.cost:.1f}, {clock(minutes)}")
        yield f"| {work} | {' | '.join(cells)} |"


def clock(minutes: float) -> str:
    """A time for people."""
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


# The check


_MIXTURE = Shape(96, 40, 3, 4, 2, 32, 500, experts=8, chosen=3)
SMALL = {
    "dense": Shape(96, 200, 3, 4, 2, 32, 500),
    "mixture": _MIXTURE,
    "mixture, experts too": replace(_MIXTURE, tapped=True),
}


def small_model(name: str) -> tuple[Shape, PeftModel]:
    """A small model in bfloat16, with an adapter whose B is not zero, and its shape."""
    shape = SMALL[name]
    model = _mixture(shape) if shape.experts else LlamaForCausalLM(LlamaConfig(**_config(shape)))
    return shape, _adapted(model, shape)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
    }


def _mixture(shape: Shape) -> nn.Module:
    of_experts = {"num_experts": shape.experts, "num_experts_per_tok": shape.chosen}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_config(shape), **of_experts, moe_intermediate_size=shape.intermediate))


def _adapted(model: Any, shape: Shape) -> PeftModel:
    adapter = LoraConfig(
        r=RANK,
        target_modules=[f"{name}_proj" for name in shape.layers if "[" not in name],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if shape.tapped else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model.to(torch.bfloat16).eval(), adapter, adapter_name="forget")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return adapted  # type: ignore[return-value]


def compared(shape: Shape, model: Any, tokens: int = 64) -> Iterator[tuple[str, float, float]]:
    """(what, on paper, as the engine finds it) on a small model; on a CPU, where the same tensors are kept."""
    config = PerTAConfig()
    rows = [{"input_ids": torch.randint(3, shape.vocabulary, (tokens,))} for _ in range(4)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    samples = {
        name: load_samples(rows[start : start + 2], None, max_length=tokens, name=name)
        for name, start in {"forget": 0, "retain": 2}.items()
    }
    job = gradient_job(config, "mean", model, resolve_targets(model, "forget"), samples)
    found = measure(job)
    saved = _traced_forward(job, samples["forget"][0], find_blocks(model)).saved.by_block()
    of: Mapping[Any, int] = {block: sum(sum(sizes) for sizes in pools.values()) for block, pools in saved.items()}
    paper = on_paper(shape, "unlearn, factor (default)", packed=False, tokens=tokens)
    in_block, _, after, _ = saved_bytes(shape, tokens)
    yield "bytes kept of a block", in_block, of[1]
    yield "bytes kept after the blocks", after, of[None]
    yield "elements of the weights that run", paper.size, found.size
    yield "elements formed", paper.formed, found.formed
    yield "bytes of all sums", sum(x.sum_bytes for x in paper.layers), sum(x.sum_bytes for x in found.layers)
    yield "bytes of a block's inputs, per sample", paper.block_input / SAMPLES, found.block_input / found.samples
    yield "bytes of the other arguments, per sample", paper.arguments / SAMPLES, found.arguments / found.samples


MEASURED = {"unlearn, factor (default)": 1.38, "unlearn, delta": 1.20}  # docs/benchmarks.md, over plain LoRA's time


def costs() -> Iterator[tuple[str, float, float]]:
    """(what, predicted, measured) time of a sweep over that of a plain LoRA forward and backward pass, on the Llama of
    49M parameters of ``benchmarks.engine``."""
    for work, ratio in MEASURED.items():
        paper = on_paper(Shape(512, 1408, 14, 8, 8, 64, 4096), work, packed=False, tokens=128)
        yield f"{work}: time over plain LoRA's", (2 + paper.formed / paper.size) / 2, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with small models that run")
    options = parser.parse_args()
    quiet()
    if options.check:
        for name in SMALL:
            for what, paper, found in compared(*small_model(name)):
                print(f"| {name} | {what} | {paper:,.0f} | {found:,.0f} | {paper / found - 1:+.1%} |")
        for what, predicted, ratio in costs():
            print(f"| 49M | {what} | {predicted:.2f} | {ratio:.2f} | {predicted / ratio - 1:+.1%} |")
        return
    for name, shape in SHAPES.items():
        bf16, nf4 = (show_size(model_bytes(shape, packed=packed)) for packed in (False, True))
        print(f"\n## {name}: {bf16} in bf16, {nf4} in NF4\n")
        print(f"| | {' | '.join(CARDS)} |\n|---|{'---|' * len(CARDS)}")
        print("\n".join(table(name)))


if __name__ == "__main__":
    main()
