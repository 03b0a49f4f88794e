"""A ``transformers.Trainer`` for unlearning: two losses, two gradients, one step.

The forget gradient and the retain gradient are summed separately over the global batch (micro-batches, then processes).
They are combined once per step, before clipping and the optimizer. Beyond an ordinary Trainer, this takes the memory of
two copies of the adapter's gradients. The reference model is the same stack of adapters without the one in training, so
that it takes no memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..data import Batch
from ..errors import AdapterError, ConfigError, NumericalError
from ..gradients import find_blocks
from ..model import completion_logits, completion_states, distributed, preserved, row_length, tuner_modules
from ._agreement import agreement
from ._pairs import Pairs, PairSampler, collate, load_pairs
from .combiners import COMBINERS
from .losses import ForwardPass, Loss, LossInputs
from .settings import UnlearningSettings

_WEIGHTS_NAME = "adapter_model.safetensors"


class UnlearningTrainer(Trainer):
    """Trains the one LoRA adapter of a model that requires gradients; the base and all other adapters stay frozen.

    It logs, beside what every Trainer logs, means since the last log of ``forget_loss``, ``retain_loss``,
    ``cosine_forget_retain``, ``cosine_combined_forget``, ``cosine_combined_retain`` and ``conflicting_share``. A
    checkpoint holds the adapter in training alone; resuming from it is exact.

    Args:
        model: a PeftModel in float or 4 bit. Adapters that are on besides the one in training stay on, without
            dropout; they are part of the reference model.
        args: the training arguments. An epoch is one pass over the forget set.
        forget: the forget set: rows, a path to JSON lines, a ``datasets.Dataset``, or samples that are loaded already.
        retain: the retain set, in the same forms. No row may be in both sets.
        processing_class: the tokenizer; tokenised data does without it.
        settings: the losses and the combiner; ``UnlearningSettings()`` by default.
        max_length: the most tokens of a sample; by default 1024, or the model's number of positions if that is less.
        options: further arguments of ``Trainer``, such as ``callbacks``.

    Raises:
        AdapterError: not exactly one adapter requires gradients, or something else does.
        ConfigError: the model is sharded or has no block ``layer``, or ``args`` asks for what is not supported.
        DataError: a set is empty or malformed, or the sets share a row.
        NumericalError: during training, a loss or a gradient is not finite.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        forget: Any,
        retain: Any,
        *,
        processing_class: Any = None,
        settings: UnlearningSettings | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or UnlearningSettings()
        distributed.refuse_sharded(model)
        _check_arguments(args)
        self.adapter_name = _adapter_in_training(model)
        self._factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._block = _block_of_states(model, self.settings, self._factors)
        self._reference = _adapters_beside(model, self.adapter_name)
        _check_origin(self.settings, self._reference)
        self._reset()
        length = row_length(model, max_length)
        pairs = load_pairs(forget, retain, processing_class, self.settings, max_length=length)
        _adjust_arguments(args, model)
        super().__init__(model, args, collate, pairs, processing_class=processing_class, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over samples, whatever their number of tokens
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "accelerate is configured for FSDP or DeepSpeed, which shard the model; expected processes that each "
                "hold the whole model: use accelerate launch --multi_gpu"
            )

    def train(self, *arguments: Any, **options: Any) -> TrainOutput:
        """Train as ``Trainer.train`` does."""
        self._reset()
        return super().train(*arguments, **options)

    def _reset(self) -> None:
        """Drop the sums that an interrupted run left within a step."""
        self._sums: dict[str, dict[str, Tensor]] = {"forget": {}, "retain": {}}
        self._totals = {"forget": 0.0, "retain": 0.0, "samples": 0.0}
        self._figures: dict[str, float] = {}
        self._steps = 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add one micro-batch's gradients of both losses to the sums; on the last one of a step, combine them."""
        bare: Any = self.accelerator.unwrap_model(model)  # DDP would reduce the two gradients as one
        self._set_modes(bare)
        sets: Any = self._prepare_inputs(inputs)
        batches = {name: Batch(**tensors, indices=[]) for name, tensors in sets.items()}
        samples = len(batches["forget"].labels)
        weighted = torch.zeros((), device=self.args.device)
        for name, loss in self.settings.losses.items():
            with self.compute_loss_context_manager():
                loss_inputs = self._loss_inputs(bare, batches, name, loss)
                total = loss.function(loss_inputs, *self.settings.loss_parameters).sum()
            self._add_gradients(name, total)
            self._totals[name] += float(total.detach())
            weighted += self.settings.weights[name] * total.detach().to(weighted.device) / samples
        self._totals["samples"] += samples
        if self.accelerator.sync_gradients:
            self._combine()
        return weighted / self.current_gradient_accumulation_steps

    def _loss_inputs(
        self, model: nn.Module, batches: dict[str, Batch], name: str, loss: Loss
    ) -> dict[ForwardPass, LossInputs]:
        """Run the forward passes that the loss of a set reads."""
        loss_inputs = {}
        for forward_pass in loss.reads:
            batch = batches["refusal" if forward_pass.on_refusals else name]
            if forward_pass.is_frozen:
                adapters = [] if forward_pass is ForwardPass.ORIGIN else self._reference
                with preserved(model, adapters), torch.no_grad():
                    loss_inputs[forward_pass] = self._outputs(model, batch, loss)
            else:
                loss_inputs[forward_pass] = self._outputs(model, batch, loss)
        return loss_inputs

    def _outputs(self, model: nn.Module, batch: Batch, loss: Loss) -> LossInputs:
        if not loss.needs_states:
            return LossInputs(completion_logits(model, batch), batch.labels)
        assert self._block is not None
        logits, states = completion_states(model, batch, self._block)
        return LossInputs(logits, batch.labels, states)

    def _add_gradients(self, name: str, total: Tensor) -> None:
        """Backward of a loss that is summed over samples, into the sums of its set."""
        sums = self._sums[name]
        for key, parameter in self._factors.items():
            parameter.grad = sums.get(key)
        self.accelerator.backward(total)
        for key, parameter in self._factors.items():
            if parameter.grad is not None:
                sums[key] = parameter.grad
            parameter.grad = None

    def _combine(self) -> None:
        """Put the combined gradient of the step on the parameters, at the scaler's scale, and reset the sums."""
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        losses = self._average(scale)
        forget, retain = self._sums["forget"], self._sums["retain"]
        weights = self.settings.forget_weight, self.settings.retain_weight
        overflowed = [
            name for name, sums in self._sums.items() if not all(bool(g.isfinite().all()) for g in sums.values())
        ]
        if not overflowed:
            combined = COMBINERS[self.settings.combiner].function(forget, retain, *weights)
            figures = losses | agreement(forget, retain, combined)
            self._figures = {name: self._figures.get(name, 0.0) + value for name, value in figures.items()}
            self._steps += 1
        else:  # The loss scale was too large. A sum stays non-finite, so that the scaler skips the step.
            self._check(
                self.accelerator.scaler is not None, f"the {overflowed[0]} gradient holds NaN or infinite values"
            )
            combined = COMBINERS["sum"].function(forget, retain, *weights)
        for key, parameter in self._factors.items():
            parameter.grad = combined[key].mul_(scale)
        self._sums = {"forget": {}, "retain": {}}
        self._totals = dict.fromkeys(self._totals, 0.0)

    def _average(self, scale: float) -> dict[str, float]:
        """Turn the sums into means over all samples of all processes, in place; returns both mean losses."""
        reduced = torch.tensor(list(self._totals.values()), dtype=torch.float64, device=self.args.device)
        distributed.add_up(reduced)
        *totals, samples = reduced.tolist()
        for (name, sums), total in zip(self._sums.items(), totals, strict=True):
            self._check(math.isfinite(total), f"the {name} loss is {total / samples}")
            for key, parameter in self._factors.items():
                gradient = sums.setdefault(key, torch.zeros_like(parameter))
                distributed.add_up(gradient)
                gradient.div_(scale * samples)
        return {f"{name}_loss": total / samples for name, total in zip(self._sums, totals, strict=True)}

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            raise NumericalError(
                f"step {self.state.global_step + 1}: {problem}; lower the learning rate or forget_weight, or choose a "
                "bounded forget loss (npo, simnpo)"
            )

    def _set_modes(self, model: nn.Module) -> None:
        """Training mode, except for the dropout of adapters that are not in training."""
        model.train()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name, dropout in module.lora_dropout.items():
                    dropout.train(name == self.adapter_name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as a Trainer does, with the means of both losses and of the gradients' agreement since the last log."""
        if "loss" in logs and self._steps:
            logs |= {name: value / self._steps for name, value in self._figures.items()}
            self._figures, self._steps = {}, 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        assert isinstance(self.train_dataset, Pairs)
        global_batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return PairSampler(self.train_dataset, global_batch, seed, lambda: self.state.global_step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The operations of a micro-batch of both sets, as ``Trainer`` estimates them."""
        return sum(super(UnlearningTrainer, self).floating_point_ops(tensors) for tensors in inputs.values())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            directory = output_dir if output_dir is not None else self.args.output_dir
            names = [self.adapter_name]
            self.model.save_pretrained(directory, selected_adapters=names, save_embedding_layers=False)  # type: ignore[operator, union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        adapter_directory = directory if self.adapter_name == "default" else directory / self.adapter_name
        if not (adapter_directory / _WEIGHTS_NAME).is_file():
            raise AdapterError(
                f"{directory} holds no {_WEIGHTS_NAME} of adapter {self.adapter_name!r}; expected a checkpoint that "
                "UnlearningTrainer wrote"
            )
        weights = load_file(adapter_directory / _WEIGHTS_NAME)
        set_peft_model_state_dict(self.model, weights, adapter_name=self.adapter_name)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _check_arguments(args: TrainingArguments) -> None:
    unsupported = {
        "eval_strategy": args.eval_strategy != "no",
        "load_best_model_at_end": args.load_best_model_at_end,
        "fsdp": bool(args.fsdp),
        "deepspeed": bool(args.deepspeed),
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    refused = next((name for name, is_set in unsupported.items() if is_set), None)
    if refused is not None:
        raise ConfigError(
            f"{refused}={getattr(args, refused)!r} is not supported for unlearning; leave it out (evaluate the adapter "
            "after training, and use accelerate launch to split the data among processes that each hold the whole "
            "model)"
        )


def _adjust_arguments(args: TrainingArguments, model: PeftModel) -> None:
    """Set what the trainer depends on, in place, and make gradient checkpointing work over a frozen base."""
    args.remove_unused_columns = False
    if args.n_gpu > 1:  # a Trainer would multiply the batch by it and wrap the model in DataParallel
        args._n_gpu = 1
    if args.gradient_checkpointing:
        options: Any = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        args.gradient_checkpointing_kwargs = options
        if options.get("use_reentrant"):  # no gradient would flow through a block whose input requires none
            model.enable_input_require_grads()  # type: ignore[operator]


def _block_of_states(
    model: nn.Module, settings: UnlearningSettings, factors: Mapping[str, nn.Parameter]
) -> nn.Module | None:
    """The decoder block whose hidden states a loss reads, or None if no loss does."""
    if not settings.needs_states:
        return None
    blocks = find_blocks(model)
    layer = settings.layer or (len(blocks) + 1) // 2
    if not 1 <= layer <= len(blocks):
        raise ConfigError(f"layer: expected at most {len(blocks)}, the model's number of blocks, found {layer}")
    after = {id(parameter) for block in blocks[layer:] for parameter in block.parameters()}
    if all(id(parameter) in after for parameter in factors.values()):
        raise ConfigError(
            f"layer: expected a block whose output depends on the adapter in training, found {layer}, which is before "
            "the adapter's first layer; choose a later block, or train an adapter on earlier layers"
        )
    return blocks[layer - 1]


def _check_origin(settings: UnlearningSettings, reference: Sequence[str]) -> None:
    """Refuse a loss that reads the origin where that is the full model itself."""
    if settings.reads_origin and not reference:
        raise ConfigError(
            f"forget_loss {settings.forget_loss!r}: expected a task adapter that taught the forget rows (task_adapter, "
            "--task-adapter), found none: the origin, every adapter off, is the full model itself"
        )


def _adapter_in_training(model: nn.Module) -> str:
    """The name of the one adapter that requires gradients."""
    if not isinstance(model, PeftModel):
        raise AdapterError(f"expected a PeftModel with a LoRA adapter to train, found a {type(model).__name__}")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in trainable if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        raise AdapterError(f"{others[0]} requires gradients; expected only the factors of one LoRA adapter: freeze it")
    adapters = {name.split(".lora_A." if ".lora_A." in name else ".lora_B.")[1].split(".")[0] for name in trainable}
    if len(adapters) != 1:
        raise AdapterError(
            f"expected one adapter that requires gradients, found {sorted(adapters) or 'none'}; call set_adapter, or "
            "set requires_grad"
        )
    return adapters.pop()


def _adapters_beside(model: nn.Module, adapter_name: str) -> list[str]:
    """The other adapters that are on, in the order of activation."""
    on = {name: None for module in tuner_modules(model.modules()) if not module._disable_adapters
          for name in module.active_adapters}  # fmt: skip
    if adapter_name not in on:
        raise AdapterError(f"adapter {adapter_name!r} requires gradients but is off; turn it on")
    return [name for name in on if name != adapter_name]
