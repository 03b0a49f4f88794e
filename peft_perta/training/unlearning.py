"""Train an adapter that forgets one set and keeps another, and emit it as plain LoRA."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from ..adapters import (
    DTYPES,
    PROVENANCE_NAME,
    EmittedAdapter,
    Factors,
    TrainedProvenance,
    build_adapter,
    describe_base,
    save_perta_adapter,
    servable_rank,
    torch_dtype,
    versions,
)
from ..data import check_output, fingerprint, load_samples
from ..errors import AdapterError, ConfigError
from ..gradients import Checkpoint
from ..model import (
    Target,
    base_model,
    base_name,
    check_base,
    check_lora_config,
    check_new_name,
    distributed,
    hash_model,
    hash_targets,
    require_adapter,
    resolve_layers,
    snapshot,
    switch_modules,
)
from .forget_adapter import default_lora_config, remove_adapter, with_new_adapter
from .forget_adapter import default_settings as forget_settings
from .settings import UnlearningSettings
from .trainer import UnlearningTrainer

_NAME = "perta_training"  # of the adapter while it is trained


_STATE_NAME = "trainer_state.json"  # what a Trainer writes last into a checkpoint


def default_settings() -> dict[str, Any]:
    """Training settings (fields of transformers' TrainingArguments) that fit a few hundred rows."""
    return {**forget_settings(), "num_train_epochs": 5, "learning_rate": 5e-4}


def train_unlearning(
    model: nn.Module,
    forget: Any,
    retain: Any,
    tokenizer: Any,
    settings: UnlearningSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    task_adapter: str | None = None,
    start_adapter: str | None = None,
    lora_config: LoraConfig | None = None,
    dtype: str = "float32",
    max_length: int = 1024,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    show_progress_bar: bool = True,
    **training_settings: Any,
) -> EmittedAdapter:
    """Train a LoRA adapter on the full model by ``UnlearningTrainer``; the model goes back as it came, without it.

    Args:
        model: a transformers model or a PeftModel, in float or 4 bit.
        forget: what must go: rows, a path to JSON lines, or a Dataset.
        retain: what must stay, likewise; no row may be in both.
        settings: losses and combiner.
        output_dir: where to write the adapter, as ``save_perta_adapter`` does.
        task_adapter: name of the adapter that makes the full model of the base, where one does: on and frozen, and a
            part of the reference model.
        start_adapter: name of an adapter on the model that the new one begins as, such as PerTA's negative one; by
            default it begins at zero.
        lora_config: of an adapter that begins at zero; by default ``default_lora_config()``.
        dtype: of the emitted factors.
        checkpoint_dir: where a run that is cut off leaves what it has, by default after each epoch; the same call again
            goes on from there. It stays there when the run is done; delete it then.
        callbacks: of transformers, as a Trainer takes them.
        training_settings: any fields of ``TrainingArguments`` (num_train_epochs, learning_rate, ...), over
            ``default_settings()``.

    Returns:
        Config and state dict, for ``add_adapter`` or ``save_perta_adapter``, and what was done.

    Raises:
        AdapterError, UnsupportedLayerError: no plain adapter would come of it, found before training.
        ConfigError: a setting is bad, or the model is sharded.
        DataError: a set is empty or malformed, or a row is in both.
        NumericalError: a loss, a gradient or a factor is not finite.
        OutputError: a directory is not ours to write, or ``checkpoint_dir`` is another run's.
    """
    settings = settings or UnlearningSettings()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {list(DTYPES)}, found {dtype!r}")
    distributed.refuse_sharded(model)
    check_new_name(model, _NAME)
    if output_dir is not None:
        check_output(output_dir, PROVENANCE_NAME)
    _check_adapters(model, task_adapter, start_adapter, lora_config)
    config = _config(model, start_adapter, lora_config)
    servable_rank(_largest_rank(config))
    samples = {
        name: load_samples(data, tokenizer, max_length=max_length, name=f"the {name} set")
        for name, data in (("forget", forget), ("retain", retain))
    }
    start = resolve_layers(model, start_adapter) if start_adapter else []
    run = {
        "settings": settings.to_dict(),
        "data": {name: fingerprint(found) for name, found in samples.items()},
        "training": {name: str(value) for name, value in training_settings.items()},
        "adapter": {name: str(value) for name, value in sorted(_plain(config).items())},
    }
    began = time.perf_counter()
    put_back = snapshot(model)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        arguments = _arguments(checkpoint_dir or scratch, checkpoint_dir, show_progress_bar, training_settings)
        if checkpoint_dir is not None:
            with distributed.failing_together():
                run["global batch"] = _global_batch(arguments)
                Checkpoint(checkpoint_dir, _identified(run, model, start, task_adapter), writes=distributed.is_main())
        torch.manual_seed(arguments.seed)  # the initial A is drawn before the trainer sets the seed
        try:
            peft_model = with_new_adapter(model, config, _NAME)
            resolve_layers(peft_model, _NAME)
            if start_adapter:
                _begin_as(peft_model, start_adapter)
            _turn_on(peft_model, task_adapter)
            trainer = UnlearningTrainer(
                peft_model,
                arguments,
                forget,
                retain,
                processing_class=tokenizer,
                settings=settings,
                max_length=max_length,
                callbacks=list(callbacks),
            )
            if not show_progress_bar:
                trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=_latest(checkpoint_dir))
            trained = resolve_layers(peft_model, _NAME)
            rank = servable_rank(max(target.rank for target in trained))
            emitted = build_adapter(peft_model, _factors(trained), rank, torch_dtype(dtype))
        finally:
            remove_adapter(model, _NAME)
            put_back()
    provenance = TrainedProvenance(
        settings=settings.to_dict(),
        training=_described(trainer),
        base_model=describe_base(model),
        start_adapter={"name": start_adapter, "sha256": hash_targets(start)} if start_adapter else None,
        task_adapter=task_adapter,
        data={name: {"samples": len(found), "sha256": fingerprint(found)} for name, found in samples.items()},
        figures=_last_figures(trainer),
        rank=rank,
        dtype=dtype,
        versions=versions(),
        seconds={"training": round(time.perf_counter() - began, 3)},
    )
    if output_dir is not None and distributed.is_main():
        save_perta_adapter(output_dir, *emitted, provenance)
    return EmittedAdapter(*emitted, provenance)


