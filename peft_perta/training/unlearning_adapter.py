"""Train an adapter to forget one set and to retain another, and emit it as plain LoRA."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerState, TrainingArguments

from ..adapters import (
    DTYPES,
    PROVENANCE_NAME,
    EmittedAdapter,
    Factors,
    TrainedProvenance,
    build_adapter,
    describe_base,
    servable_rank,
    torch_dtype,
    versions,
)
from ..data import Sample, check_output, check_setting, fingerprint
from ..errors import AdapterError, ConfigError
from ..gradients import Checkpoint
from ..model import (
    check_base,
    check_lora_config,
    check_new_name,
    distributed,
    hash_targets,
    identify,
    remove_adapter,
    require_adapter,
    resolve_layers,
    row_length,
    snapshot,
    switch_modules,
)
from ._evaluation import evaluate_by_default
from ._pairs import Pairs, load_held_out, load_pairs
from ._training_arguments import check_warmup, global_batch, training_arguments
from ._whole_checkpoints import MarksCheckpoints, last_whole_checkpoint
from .new_adapter import copy_factors, default_lora_config, with_new_adapter
from .reports import take_reporters
from .settings import UnlearningSettings
from .trainer import UnlearningTrainer

_NAME = "perta_training"  # the adapter's name on the model during training


@dataclass(frozen=True)
class _Run:
    """One call of ``train_unlearning``, checked, with its data loaded.

    Attributes:
        pairs: both sets, tokenised.
        held_out: the retain rows to evaluate on, tokenised, if there are some.
        lora_config: the config of the adapter in training.
        start_sha256: hash of the start adapter's factors; without a start adapter, the hash of no factors.

    The other attributes are the arguments of ``train_unlearning``.
    """

    model: nn.Module
    tokenizer: Any
    settings: UnlearningSettings
    task_adapter: str | None
    start_adapter: str | None
    start_sha256: str
    lora_config: LoraConfig
    pairs: Pairs
    held_out: list[Sample] | None
    dtype: str
    output_dir: str | Path | None
    checkpoint_dir: str | Path | None
    callbacks: Sequence[Any]
    show_progress_bar: bool
    training_settings: Mapping[str, Any]

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """The samples of each set: 'forget', 'retain' and, if there are some, 'held-out'."""
        held_out = {} if self.held_out is None else {"held-out": self.held_out}
        return {"forget": self.pairs.forget, "retain": self.pairs.retain, **held_out}


def train_unlearning(
    model: nn.Module,
    forget: Any,
    retain: Any,
    tokenizer: Any,
    settings: UnlearningSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    held_out: Any = None,
    task_adapter: str | None = None,
    start_adapter: str | None = None,
    lora_config: LoraConfig | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    show_progress_bar: bool = True,
    **training_settings: Any,
) -> EmittedAdapter:
    """Train a LoRA adapter that makes the full model forget; the model itself is left as it was.

    Args:
        model: a transformers model or a PeftModel, in float or 4 bit.
        forget, retain: the two sets: rows, a name that ``read_rows`` takes, or a ``datasets.Dataset``; none in both.
        tokenizer: the model's tokenizer; tokenised data does without it.
        settings: the losses and the combiner; ``UnlearningSettings()`` by default.
        output_dir: the directory to write the adapter to; by default nothing is written.
        held_out: retain rows to evaluate on while it trains, in the same forms; by default some of the retain set.
        task_adapter: name of the adapter that makes the base the full model, if there is one. It stays on, frozen.
        start_adapter: name of an adapter to start from, such as a negative adapter; by default the delta starts at 0.
        lora_config: plain LoRA, only without a start adapter; ``default_lora_config()`` by default.
        dtype: type of the emitted factors: 'float32', 'bfloat16' or 'float16'.
        max_length: as in ``train_forget_adapter``.
        checkpoint_dir: directory for checkpoints, by default one per epoch, which stay. The same call resumes there.
        callbacks: transformers' callbacks.
        show_progress_bar: show progress bars and logs.
        training_settings: fields of ``TrainingArguments``. By default 5 epochs, batch size 8, learning rate 5e-4.
            ``report_to`` sends what is logged to trackio, wandb, ...; tensorboard's files go to ``OUTPUT_DIR.runs``.

    Returns:
        The adapter, which is no longer on the model: config, state dict and provenance.

    Raises:
        AdapterError, UnsupportedLayerError: the adapter would not be plain LoRA. Checked before training.
        ConfigError: a setting is invalid, or the model is sharded.
        DataError: a set is empty or malformed, or the sets share a row.
        NumericalError: a loss, a gradient or a factor is not finite, or a goal is passed at once.
        OutputError: a directory cannot be written, holds other files, or holds another run's checkpoint.
    """
    settings = settings or UnlearningSettings()
    _check_request(model, dtype, output_dir)
    config, length = _checked_config(model, task_adapter, start_adapter, lora_config), row_length(model, max_length)
    pairs = load_pairs(forget, retain, tokenizer, settings, max_length=length)
    return _emit(_Run(
        model=model, tokenizer=tokenizer, settings=settings, task_adapter=task_adapter, start_adapter=start_adapter,
        start_sha256=_hash_factors(model, start_adapter), lora_config=config, pairs=pairs, dtype=dtype,
        held_out=None if held_out is None else load_held_out(held_out, pairs, tokenizer, max_length=length),
        output_dir=output_dir, checkpoint_dir=checkpoint_dir, training_settings=training_settings, callbacks=callbacks,
        show_progress_bar=show_progress_bar,
    ))  # fmt: skip


def evaluation_arguments(steps: int | None) -> dict[str, Any]:
    """The fields of ``TrainingArguments`` that ask for an evaluation every so many steps; none for None."""
    return {} if steps is None else {"eval_strategy": "steps", "eval_steps": steps}


def _check_request(model: nn.Module, dtype: str, output_dir: str | Path | None) -> None:
    check_setting(dtype in DTYPES, "dtype", f"one of {list(DTYPES)}", dtype)
    distributed.check_sharding(model)
    check_new_name(model, _NAME)
    if output_dir is not None:
        check_output(output_dir, PROVENANCE_NAME)


def _checked_config(
    model: nn.Module, task_adapter: str | None, start_adapter: str | None, lora_config: LoraConfig | None
) -> LoraConfig:
    """A copy of the config to train with: the start adapter's, the user's or the default one."""
    for name in filter(None, (task_adapter, start_adapter)):
        require_adapter(model, name)
        check_base(model, name)
    if task_adapter is not None and task_adapter == start_adapter:
        raise AdapterError(f"the task adapter and the start adapter are both {task_adapter!r}; expected two names")
    if start_adapter is not None and lora_config is not None:
        raise ConfigError(
            f"lora_config: expected None, since the adapter starts from {start_adapter!r} and takes its config; leave "
            "one of them out"
        )
    config = copy.copy(require_adapter(model, start_adapter) if start_adapter else lora_config or default_lora_config())
    check_lora_config(config, start_adapter or "the new one")
    config.inference_mode = False
    config.base_model_name_or_path = None  # with_new_adapter names it
    servable_rank(max([config.r, *(config.rank_pattern or {}).values()]))
    return config


def _hash_factors(model: nn.Module, adapter_name: str | None) -> str:
    """SHA-256 of an adapter's factors; without an adapter, of no factors."""
    return hash_targets(resolve_layers(model, adapter_name) if adapter_name else [])


