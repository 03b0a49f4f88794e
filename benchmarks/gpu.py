"""The cost of real model sizes on a GPU: random weights of the real shapes, double-quantised NF4, bfloat16 compute.

    python -m benchmarks.gpu --shape 8b --granularity delta --max-memory 10GiB [--profile] [--json FILE]
    python -m benchmarks.gpu --shape 8b --granularity factor --max-memory 8GiB
    python -m benchmarks.gpu --shape 70b --granularity delta --max-memory 48GiB --samples 40
    python -m benchmarks.gpu --shape tiny        # the same code at a tiny size; also runs on a CPU

It prints a Markdown table: peak memory, wall time, and wall time over a lower bound. The lower bound is 6 operations
per weight and token, at the card's matmul rate, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peft_perta import PerTAConfig, get_perta_state_dict
from peft_perta.model import quiet, show_size

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {  # Llama-3.1-70B
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
# Kind of work -> parts of the names of the profiler's kernels.
KINDS = {
    "dequantisation": ("dequantize",),
    "copies": ("memcpy", "aten::copy_", "memset"),
    "factorisation": ("svd", "qr", "geqrf", "orgqr", "gesvd", "householder"),
    "matmul": ("gemm", "cutlass", "nvjet", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
}


def random_llama(shape: str, device: torch.device) -> PeftModel:
    """A Llama of that shape with random NF4 weights and a random forget adapter.

    The whole model never exists in a wider dtype.
    """
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, rope_theta=500_000.0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02)

    for name, module in list(model.named_modules()):
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and child in PROJECTIONS:
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            weight = bnb.nn.Params4bit(
                drawn(module.out_features, module.in_features),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                module=packed,
            )
            packed.weight = weight.to(device)  # this packs the weight
            setattr(parent, child, packed)
        elif isinstance(module, LlamaRotaryEmbedding):
            setattr(parent, child, LlamaRotaryEmbedding(config).to(device))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(drawn(*module.weight.shape), requires_grad=False)
        elif "weight" in module._parameters:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010 - as from_pretrained does
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.eval(), adapter, adapter_name="forget")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return adapted  # type: ignore[return-value]


def rows(seed: int, samples: int, tokens: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(3, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in drawn]


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large bfloat16 product, best of ten."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rate = matmul_rate(device)
    model = random_llama(options.shape, device)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    sets = [rows(seed, options.samples, options.tokens, vocabulary) for seed in (0, 1)]
    weights = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, (bnb.nn.Linear4bit, nn.Linear)) and not hasattr(module, "base_layer")
    )
    config = PerTAConfig(
        granularity=options.granularity,
        weighting=options.weighting,
        input_directions=options.input_directions,
        batch_size=options.batch_size,
        max_memory=options.max_memory,
        host_memory=options.host_memory,
    )
    model_bytes = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        model_bytes = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    if options.profile:
        activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as profiled:
            provenance = get_perta_state_dict(model, config, *sets)[2]
            _wait(device)
        shares = where_time_goes(profiled, device)
    else:
        provenance = get_perta_state_dict(model, config, *sets)[2]
        _wait(device)
        shares = {}
    seconds = time.perf_counter() - start
    lower_bound = 6 * weights * 2 * options.samples * options.tokens / rate
    return {
        "shape": options.shape,
        "granularity": options.granularity,
        "weighting": options.weighting,
        "samples": f"{options.samples} + {options.samples} of {options.tokens} tokens",
        "model": model_bytes,
        "peak_allocated": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "seconds": seconds,
        "stages": provenance.seconds,
        "tera_operations": rate / 1e12,
        "over_floor": seconds / lower_bound,
        "profile": shares,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "bitsandbytes": bnb.__version__},
    }


def where_time_goes(profiled: profile, device: torch.device) -> dict[str, float]:
    """Share of the device's own time that each kind of work takes."""
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "other")
        spent[kind] += own
    total = sum(spent.values()) or 1.0
    return {kind: round(own / total, 4) for kind, own in spent.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--granularity", choices=["delta", "factor", "separable"], default="delta")
    parser.add_argument("--weighting", default="grad")
    parser.add_argument(
        "--input-directions", action="store_true", help="also weight input directions, as the default edit does"
    )
    parser.add_argument("--samples", type=int, default=400, help="samples of each set (default: 400)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each sample (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-memory", help="memory budget of the GPU, e.g. 10GiB")
    parser.add_argument("--host-memory", help="memory budget of the host, e.g. 32GiB")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; slows the run down")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    quiet()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    measured = measure(options, device)
    print(
        "| shape | granularity | samples | model | peak allocated | peak reserved | seconds | over the lower bound |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    sizes = [
        show_size(measured[k]) if measured[k] is not None else "-" for k in ("model", "peak_allocated", "peak_reserved")
    ]
    print(
        f"| {measured['shape']} | {measured['granularity']} | {measured['samples']} | {' | '.join(sizes)} | "
        f"{measured['seconds']:.1f} | {measured['over_floor']:.2f} |"
    )
    print(f"\n{measured['device']}, {measured['tera_operations']:.3g} TFLOP/s in bfloat16, {measured['versions']}")
    print(f"stages: {measured['stages']}")
    if measured["profile"]:
        print("where the time goes: " + ", ".join(f"{kind} {share:.1%}" for kind, share in measured["profile"].items()))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
