"""Loading a base model and its adapters. Adapter files are checked before anything is loaded."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..data import note
from ..errors import AdapterError, ConfigError
from ._weight_settings import SHARDED, check_shardable, weight_settings
from .adapter_files import check_adapter_files, check_patterns, find_adapter
from .gguf_files import check_whole, find_gguf, source_of, write_dequantised
from .identity import adopt_base
from .model_state import snapshot
from .stack import EXPECTED_DECODER, base_model, check_new_name, give_memory, remove_adapter

_MOST_LAYERS = 2000  # each is built before a weight is read; the deepest model has about 200
_SCRATCH = "perta_scratch"  # an adapter


def load_base(
    name: str,
    *,
    four_bit: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    gguf_file: str | None = None,
    safetensors_only: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer; of a model for images and text, all of it.

    Args:
        name: a hub name; a directory with config.json, safetensors weights and a tokenizer; or a GGUF file, or a
            directory with one, which transformers dequantises.
        four_bit: quantise the linear layers to NF4 with double quantisation.
        dtype: the type of the weights, or of the computation in 4-bit. None: bfloat16 on a GPU, float32 on a CPU.
        revision: the branch, tag or commit of a hub model; None for its default branch.
        device_map: 'auto' spreads the layers over all GPUs, and over the host what does not fit there. 'fsdp' shards
            every weight over the processes of ``accelerate launch``, by FSDP2; each reads its own shard. None puts the
            whole model on one GPU, or on the host if there is no GPU.
        gguf_file: the name of the GGUF file, where the directory ``name`` holds several.
        safetensors_only: refuse weights in a pickle (pytorch_model.bin). False: transformers reads them, by torch's
            loader for weights alone.

    Returns:
        The model and its tokenizer.

    Raises:
        ConfigError: the model cannot be found or read, is no causal language model, or lacks a weight in its files; or
            it is to be sharded over one process, or while it is quantised.

    Reference:
        QLoRA (arXiv 2305.14314), for NF4 and double quantisation.
    """
    return load_quantised(
        name, "NF4" if four_bit else None, dtype=dtype, revision=revision, device_map=device_map, gguf_file=gguf_file,
        safetensors_only=safetensors_only,
    )  # fmt: skip