def _check_adapters(
    model: nn.Module, task_adapter: str | None, start_adapter: str | None, lora_config: LoraConfig | None
) -> None:
    for name in filter(None, (task_adapter, start_adapter)):
        require_adapter(model, name)
        check_base(model, name)
    if task_adapter is not None and task_adapter == start_adapter:
        raise AdapterError(f"the task adapter and the start adapter are both {task_adapter!r}; expected two names")
    if start_adapter is not None and lora_config is not None:
        raise ConfigError(f"lora_config: expected none, since the adapter begins as {start_adapter!r}; leave one out")


def _config(model: nn.Module, start_adapter: str | None, lora_config: LoraConfig | None) -> LoraConfig:
    """Of the adapter that is trained: the start adapter's own, or a new one's."""
    config = copy.copy(require_adapter(model, start_adapter) if start_adapter else lora_config or default_lora_config())
    check_lora_config(config, start_adapter or "the new one")
    config.inference_mode = False
    config.base_model_name_or_path = base_name(model)
    return config


def _plain(config: LoraConfig) -> dict[str, Any]:
    """Its fields, with sets in an order that is every run's."""
    values = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _largest_rank(config: LoraConfig) -> int:
    return max([config.r, *(config.rank_pattern or {}).values()])


def _identified(
    run: Mapping[str, Any], model: nn.Module, start: list[Target], task_adapter: str | None
) -> dict[str, Any]:
    task = resolve_layers(model, task_adapter) if task_adapter else []
    return {
        "format": 1,
        **run,
        "model": hash_model(base_model(model)),
        "start adapter": hash_targets(start),
        "task adapter": hash_targets(task),
        "versions": versions(),
    }


def _arguments(
    directory: str | Path, checkpoint_dir: str | Path | None, show_progress_bar: bool, training_settings: dict[str, Any]
) -> TrainingArguments:
    """Ours over the user's over the defaults."""
    ours = {"output_dir": str(directory), "disable_tqdm": not show_progress_bar, "remove_unused_columns": False}
    refused = sorted(set(training_settings) & set(ours))
    if refused:
        raise ConfigError(f"training settings: {refused[0]!r} is set by train_unlearning itself; leave it out")
    kept = {"save_strategy": "epoch", "save_total_limit": 2} if checkpoint_dir is not None else {}
    try:
        return TrainingArguments(**{**default_settings(), **kept, **training_settings, **ours})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training settings: {error}; expected fields of TrainingArguments") from error


def _begin_as(model: PeftModel, start_adapter: str) -> None:
    """The start adapter's factors, but for directions that are zero in A and B: they keep their fresh A, and can learn.

    Where both are zero, so are both gradients.
    """
    for layer in model.modules():
        if not (isinstance(layer, LoraLayer) and start_adapter in layer.lora_A):
            continue
        factors: Any = {name: (layer.lora_A[name], layer.lora_B[name]) for name in (_NAME, start_adapter)}
        A, B = (factor.weight.data for factor in factors[_NAME])
        start_A, start_B = (factor.weight.data for factor in factors[start_adapter])
        unused = ~start_A.any(1) & ~start_B.any(0) if not isinstance(layer, ParamWrapper) else None  # several experts'
        A.copy_(start_A if unused is None else torch.where(unused.unsqueeze(1), A, start_A))
        B.copy_(start_B * (layer.scaling[start_adapter] / layer.scaling[_NAME]))  # as strong as it is on the model


def _turn_on(model: PeftModel, task_adapter: str | None) -> None:
    """The adapter in training, and the task adapter under it; the former alone requires gradients."""
    switch_modules(model.modules(), [*([task_adapter] if task_adapter else []), _NAME])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{_NAME}." in name)


def _latest(checkpoint_dir: str | Path | None) -> str | None:
    """The last checkpoint that was written whole, if any."""
    if checkpoint_dir is None:
        return None
    whole = [path.parent for path in Path(checkpoint_dir).glob(f"checkpoint-*/{_STATE_NAME}")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _factors(targets: list[Target]) -> dict[str, Factors]:
    return {
        target.name: Factors(target.A.cpu(), (target.scaling * target.B).cpu(), energy=1.0, energy_kept=1.0)
        for target in targets
    }


def _described(trainer: UnlearningTrainer) -> dict[str, Any]:
    arguments = trainer.args
    return {
        "steps": trainer.state.global_step,
        "global_batch": _global_batch(arguments),
        "epochs": trainer.state.epoch,
        "learning_rate": arguments.learning_rate,
        "scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "optimiser": str(getattr(arguments.optim, "value", arguments.optim)),
        "max_grad_norm": arguments.max_grad_norm,
        "seed": arguments.seed,
    }


def _global_batch(arguments: TrainingArguments) -> int:
    """Samples of each set in a step."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def _last_figures(trainer: UnlearningTrainer) -> dict[str, float]:
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    names = ("loss", "learning_rate", "epoch", "step")
    return {name: value for name, value in logged[-1].items() if name not in names} if logged else {}