def _emit(run: _Run) -> EmittedAdapter:
    """Train, build the adapter with its provenance, and write it. The model is left as it was."""
    began = time.perf_counter()
    restore = snapshot(run.model)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        arguments = _arguments(run, scratch)
        reporters = take_reporters(arguments, run.output_dir)
        checkpoint = _opened(run, arguments)
        torch.manual_seed(arguments.seed)  # the initial A is drawn before the trainer sets the seed
        try:
            trainer = _trainer(run, arguments, reporters)
            if checkpoint is not None:
                with distributed.failing_together():
                    checkpoint.start()
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(run.checkpoint_dir))
            lora_config, state_dict = _build(trainer, run.dtype)
        finally:
            remove_adapter(run.model, _NAME)
            restore()
    seconds = {"training": round(time.perf_counter() - began, 3)}
    emitted = EmittedAdapter(lora_config, state_dict, _provenance(run, trainer, lora_config.r, seconds))
    if run.output_dir is not None and distributed.is_main():
        emitted.save(run.output_dir)
    return emitted


def _arguments(run: _Run, scratch: str) -> TrainingArguments:
    defaults: dict[str, Any] = {"num_train_epochs": 5, "learning_rate": 5e-4}
    defaults["per_device_eval_batch_size"] = run.training_settings.get("per_device_train_batch_size", 8)
    if run.checkpoint_dir is not None:
        defaults |= {"save_strategy": "epoch", "save_total_limit": 2}
    fixed = {
        "output_dir": str(run.checkpoint_dir or scratch),
        "disable_tqdm": not run.show_progress_bar,
        "remove_unused_columns": False,
    }
    arguments = training_arguments(TrainingArguments, "train_unlearning", defaults, run.training_settings, fixed)
    check_warmup(arguments, len(run.pairs))
    if run.held_out is not None:
        evaluate_by_default(arguments, len(run.pairs))
    return arguments


