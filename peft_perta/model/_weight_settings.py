"""How and where transformers puts a model's weights: their type, quantisation and devices, or their shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers import __version__ as version
from transformers.distributed import DistributedConfig

from ..errors import ConfigError
from .distributed import count, local_rank

SHARDED = "fsdp"
"""The device map of a model that FSDP2 shards over the processes."""


def weight_settings(dtype: torch.dtype | None, device_map: str | None, quantisation: str | None) -> dict[str, Any]:
    """How and where transformers puts a model's weights."""
    on_gpu = torch.cuda.is_available()
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    if device_map == SHARDED:
        place: dict[str, Any] = {"distributed_config": {"fsdp_size": count()}}
    else:
        place = {"device_map": device_map or ({"": local_rank()} if on_gpu else None)}
    return {
        "dtype": dtype,
        **place,
        "quantization_config": _QUANTISATIONS[quantisation](dtype) if quantisation else None,
        # On a CPU, a small model trains twice as fast with "eager" as with "sdpa".
        "attn_implementation": None if on_gpu else "eager",
    }


def check_shardable(quantisation: str | None, gguf: Path | None) -> None:
    """Check that FSDP2 can shard a model while it is loaded.

    Raises:
        ConfigError: transformers is too old, there is one process, or the model is quantised or dequantised on loading.
    """
    if not hasattr(DistributedConfig, "fsdp_size"):
        raise ConfigError(
            f"device_map={SHARDED!r}: expected a transformers that shards on loading, found {version}; upgrade it"
        )
    if count() == 1:
        raise ConfigError(
            f"device_map={SHARDED!r}: expected several processes to shard the model over, found one; start them with "
            "accelerate launch"
        )
    if quantisation or gguf is not None:
        raise ConfigError(
            f"device_map={SHARDED!r}: expected safetensors in a floating-point type, found {quantisation or 'a GGUF'}; "
            "load it without a device map: each process then holds the whole model"
        )


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _int8(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


_QUANTISATIONS = {"NF4": _nf4, "int8": _int8}
