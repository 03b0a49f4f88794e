"""A ``transformers.Trainer`` that forgets: two losses, two gradients, one step.

Both gradients are summed apart over the whole global batch (micro-batches, then processes) and combined once, before
clipping and the optimizer. Beyond what a Trainer holds, that is two copies of the adapter's gradients, nothing more.
The reference model is the same stack of adapters without the one in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..data import Batch, load_samples
from ..errors import AdapterError, ConfigError, NumericalError
from ..gradients import find_blocks
from ..model import completion_logits, completion_states, distributed, preserved, tuner_modules
from ._pairs import Pairs, PairSampler, collate, load_refusals
from .combiners import COMBINERS
from .combiners.agreement import agreement
from .losses import FORGET_LOSSES, RETAIN_LOSSES
from .losses.loss import OWN, REFERENCE, REFUSAL, REFUSAL_REFERENCE, Loss
from .losses.loss_inputs import LossInputs
from .settings import UnlearningSettings

_WEIGHTS_NAME = "adapter_model.safetensors"


_READ = {OWN: None, REFERENCE: None, REFUSAL: "refusal", REFUSAL_REFERENCE: "refusal"}  # of which batch, if not its own


class UnlearningTrainer(Trainer):
    """Trains the one LoRA adapter of a model that requires gradients; the base and all others stay frozen.

    Logged beside what every Trainer logs, as means since the last log: ``forget_loss`` and ``retain_loss``,
    ``cosine_forget_retain``, ``cosine_combined_forget``, ``cosine_combined_retain``, ``conflicting_share``. A
    checkpoint holds the adapter in training alone; resuming from it is exact.

    Args:
        model: a PeftModel in float or 4 bit. Adapters that are on beside the one in training stay on, as a part of the
            reference model; their dropout is off.
        args: an epoch is the forget set once.
        forget: what must go: rows, a path, or a Dataset, as for ``load_samples`` (TRL's conventions).
        retain: what must stay, likewise; no row may be in both.
        processing_class: the tokenizer; tokenised data goes without.

    Raises:
        AdapterError: not exactly one adapter requires gradients, or something else does.
        ConfigError: the model is sharded, has no such ``layer``, or ``args`` asks for what is not there.
        DataError: a set is empty or malformed, or a row is in both.
        NumericalError: in training: a loss or a gradient is not finite.
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
        max_length: int = 1024,
        **options: Any,
    ) -> None:
        self.settings = settings or UnlearningSettings()
        distributed.refuse_sharded(model)
        _check_arguments(args)
        self.adapter_name = _trained_adapter(model)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._block = _block(model, self.settings, self._trained)
        self._reference = _others_on(model, self.adapter_name)
        self._forget_sums()
        sets = {"forget": forget, "retain": retain}
        samples = {
            name: load_samples(data, processing_class, max_length=max_length, name=f"the {name} set")
            for name, data in sets.items()
        }
        refusals = None
        if self.settings.needs_refusals:
            refusals = load_refusals(forget, processing_class, self.settings.refusals, max_length=max_length)
        pairs = Pairs(samples["forget"], samples["retain"], refusals)
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # a Trainer would take a batch for each, and DataParallel; the model is on one
            args._n_gpu = 1
        if args.gradient_checkpointing:
            how: Any = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
            args.gradient_checkpointing_kwargs = how
            if how.get("use_reentrant"):  # over a frozen base, no gradient would flow
                model.enable_input_require_grads()  # type: ignore[operator]
        super().__init__(model, args, collate, pairs, processing_class=processing_class, **options)
        self.model_accepts_loss_kwargs = False  # the mean is over samples, whatever their tokens
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "accelerate is set up for FSDP or DeepSpeed, which cut the model up; expected processes that each hold "
                "the whole model (accelerate launch --multi_gpu)"
            )

    def train(self, *arguments: Any, **options: Any) -> TrainOutput:
        self._forget_sums()
        return super().train(*arguments, **options)

    def _forget_sums(self) -> None:
        """What a run that was cut off would leave to the next."""
        self._sums: dict[str, dict[str, Tensor]] = {"forget": {}, "retain": {}}
        self._tally = {"forget": 0.0, "retain": 0.0, "samples": 0.0}
        self._figures: dict[str, float] = {}
        self._steps = 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A micro-batch of each set, forward and backward one after the other; the last one of a step combines."""
        bare: Any = self.accelerator.unwrap_model(model)  # a DDP would reduce what must stay apart
        self._set_modes(bare)
        sets: Any = self._prepare_inputs(inputs)
        batches = {name: Batch(**part, indices=[]) for name, part in sets.items()}
        samples = len(batches["forget"].labels)
        weighted = torch.zeros((), device=self.args.device)
        losses = {
            "forget": FORGET_LOSSES[self.settings.forget_loss],
            "retain": RETAIN_LOSSES[self.settings.retain_loss],
        }
        weights = {"forget": self.settings.forget_weight, "retain": self.settings.retain_weight}
        for name, loss in losses.items():
            with self.compute_loss_context_manager():
                total = loss.function(self._read(bare, batches, name, loss), *self.settings.loss_values).sum()
            self._add_gradients(name, total)
            self._tally[name] += float(total.detach())
            weighted += weights[name] * total.detach().to(weighted.device) / samples
        self._tally["samples"] += samples
        if self.accelerator.sync_gradients:
            self._combine()
        return weighted / self.current_gradient_accumulation_steps

    def _read(self, model: nn.Module, batches: dict[str, Batch], name: str, loss: Loss) -> dict[str, LossInputs]:
        readings = {}
        for which in loss.reads:
            batch = batches[_READ[which] or name]
            if which in (REFERENCE, REFUSAL_REFERENCE):
                with preserved(model, self._reference), torch.no_grad():
                    readings[which] = self._reading(model, batch, loss)
            else:
                readings[which] = self._reading(model, batch, loss)
        return readings

    def _reading(self, model: nn.Module, batch: Batch, loss: Loss) -> LossInputs:
        if not loss.needs_states:
            return LossInputs(completion_logits(model, batch), batch.labels)
        assert self._block is not None
        logits, states = completion_states(model, batch, self._block)
        return LossInputs(logits, batch.labels, states)

    def _add_gradients(self, name: str, total: Tensor) -> None:
        sums = self._sums[name]
        for key, parameter in self._trained.items():
            parameter.grad = sums.get(key)
        self.accelerator.backward(total)
        for key, parameter in self._trained.items():
            if parameter.grad is not None:
                sums[key] = parameter.grad
            parameter.grad = None

    def _combine(self) -> None:
        """Sums over all processes -> means -> the gradient that is clipped and stepped along, at the scaler's scale."""
        tally = torch.tensor(list(self._tally.values()), dtype=torch.float64, device=self.args.device)
        distributed.add_up(tally)
        *totals, samples = tally.tolist()
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        for name, total in zip(self._sums, totals, strict=True):
            self._check(math.isfinite(total), f"the {name} loss is {total / samples}")
            for key, parameter in self._trained.items():
                gradient = self._sums[name].setdefault(key, torch.zeros_like(parameter))
                distributed.add_up(gradient)
                gradient.div_(scale * samples)
        forget, retain = (self._sums[name] for name in ("forget", "retain"))
        weights = self.settings.forget_weight, self.settings.retain_weight
        finite = {name: all(bool(g.isfinite().all()) for g in self._sums[name].values()) for name in self._sums}
        if all(finite.values()):
            combined = COMBINERS[self.settings.combiner].function(forget, retain, *weights)
            figures = {f"{name}_loss": total / samples for name, total in zip(self._sums, totals, strict=True)}
            figures |= agreement(forget, retain, combined)
            self._figures = {name: self._figures.get(name, 0.0) + value for name, value in figures.items()}
            self._steps += 1
        else:  # the scale was too large: added up, what is not finite stays so, and the scaler skips the step
            wrong = next(name for name, found in finite.items() if not found)
            self._check(self.accelerator.scaler is not None, f"the {wrong} gradient holds NaN or infinite values")
            combined = COMBINERS["sum"].function(forget, retain, *weights)
        for key, parameter in self._trained.items():
            parameter.grad = combined[key].mul_(scale)
        self._sums = {"forget": {}, "retain": {}}
        self._tally = dict.fromkeys(self._tally, 0.0)

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise NumericalError(
                f"step {self.state.global_step + 1}: {what}; lower the learning rate or forget_weight, or choose a "
                "forget loss that is bounded (npo, simnpo)"
            )

    def _set_modes(self, model: nn.Module) -> None:
        """Training mode, but for the dropout of adapters that are not in training."""
        model.train()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name, dropout in module.lora_dropout.items():
                    dropout.train(name == self.adapter_name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
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
        return sum(super(UnlearningTrainer, self).floating_point_ops(part) for part in inputs.values())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            directory = output_dir if output_dir is not None else self.args.output_dir
            names = [self.adapter_name]
            self.model.save_pretrained(directory, selected_adapters=names, save_embedding_layers=False)  # type: ignore[operator, union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        inside = directory if self.adapter_name == "default" else directory / self.adapter_name
        if not (inside / _WEIGHTS_NAME).is_file():
            raise AdapterError(
                f"{directory} holds no {_WEIGHTS_NAME} of adapter {self.adapter_name!r}; expected a checkpoint of this "
                "trainer"
            )
        set_peft_model_state_dict(self.model, load_file(inside / _WEIGHTS_NAME), adapter_name=self.adapter_name)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _check_arguments(args: TrainingArguments) -> None:
    asked = {
        "eval_strategy": args.eval_strategy != "no",
        "load_best_model_at_end": args.load_best_model_at_end,
        "fsdp": bool(args.fsdp),
        "deepspeed": bool(args.deepspeed),
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    refused = next((name for name, found in asked.items() if found), None)
    if refused is not None:
        raise ConfigError(
            f"{refused}={getattr(args, refused)!r} is not there for unlearning; leave it out (evaluate the adapter "
            "afterwards, and let accelerate launch split the data over processes that each hold the whole model)"
        )


def _block(model: nn.Module, settings: UnlearningSettings, trained: Mapping[str, nn.Parameter]) -> nn.Module | None:
    """The decoder block whose hidden states a loss looks at, if one does."""
    if not settings.needs_states:
        return None
    blocks = find_blocks(model)
    layer = settings.layer or (len(blocks) + 1) // 2
    if not 1 <= layer <= len(blocks):
        raise ConfigError(f"layer: expected at most {len(blocks)}, as many blocks as the model has, found {layer}")
    after = {id(parameter) for block in blocks[layer:] for parameter in block.parameters()}
    if all(id(parameter) in after for parameter in trained.values()):
        raise ConfigError(
            f"layer: expected a block that the adapter in training has a say in, found {layer}, before its first "
            "factor; name a later one, or train an adapter of earlier layers"
        )
    return blocks[layer - 1]


def _trained_adapter(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        raise AdapterError(f"expected a PeftModel with a LoRA adapter to train, found a {type(model).__name__}")
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in wanted if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        raise AdapterError(f"{others[0]} requires gradients, expected factors of one LoRA adapter alone; freeze it")
    adapters = {name.split(".lora_A." if ".lora_A." in name else ".lora_B.")[1].split(".")[0] for name in wanted}
    if len(adapters) != 1:
        raise AdapterError(
            f"expected one adapter that requires gradients, found {sorted(adapters) or 'none'}; call set_adapter, or "
            "set requires_grad"
        )
    return adapters.pop()


def _others_on(model: nn.Module, adapter_name: str) -> list[str]:
    on = {name: None for module in tuner_modules(model.modules()) if not module._disable_adapters
          for name in module.active_adapters}  # fmt: skip
    if adapter_name not in on:
        raise AdapterError(f"adapter {adapter_name!r} requires gradients, but is off; turn it on")
    return [name for name in on if name != adapter_name]