def load_quantised(
    name: str,
    quantisation: Literal["NF4", "int8"] | None,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    gguf_file: str | None = None,
    safetensors_only: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """``load_base`` with the linear layers rounded to NF4 or int8 by bitsandbytes; None leaves them as they are.

    Reference:
        LLM.int8 (arXiv 2208.07339), for int8.
    """
    gguf = find_gguf(name, gguf_file)
    config = _read_config(name, revision, gguf)
    model_class = _checked_class(name, config)
    if device_map == SHARDED:
        check_shardable(quantisation, gguf)
    if gguf is not None:
        note(f"{gguf} is dequantised")
        if quantisation:
            return _load_quantised_gguf(gguf, quantisation, dtype, device_map)
    source, more = source_of(name, gguf)
    settings = weight_settings(dtype, device_map, quantisation)
    if safetensors_only and gguf is None:
        settings["use_safetensors"] = True
    with _reported(name):
        model, found = model_class.from_pretrained(
            source, config=config, **more, revision=revision, output_loading_info=True, **settings
        )
        tokenizer = _tokenizer(name, revision, gguf)
    _check_complete(name, model, found)
    if gguf is not None:
        _forget_gguf(model, gguf)
    return model, tokenizer


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """Load the tokenizer of a base model alone. The arguments and errors are those of ``load_base``."""
    gguf = find_gguf(name)
    _read_config(name, revision, gguf)
    with _reported(name):
        return _tokenizer(name, revision, gguf)


def _tokenizer(name: str, revision: str | None, gguf: Path | None) -> Any:
    source, more = source_of(name, gguf)
    tokenizer = AutoTokenizer.from_pretrained(source, **more, revision=revision)
    tokenizer("a")  # what is wrong in its files may show only here
    return tokenizer


def _check_complete(name: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Check that the files hold the model's weights: transformers draws those that are missing at random.

    Raises:
        ConfigError: a weight is missing or of another shape, or the files hold more blocks than the config asks for.
    """

    def block_of(key: str) -> str:
        return re.sub(r"\d+", "#", key)

    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    missing, mismatched, unexpected = (sorted(map(str, found.get(kind) or ())) for kind in kinds)
    expected = "expected files that were saved with this config.json; copy or download the model again"
    if missing or mismatched:
        fault = f"lacks {missing[0]}" if missing else f"holds {mismatched[0]} in another shape"
        raise ConfigError(f"the model {name!r} {fault} (of {len(missing) + len(mismatched)} such weights); {expected}")
    blocks = {block_of(key) for key, _ in model.named_parameters()}
    further = [key for key in unexpected if block_of(key) in blocks]
    if further:
        raise ConfigError(f"the model {name!r} holds {further[0]}, beyond the blocks that its config names; {expected}")
    if unexpected:
        note(f"{name} holds {len(unexpected)} weights that the model does not use, such as {unexpected[0]}")


def _load_quantised_gguf(
    gguf: Path, quantisation: Any, dtype: torch.dtype | None, device_map: str | None
) -> tuple[PreTrainedModel, Any]:
    """By way of a temporary directory: transformers does not quantise while it reads a GGUF."""
    with tempfile.TemporaryDirectory() as directory:
        write_dequantised(*load_base(str(gguf), dtype=dtype, device_map="cpu"), directory)
        gc.collect()  # the dequantised model: two are not to be in memory
        model, tokenizer = load_quantised(directory, quantisation, dtype=dtype, device_map=device_map)
    model.config._name_or_path = str(gguf)
    return model, tokenizer


def _forget_gguf(model: Any, gguf: Path) -> None:
    """The weights are dequantised: the model must not say that they are not. Its name is the file's."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.config._name_or_path = str(gguf)


def load_skeleton(name: str, *, revision: str | None = None) -> PreTrainedModel:
    """Build a model on the meta device from its config: all modules, no weights, no memory.

    Args:
        name: a hub name, a directory with config.json, or a GGUF file or a directory with one.
        revision: the branch, tag or commit of a hub model; None for its default branch.

    Raises:
        ConfigError: the config cannot be found or read, or is of no causal language model.
    """
    gguf = find_gguf(name)
    config = _read_config(name, revision, gguf)
    model_class = _checked_class(name, config)
    with _reported(name), torch.device("meta"):
        model = model_class.from_config(config)
    model.config._name_or_path = str(gguf or name)
    return model


def _read_config(name: str, revision: str | None, gguf: Path | None) -> Any:
    if gguf is not None:
        check_whole(gguf)
    special = [path for path in Path(name).glob("*") if path.exists() and not (path.is_file() or path.is_dir())]
    if special:  # a pipe would be waited for, and a device read without end
        raise ConfigError(f"{special[0]} is no regular file; expected those of a model alone")
    source, more = source_of(name, gguf)
    with _reported(name):
        config = AutoConfig.from_pretrained(source, **more, revision=revision)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > _MOST_LAYERS:
        raise ConfigError(f"the model {name!r} has num_hidden_layers = {layers}, expected at most {_MOST_LAYERS}")
    return config


def _checked_class(name: str, config: Any) -> Any:
    found = auto_class(config)
    if found is not None:
        return found
    kind = "an encoder-decoder model" if config.is_encoder_decoder else "no causal language model"
    built = ", ".join(config.architectures or [type(config).__name__])
    raise ConfigError(f"the model {name!r} is {kind} ({built}); {EXPECTED_DECODER}")


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with this config; None if it is no decoder of text, or of images and
    text."""
    if not config.is_encoder_decoder:  # of an encoder-decoder model, transformers would load the decoder
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText
    return None


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turn what a model's files raise into ours: transformers and tokenizers check none, so it may be anything."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the model {name!r} cannot be loaded: {reason} Expected a directory with config.json, model.safetensors "
            "(a pickle only with safetensors_only=False, --no-safetensors-only) and a tokenizer, a GGUF file of an "
            "architecture that transformers reads, or the name of a hub model"
        ) from error


def attach_adapters(model: PreTrainedModel | PeftModel, adapters: Mapping[str, str | Path]) -> PeftModel:
    """Load adapters onto a model. They are frozen, and the first one is active.

    Args:
        model: a transformers model, or a ``PeftModel`` to which the adapters are added.
        adapters: adapter name -> its directory, or its name on the Hugging Face Hub.

    Returns:
        The model with its adapters.

    Raises:
        AdapterError: a directory holds no plain LoRA adapter, a damaged or pickled one, or one that does not fit the
            model; or a name cannot be that of an adapter. The model is then as it was.
    """
    for name, directory in adapters.items():
        check_new_name(model, name)
        check_adapter_files(directory)
        check_patterns(directory, [name for name, _ in base_model(model).named_modules()])
    restore = snapshot(model)
    try:
        with torch.random.fork_rng():  # PEFT draws factors before it reads them
            return _attached(model, adapters)
    except BaseException:
        for name in (*adapters, _SCRATCH):
            remove_adapter(model, name)
        restore()
        raise


def _attached(model: PreTrainedModel | PeftModel, adapters: Mapping[str, str | Path]) -> PeftModel:
    attached: Any = model
    # If some of the model's weights are on the meta device (offloaded, a skeleton), PEFT does not load the weights of
    # the first adapter. A scratch adapter goes first, and is deleted.
    scratch = None
    if not isinstance(model, PeftModel) and any(parameter.is_meta for parameter in model.parameters()):
        scratch = _SCRATCH
    for name, directory in adapters.items():
        path = str(find_adapter(directory))
        try:
            if not isinstance(attached, PeftModel):
                attached = PeftModel.from_pretrained(
                    model, path, adapter_name=scratch or name, low_cpu_mem_usage=scratch is not None
                )
            if name not in attached.peft_config:
                config: Any = LoraConfig.from_pretrained(path)
                config.inference_mode = True
                attached.add_adapter(name, config)
                give_memory(attached, name)
            # The first adapter is loaded a second time: from_pretrained does not report the keys it could not place.
            result = attached.load_adapter(path, adapter_name=name)
            missing = [key for key in result.missing_keys if f".{name}." in key]
            if missing or result.unexpected_keys:
                raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
            adopt_base(attached, name, path)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise AdapterError(
                f"the adapter in {directory} does not fit the model: {reason}; load the base that it was trained on"
            ) from error
    if scratch is not None and scratch in attached.peft_config:
        attached.set_adapter(next(iter(adapters)), inference_mode=True)
        attached.delete_adapter(scratch)
    return attached


def quiet() -> None:
    """Silence the progress bars and warnings of transformers, TRL, PEFT and bitsandbytes."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 in float32 would warn at each layer
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
