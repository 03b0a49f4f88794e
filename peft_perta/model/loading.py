"""Names and paths -> a model with its adapters on it. Files are checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import AdapterError, ConfigError
from .adapter_files import check_adapter_files
from .distributed import local_rank


def load_base(
    name: str,
    *,
    four_bit: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer, from a hub name or a directory.

    Args:
        four_bit: quantise linear layers to NF4, double-quantised (QLoRA, arXiv 2305.14314).
        dtype: of the weights, or of the computation in 4 bit; by default bfloat16 on a GPU and float32 elsewhere.
        device_map: 'auto' spreads the layers over all GPUs, and what does not fit over the host; by default the whole
            model is on one GPU, or on the host where there is none.

    Raises:
        ConfigError: the model cannot be found or read.
    """
    on_gpu = torch.cuda.is_available()
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            device_map=device_map or ({"": local_rank()} if on_gpu else None),
            quantization_config=quantization if four_bit else None,
            attn_implementation=None if on_gpu else "eager",  # trains a small model twice as fast as sdpa on a CPU
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the model {name!r} cannot be loaded: {reason} Expected a directory with config.json, "
            "model.safetensors and a tokenizer, or the name of a hub model"
        ) from error
    return model, tokenizer


def load_skeleton(name: str, *, revision: str | None = None) -> PreTrainedModel:
    """The model's modules without its weights, from its config alone: on the meta device, at no cost of memory.

    Raises:
        ConfigError: the config cannot be found or read.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the model {name!r} cannot be found: {reason} Expected a directory with config.json, or the name of a hub "
            "model"
        ) from error
    model.config._name_or_path = name
    return model


def attach_adapters(model: PreTrainedModel | PeftModel, adapters: Mapping[str, str | Path]) -> PeftModel:
    """The model with the adapters (name -> directory) on it, frozen; the first is active.

    Raises:
        AdapterError: a directory holds no adapter, a damaged or pickled one, or one that does not fit the model.
    """
    for directory in adapters.values():
        check_adapter_files(directory)
    attached: Any = model
    # On a model without all its weights at hand (offloaded, a skeleton) PEFT leaves the first adapter without its own.
    scratch = None
    if not isinstance(model, PeftModel) and any(parameter.is_meta for parameter in model.parameters()):
        scratch = "perta_scratch"
    for name, directory in adapters.items():
        try:
            if not isinstance(attached, PeftModel):
                attached = PeftModel.from_pretrained(
                    model, str(directory), adapter_name=scratch or name, low_cpu_mem_usage=scratch is not None
                )
            # For the first one again: from_pretrained keeps to itself what it could not place, and goes on.
            result = attached.load_adapter(str(directory), adapter_name=name)
            missing = [key for key in result.missing_keys if f".{name}." in key]
            if missing or result.unexpected_keys:
                raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise AdapterError(
                f"the adapter in {directory} does not fit the model: {reason}; load the base that it was trained on"
            ) from error
    if scratch is not None and scratch in attached.peft_config:
        attached.set_adapter(next(iter(adapters)))
        attached.delete_adapter(scratch)
    return attached


def quiet() -> None:
    """Leave the terminal to this package's own progress bars and lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