def _opened(run: _Run, arguments: TrainingArguments) -> Checkpoint | None:
    """The run's checkpoint, if it has one. Nothing is written to it yet."""
    if run.checkpoint_dir is None:
        return None
    with distributed.failing_together():
        return Checkpoint(run.checkpoint_dir, _identity(run, arguments), writes=distributed.is_main())


def _identity(run: _Run, arguments: TrainingArguments) -> dict[str, Any]:
    """What makes two runs the same run, for the checkpoint. Sets are sorted: their order differs between processes."""
    fields = run.lora_config.to_dict().items()
    config = {name: str(sorted(value) if isinstance(value, set) else value) for name, value in fields}
    return {
        "format": 2,
        "settings": run.settings.to_dict(),
        "data": {name: fingerprint(samples) for name, samples in run.samples.items()},
        "training": {name: str(value) for name, value in run.training_settings.items() if name != "report_to"},
        "adapter": config,
        "global batch": global_batch(arguments),
        **{f"the model's {part}": value for part, value in identify(run.model).items()},
        "start adapter": run.start_sha256,
        "task adapter": _hash_factors(run.model, run.task_adapter),
        "versions": versions(),
    }


def _trainer(run: _Run, arguments: TrainingArguments, reporters: Sequence[Any]) -> UnlearningTrainer:
    """Put the adapter on the model, and make its trainer. Every refusal is made here, before anything is written."""
    model = with_new_adapter(run.model, run.lora_config, _NAME)
    resolve_layers(model, _NAME)  # refuses layers that no plain adapter can hold
    if run.start_adapter:
        copy_factors(model, run.start_adapter, _NAME)
    switch_modules(model.modules(), [*([run.task_adapter] if run.task_adapter else []), _NAME])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{_NAME}." in name)
    trainer = UnlearningTrainer(
        model,
        arguments,
        run.pairs.forget,
        run.pairs.retain,
        processing_class=run.tokenizer,
        settings=run.settings,
        eval_dataset=run.held_out,
        callbacks=[*reporters, *run.callbacks, MarksCheckpoints()],
    )
    if not run.show_progress_bar:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _build(trainer: UnlearningTrainer, dtype: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The trained adapter as plain LoRA of a rank that servers take; its scaling goes into B."""
    model: Any = trainer.model
    targets = resolve_layers(model, _NAME)
    factors = {
        target.name: Factors(target.A.cpu(), (target.scaling * target.B).cpu(), energy=1.0, energy_kept=1.0)
        for target in targets
    }
    return build_adapter(model, factors, servable_rank(max(target.rank for target in targets)), torch_dtype(dtype))


def _provenance(run: _Run, trainer: UnlearningTrainer, rank: int, seconds: dict[str, float]) -> TrainedProvenance:
    arguments, state = trainer.args, trainer.state
    back = trainer.evaluations.went_back_to
    steps = state.global_step if back is None else back
    return TrainedProvenance(
        settings=run.settings.to_dict(),
        training={
            "steps": steps,
            "global_batch": global_batch(arguments),
            "epochs": state.epoch if back is None else _epoch_of(state, back),
            "learning_rate": arguments.learning_rate,
            "scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
            "optimiser": str(getattr(arguments.optim, "value", arguments.optim)),
            "max_grad_norm": arguments.max_grad_norm,
            "seed": arguments.seed,
        },
        base_model=describe_base(run.model),
        start_adapter={"name": run.start_adapter, "sha256": run.start_sha256} if run.start_adapter else None,
        task_adapter=run.task_adapter,
        data={name: {"samples": len(samples), "sha256": fingerprint(samples)} for name, samples in run.samples.items()},
        figures=_last_figures(state, steps),
        checks=trainer.evaluations.points,
        rank=rank,
        dtype=run.dtype,
        versions=versions(),
        seconds=seconds,
    )


def _epoch_of(state: TrainerState, step: int) -> float:
    return next(entry["epoch"] for entry in state.log_history if entry["step"] == step)


def _last_figures(state: TrainerState, steps: int) -> dict[str, float]:
    """The losses, cosines and the share of conflicting elements that were logged last, up to the adapter's step."""
    logged = [entry for entry in state.log_history if "forget_loss" in entry and entry["step"] <= steps]
    of_trainer = ("loss", "learning_rate", "epoch", "step")
    # A resumed run reads its log in another order: the record is written alike.
    return {name: value for name, value in sorted(logged[-1].items()) if name not in of_trainer} if logged else {}
