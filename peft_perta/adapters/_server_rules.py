"""What each server requires of an adapter's config and tensors, one row per requirement.

A rule is named after the servers that require it. Its check returns whether the adapter passes, and what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model import BASE_CHANGING_INITS, VARIANT_FIELDS
from .servable import DTYPES, SERVABLE_RANKS, torch_dtype

Config = dict[str, Any]  # the content of adapter_config.json

Tensors = dict[str, Tensor]

Verdict = tuple[bool, str]

SERVERS = ("vLLM", "llama.cpp", "TGI")

_VLLM_DEFAULT_RANK = 16


def _rank(config: Config) -> Verdict:
    rank = config.get("r")
    if rank not in SERVABLE_RANKS:
        return False, f"r = {rank}; expected one of {', '.join(map(str, SERVABLE_RANKS))}"
    if rank > _VLLM_DEFAULT_RANK:
        return True, f"r = {rank}; start vLLM with --max-lora-rank {rank}"
    return True, f"r = {rank}, within vLLM's default of {_VLLM_DEFAULT_RANK}"


def _patterns(config: Config) -> Verdict:
    patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern") if config.get(name)}
    return not patterns, f"{patterns or 'none'}"


def _bias(config: Config) -> Verdict:
    biased = config.get("bias", "none") != "none" or bool(config.get("lora_bias"))
    return not biased, f"bias = {config.get('bias')!r}, lora_bias = {config.get('lora_bias')}"


def _plain_lora(config: Config) -> Verdict:
    fields = [name for name in (*VARIANT_FIELDS, "modules_to_save", "trainable_token_indices") if config.get(name)]
    return config.get("peft_type") == "LORA" and not fields, ", ".join(fields) or str(config.get("peft_type"))


def _unchanged_base(config: Config) -> Verdict:
    init = config.get("init_lora_weights", True)
    changes = isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)
    return not changes, f"init_lora_weights = {init!r}"


def _named_modules(config: Config) -> Verdict:
    modules = config.get("target_modules")
    named = (isinstance(modules, list) and bool(modules)) or bool(config.get("target_parameters"))
    return named, f"{modules}"


CONFIG_RULES: tuple[tuple[str, Callable[[Config], Verdict]], ...] = (
    ("vLLM: rank", _rank),
    (
        "llama.cpp, TGI: lora_alpha == r",
        lambda config: (
            config.get("lora_alpha") == config.get("r"),
            f"lora_alpha = {config.get('lora_alpha')}, r = {config.get('r')}",
        ),
    ),
    ("all: no rsLoRA", lambda config: (not config.get("use_rslora"), f"use_rslora = {config.get('use_rslora')}")),
    ("llama.cpp, TGI: no patterns", _patterns),
    ("all: no bias", _bias),
    ("all: plain LoRA", _plain_lora),
    ("all: the base as it is", _unchanged_base),
    ("all: target_modules named", _named_modules),
)


def _keys(config: Config, tensors: Tensors) -> Verdict:
    foreign = next((key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    return foreign is None, foreign or f"{len(tensors)} tensors, all of them lora_A or lora_B"


def _finite(config: Config, tensors: Tensors) -> Verdict:
    infinite = next((key for key, value in tensors.items() if not bool(torch.isfinite(value.float()).all())), None)
    return infinite is None, infinite or "every value"


def _one_dtype(config: Config, tensors: Tensors) -> Verdict:
    dtypes = {value.dtype for value in tensors.values()}
    return len(dtypes) == 1 and dtypes <= {torch_dtype(name) for name in DTYPES}, ", ".join(map(str, dtypes))


def _pairs(config: Config, tensors: Tensors) -> Verdict:
    unpaired = next((key for key in tensors if _partner(key) not in tensors), None)
    return unpaired is None, unpaired or "A and B of every layer"


def _partner(key: str) -> str:
    return key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")


def _factor_ranks(config: Config, tensors: Tensors) -> Verdict:
    rank, has_experts = config.get("r"), bool(config.get("target_parameters"))
    for key, value in tensors.items():
        factor_rank = value.shape[0] if ".lora_A." in key else value.shape[-1]
        packed = has_experts and rank and factor_rank % rank == 0  # the factors of all experts in one tensor
        if factor_rank != rank and not packed:
            return False, key
    return True, f"{rank} everywhere"


TENSOR_RULES: tuple[tuple[str, Callable[[Config, Tensors], Verdict]], ...] = (
    ("vLLM: keys", _keys),
    ("all: finite", _finite),
    ("all: one type", _one_dtype),
    ("all: factors in pairs", _pairs),
    ("all: rank of the factors", _factor_ranks),
)


def packed_experts(config: Config, tensors: Tensors) -> str | None:
    """The first key whose tensor holds the factors of all experts, as PEFT packs those of expert parameters.

    No rule above tells whether a server reads it: vLLM does for some models alone, and for others ignores it or stops
    (vllm-project/vllm, pull requests 41384, 47088, 52198); llama.cpp and TGI know no such key.
    """
    has_parameters, rank = bool(config.get("target_parameters")), config.get("r")
    for key, value in tensors.items():
        factor_rank = value.shape[0] if ".lora_A." in key else value.shape[-1]
        if ".base_layer." in key or (has_parameters and factor_rank != rank):
            return key
    return None
