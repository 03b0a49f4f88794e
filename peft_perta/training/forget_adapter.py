"""Train a forget adapter: what must go, learned by a LoRA adapter on theta_0. Thin over TRL's SFTTrainer."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl import SFTConfig, SFTTrainer

from ..adapters import FORGET_RECORD_NAME, save_forget_adapter
from ..data import check_output, fingerprint, load_samples
from ..errors import AdapterError, ConfigError
from ..model import (
    base_name,
    check_lora_config,
    check_new_name,
    resolve_layers,
    resolve_targets,
    snapshot,
    switch_modules,
)


def default_settings() -> dict[str, Any]:
    """Training settings (fields of TRL's SFTConfig) that fit a few hundred rows."""
    on_gpu = torch.cuda.is_available()
    settings = {
        "num_train_epochs": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "bf16": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "use_cpu": not on_gpu,
    }
    return settings | {"gradient_checkpointing": True} if on_gpu else settings


def default_lora_config(rank: int = 16) -> LoraConfig:
    """Plain LoRA on every linear layer but the head, alpha = 2 * rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)


def train_forget_adapter(
    model: nn.Module,
    forget: Any,
    tokenizer: Any,
    output_dir: str | Path | None = None,
    *,
    lora_config: LoraConfig | None = None,
    adapter_name: str = "forget",
    max_length: int = 1024,
    show_progress_bar: bool = True,
    **training_settings: Any,
) -> PeftModel:
    """Train a LoRA adapter on the forget set alone, at theta_0 (every other adapter off), on the completions only.

    Args:
        model: a transformers model or a PeftModel, in float or 4 bit (QLoRA). It gains the adapter; its weights stay.
        forget: rows, a path to JSON lines, or a Dataset, as for ``get_perta_state_dict``.
        output_dir: where to write the adapter, flat; nothing is written without it.
        lora_config: by default ``default_lora_config()``.
        training_settings: any fields of TRL's ``SFTConfig`` (num_train_epochs, learning_rate, ...), over
            ``default_settings()``.

    Returns:
        The PeftModel with the adapter on it, active and frozen, in eval mode.

    Raises:
        AdapterError: the settings would give an adapter that could not be negated, found before training.
        DataError: the forget set is empty or malformed.
        NumericalError: training gave NaN or infinite factors.
    """
    lora_config = copy.copy(lora_config) if lora_config else default_lora_config()
    check_lora_config(lora_config, adapter_name)
    check_new_name(model, adapter_name)
    if output_dir is not None:
        check_output(output_dir, FORGET_RECORD_NAME)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError("the tokenizer has no eos token to end a completion with; set tokenizer.eos_token")
    samples = load_samples(forget, tokenizer, max_length=max_length, name="the forget set")
    dataset = Dataset.from_list([{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples])

    lora_config.base_model_name_or_path = base_name(model)
    put_back = snapshot(model)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        config = _training_config(scratch, max_length, show_progress_bar, training_settings)
        torch.manual_seed(config.seed)  # the initial A is drawn before the trainer sets the seed
        try:
            peft_model = with_new_adapter(model, lora_config, adapter_name)
            resolve_layers(peft_model, adapter_name)
            _train(peft_model, config, dataset, tokenizer)
            resolve_targets(peft_model, adapter_name)  # refuses what came out untrained or not finite
        except BaseException:
            remove_adapter(model, adapter_name)
            put_back()
            raise
    peft_model.eval()
    switch_modules(peft_model.modules(), [adapter_name])
    peft_model.requires_grad_(False)
    if output_dir is not None:
        record = {"samples": len(samples), "sha256": fingerprint(samples), "epochs": config.num_train_epochs}
        save_forget_adapter(output_dir, peft_model, adapter_name, record)
    return peft_model


def _training_config(
    scratch: str, max_length: int, show_progress_bar: bool, training_settings: dict[str, Any]
) -> SFTConfig:
    """Ours over the user's over the defaults: one sample a row, tokenised and labelled already."""
    ours = {
        "max_length": max_length,
        "disable_tqdm": not show_progress_bar,
        "packing": False,
        "padding_free": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    refused = sorted(set(training_settings) & set(ours))
    if refused:
        raise ConfigError(f"training settings: {refused[0]!r} is set by train_forget_adapter itself; leave it out")
    try:
        return SFTConfig(**{"output_dir": scratch, **default_settings(), **training_settings, **ours})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training settings: {error}; expected fields of trl.SFTConfig") from error


def with_new_adapter(model: nn.Module, lora_config: LoraConfig, adapter_name: str) -> PeftModel:
    """The model with one more adapter, which alone is on.

    Raises:
        AdapterError: the config names layers that are not there.
    """
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, lora_config, adapter_name=adapter_name)  # type: ignore[arg-type,return-value]
        model.add_adapter(adapter_name, lora_config)
    except ValueError as error:  # PEFT's own, for target modules that are not there
        raise AdapterError(f"no adapter can be made with this LoraConfig: {' '.join(str(error).split())}") from error
    model.set_adapter(adapter_name)
    return model


def _train(model: PeftModel, config: SFTConfig, dataset: Dataset, tokenizer: Any) -> None:
    put_back = snapshot(model)
    try:
        # A copy of the tokenizer: the trainer gives it a padding token.
        SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=copy.deepcopy(tokenizer)).train()
    finally:
        put_back()


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take the adapter off again, wherever its making stopped; layers that it alone adapted are as they were."""
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        model.delete_adapter(adapter_name)
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(model, PeftModel):
            module.delete_adapter(adapter_name)
        if not module._get_available_adapters() and not name.endswith(".base_layer"):  # one within another goes with it
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
