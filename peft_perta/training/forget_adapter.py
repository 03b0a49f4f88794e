"""Train a forget adapter: a LoRA adapter on the origin model learns the forget set, by TRL's SFTTrainer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from trl import SFTConfig, SFTTrainer

from ..adapters import FORGET_RECORD_NAME, describe_base, save_forget_adapter
from ..data import Sample, check_output, fingerprint, load_samples
from ..errors import ConfigError
from ..model import (
    base_model,
    check_lora_config,
    check_new_name,
    distributed,
    remove_adapter,
    resolve_layers,
    resolve_targets,
    row_length,
    snapshot,
    switch_modules,
)
from ._training_arguments import check_warmup, training_arguments
from .new_adapter import default_lora_config, with_new_adapter
from .reports import take_reporters

_ROUTER_LOSS = "router_aux_loss_coef"  # TRL fails on it for mixtures whose config does not call the experts num_experts


def train_forget_adapter(
    model: nn.Module,
    forget: Any,
    tokenizer: Any,
    output_dir: str | Path | None = None,
    *,
    lora_config: LoraConfig | None = None,
    adapter_name: str = "forget",
    max_length: int | None = None,
    show_progress_bar: bool = True,
    **training_settings: Any,
) -> PeftModel:
    """Train a LoRA adapter on the completions of the forget set, on the origin model (every other adapter is off).

    Args:
        model: a transformers model or a PeftModel, in float or 4 bit (QLoRA). It gains the adapter; its own weights
            and its other adapters stay as they are.
        forget: the forget set: rows, a name that ``read_rows`` takes, or a ``datasets.Dataset``.
        tokenizer: the model's tokenizer; it needs an eos token.
        output_dir: the directory to write the adapter to; by default nothing is written.
        lora_config: plain LoRA; ``default_lora_config()`` by default.
        adapter_name: name of the new adapter on the model.
        max_length: the most tokens of a sample: a longer text becomes several samples, other rows are cut. By default
            1024, or the model's number of positions if that is less.
        show_progress_bar: show progress bars.
        training_settings: fields of TRL's ``SFTConfig``. By default 10 epochs, 8 rows per batch, learning rate 1e-3.
            ``report_to`` sends what is logged to trackio, wandb, ...; tensorboard's files go to ``OUTPUT_DIR.runs``.

    Returns:
        The PeftModel with the adapter on it, the only one that is on, frozen and in eval mode.

    Raises:
        AdapterError, UnsupportedLayerError: the adapter could not be negated. Checked before training.
        ConfigError: a training setting is invalid, the model is sharded, or the tokenizer has no eos token.
        DataError: the forget set is empty or malformed.
        NumericalError: after training, a factor is NaN or infinite.
        OutputError: ``output_dir`` cannot be written, or holds other files.
    """
    lora_config = _checked_config(model, lora_config, adapter_name)
    if output_dir is not None:
        check_output(output_dir, FORGET_RECORD_NAME)
    max_length = row_length(model, max_length)
    samples = _load(forget, tokenizer, max_length)
    restore = snapshot(model)
    try:
        with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
            config = _sft_config(scratch, max_length, show_progress_bar, training_settings)
            check_warmup(config, len(samples))
            reporters = take_reporters(config, output_dir)
            torch.manual_seed(config.seed)  # the initial A is drawn before the trainer sets the seed
            trained = partial(_train, config=config, samples=samples, tokenizer=tokenizer, callbacks=reporters)
            peft_model = _add_trained(model, lora_config, adapter_name, trained)
        if output_dir is not None:
            record = _record(peft_model, samples, config)
            save_forget_adapter(output_dir, peft_model, adapter_name, record)
    except BaseException:
        remove_adapter(model, adapter_name)
        restore()
        raise
    return peft_model


def _checked_config(model: nn.Module, lora_config: LoraConfig | None, adapter_name: str) -> LoraConfig:
    """A copy of the user's config, or the default one."""
    distributed.refuse_sharded(model)
    config = copy.copy(lora_config) if lora_config else default_lora_config()
    check_lora_config(config, adapter_name)
    check_new_name(model, adapter_name)
    config.base_model_name_or_path = None  # with_new_adapter names it
    return config


def _load(forget: Any, tokenizer: Any, max_length: int) -> list[Sample]:
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            "the tokenizer has no eos token to end a completion with; set tokenizer.eos_token, or eos_token in its file"
        )
    return load_samples(forget, tokenizer, max_length=max_length, name="the forget set")


def _sft_config(scratch: str, max_length: int, show_progress_bar: bool, training_settings: dict[str, Any]) -> SFTConfig:
    """The trainer's config: one sample per row, which we have tokenised and labelled already."""
    defaults: dict[str, Any] = {"num_train_epochs": 10, "learning_rate": 1e-3}
    if _ROUTER_LOSS in SFTConfig.__dataclass_fields__:  # a mixture's router learns nothing but the completions
        defaults[_ROUTER_LOSS] = 0.0
    fixed = {
        "output_dir": scratch,
        "max_length": max_length,
        "disable_tqdm": not show_progress_bar,
        "packing": False,
        "padding_free": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return training_arguments(SFTConfig, "train_forget_adapter", defaults, training_settings, fixed)


def _add_trained(
    model: nn.Module, lora_config: LoraConfig, adapter_name: str, train: Callable[[PeftModel], None]
) -> PeftModel:
    """The model with the trained adapter on it, frozen."""
    peft_model = with_new_adapter(model, lora_config, adapter_name)
    resolve_layers(peft_model, adapter_name)
    train(peft_model)
    resolve_targets(peft_model, adapter_name)  # refuses untrained and non-finite factors
    peft_model.eval()
    switch_modules(peft_model.modules(), [adapter_name])
    peft_model.requires_grad_(False)
    return peft_model


def _record(model: PeftModel, samples: list[Sample], config: SFTConfig) -> dict[str, Any]:
    return {
        "samples": len(samples),
        "sha256": fingerprint(samples),
        "epochs": config.num_train_epochs,
        "base_model": describe_base(model),
    }


def _train(model: PeftModel, config: SFTConfig, samples: list[Sample], tokenizer: Any, callbacks: list[Any]) -> None:
    """Train the active adapter. Everything else that the trainer changes on the model is restored."""
    dataset = Dataset.from_list([{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples])
    restore = snapshot(model)
    try:
        _name_decoder(base_model(model))
        # The trainer gives the tokenizer a padding token: hand it a copy.
        own = {"processing_class": copy.deepcopy(tokenizer), "callbacks": callbacks}
        SFTTrainer(model=model, args=config, train_dataset=dataset, **own).train()
    finally:
        restore()


def _name_decoder(base: Any) -> None:
    """Let the model find its decoder, whose output TRL reads: the class of Llama-4's text model names another one."""
    if base.base_model is base and hasattr(base, "model"):
        base.base_model_prefix = "model"
