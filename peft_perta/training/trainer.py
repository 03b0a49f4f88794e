"""A ``transformers.Trainer`` for unlearning: two losses, two gradients, one step.

The forget gradient and the retain gradient are summed separately over the global batch (micro-batches, then processes).
They are combined once per step, before clipping and the optimizer. Beyond an ordinary Trainer, this takes the memory of
two copies of the adapter's gradients. The reference model is the same stack of adapters without the one in training, so
that it takes no memory of its own.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..data import Batch, read_json
from ..errors import AdapterError, ConfigError, NumericalError, OutputError, PerTAError
from ..model import completion_logits, completion_states, distributed, preserved, row_length
from ._agreement import agreement
from ._evaluation import Evaluations, evaluate_by_default
from ._model_in_training import adapter_in_training, adapters_beside, block_of_states, check_origin
from ._pairs import Pairs, PairSampler, collate, load_held_out, load_pairs
from ._relearner import RELEARNER_NAME, Relearner
from ._shards import SHARD_ON_LOADING, check_shards
from ._training_arguments import adjust_arguments, check_supported
from ._whole_checkpoints import is_write_failure
from .combiners import COMBINERS
from .losses import ForwardPass, Loss, LossInputs
from .settings import UnlearningSettings

_WEIGHTS_NAME = "adapter_model.safetensors"
_RETAIN_WEIGHT_NAME = "retain_weight.json"


class UnlearningTrainer(Trainer):
    """Trains the one LoRA adapter of a model that requires gradients; the base and all other adapters stay frozen.

    It logs, beside what every Trainer logs, means since the last log of ``forget_loss``, ``retain_loss``,
    ``cosine_forget_retain``, ``cosine_combined_forget``, ``cosine_combined_retain`` and ``conflicting_share``; with a
    ``retain_budget`` also ``retain_weight``, with ``relearning_steps`` also ``relearner_loss``, the attacker's on the
    forget rows. An evaluation (``eval_strategy``, ``eval_steps``) logs ``eval_forget_loss`` and ``eval_retain_loss``,
    the mean cross-entropy of the forget rows and of ``eval_dataset``, nats per token; ``evaluations.points`` has the
    path. With a ``target_forget_loss`` or a ``retain_tolerance`` it stops at an evaluation; there are four an epoch
    where ``args`` names no strategy. A checkpoint holds the adapter in training alone, and the attacker; resuming is
    exact.

    Args:
        model: a PeftModel in float or 4 bit. Adapters that are on besides the one in training stay on, without
            dropout; they are part of the reference model.
        args: the training arguments. An epoch is one pass over the forget set.
        forget: the forget set: rows, a name that ``read_rows`` takes, a ``datasets.Dataset``, or samples that are
            loaded already.
        retain: the retain set, in the same forms. No row may be in both sets.
        processing_class: the tokenizer; tokenised data does without it.
        settings: the losses and the combiner; ``UnlearningSettings()`` by default.
        max_length: the most tokens of a sample; by default 1024, or the model's number of positions if that is less.
        options: further arguments of ``Trainer``, such as ``callbacks``. ``eval_dataset`` is held-out retain rows; by
            default as many of the retain rows, which are trained on, as there are forget rows.

    Raises:
        AdapterError: not exactly one adapter requires gradients, or something else does.
        ConfigError: the model is sharded or has no block ``layer``, or ``args`` asks for what is not supported.
        DataError: a set is empty or malformed, or the sets share a row.
        NumericalError: the forget loss is above the target at the start; during training, a loss or a gradient is not
            finite.
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
        check_supported(args, options)
        check_shards(model, args)
        self.adapter_name = adapter_in_training(model)
        self._factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._block = block_of_states(model, self.settings, self._factors)
        self._reference = adapters_beside(model, self.adapter_name)
        check_origin(self.settings, self._reference)
        self._reset(args)
        length = row_length(model, max_length)
        pairs = load_pairs(forget, retain, processing_class, self.settings, max_length=length)
        adjust_arguments(args, model)
        held_out = load_held_out(options.pop("eval_dataset", None), pairs, processing_class, max_length=length)
        if self.settings.has_goal:
            evaluate_by_default(args, len(pairs))
        samples = {"forget": pairs.forget, "retain": held_out}
        self.evaluations = Evaluations(
            model, self._factors, samples, self.settings, batch_size=args.per_device_eval_batch_size
        )
        if args.eval_strategy != "no":
            self.evaluations.begin()
            options["callbacks"] = [*(options.get("callbacks") or ()), self.evaluations]
        options["eval_dataset"] = held_out
        super().__init__(model, args, collate, pairs, processing_class=processing_class, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over samples, whatever their number of tokens
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "accelerate is configured for FSDP or DeepSpeed, which would shard the adapter in training too; use "
                f"accelerate launch --multi_gpu, and shard the base alone where it must be: {SHARD_ON_LOADING}"
            )

    def train(self, *arguments: Any, **options: Any) -> TrainOutput:
        """Train as ``Trainer.train`` does."""
        self._reset(self.args)
        return super().train(*arguments, **options)

    def _reset(self, args: TrainingArguments) -> None:
        """Drop the sums that an interrupted run left within a step, and begin with the retain weight that was set."""
        self._retain_weight = self.settings.retain_weight
        steps = self.settings.relearning_steps
        self._relearner = None if steps is None else Relearner(steps, args.seed)
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
        weights = {"forget": self.settings.forget_weight, "retain": self._retain_weight}
        weighted = torch.zeros((), device=self.args.device)
        for name, loss in self.settings.losses.items():
            attacker = self._relearner if name == "forget" else None
            with nullcontext() if attacker is None else attacker.on(bare):
                with self.compute_loss_context_manager():
                    loss_inputs = self._loss_inputs(bare, batches, name, loss)
                    total = loss.function(loss_inputs, *self.settings.loss_parameters).sum()
                self._add_gradients(name, total)
            self._totals[name] += float(total.detach())
            weighted += weights[name] * total.detach().to(weighted.device) / samples
        self._totals["samples"] += samples
        if self._relearner is not None:
            with self.compute_loss_context_manager():
                self._relearner.learn(bare, batches["forget"])
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
        if self._relearner is not None:
            losses["relearner_loss"] = self._relearner.step()
        forget, retain = self._sums["forget"], self._sums["retain"]
        weights = self.settings.forget_weight, self._retain_weight
        overflowed = [
            name for name, sums in self._sums.items() if not all(bool(g.isfinite().all()) for g in sums.values())
        ]
        if not overflowed:
            combined = COMBINERS[self.settings.combiner].function(forget, retain, *weights)
            figures = losses | agreement(forget, retain, combined) | self._adjust_weight(losses["retain_loss"])
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

    def _adjust_weight(self, retain_loss: float) -> dict[str, float]:
        """Set the retain weight of the next step, where there is a budget; returns that of this step, to be logged.

        Reference: PDU, arXiv 2506.05314: the weight is the dual variable of "retain loss <= budget". There its step is
        1, as it is here for a retain_weight of 1.
        """
        if self.settings.retain_budget is None:
            return {}
        weight, excess = self._retain_weight, retain_loss - self.settings.retain_budget
        self._retain_weight = max(0.0, weight + self.settings.retain_weight * excess)
        return {"retain_weight": weight}

    def _average(self, scale: float) -> dict[str, float]:
        """Turn the sums into means over all samples of all processes, in place; returns both mean losses."""
        reduced = torch.tensor(list(self._totals.values()), dtype=torch.float64, device=self.args.device)
        distributed.add_up(reduced)
        *totals, samples = reduced.tolist()
        for (name, sums), total in zip(self._sums.items(), totals, strict=True):
            self._check(math.isfinite(total), f"the {name} loss is {total / samples}")
            for key, parameter in self._factors.items():
                gradient = sums.setdefault(key, torch.zeros_like(parameter))
                distributed.add_up(gradient)  # on a sharded base a Trainer has averaged it: their sum is the same
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean cross-entropy of the forget rows and of the held-out retain rows, nats per token, which is logged.

        Raises:
            ConfigError: other rows than those of the constructor are given.
        """
        if eval_dataset is not None:
            raise ConfigError("eval_dataset: expected None, since the constructor takes the rows; give them there")
        metrics = {f"{metric_key_prefix}_{name}_loss": loss for name, loss in self.evaluations.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        assert isinstance(self.train_dataset, Pairs)
        global_batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return PairSampler(self.train_dataset, global_batch, seed, lambda: self.state.global_step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The operations of a micro-batch of both sets, as ``Trainer`` estimates them."""
        return sum(super(UnlearningTrainer, self).floating_point_ops(tensors) for tensors in inputs.values())

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **options)
            if self.args.should_save:
                self.evaluations.save(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, PerTAError) or not is_write_failure(error):
                raise
            reason = str(error).splitlines()[0]
            raise OutputError(
                f"a checkpoint in {self.args.output_dir} could not be written: {reason}; free some space and run this "
                "again, which resumes from the last whole checkpoint"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            directory = output_dir if output_dir is not None else self.args.output_dir
            assert directory is not None
            names = [self.adapter_name]
            self.model.save_pretrained(directory, selected_adapters=names, save_embedding_layers=False)  # type: ignore[operator, union-attr]
            if self.settings.retain_budget is not None:
                (Path(directory) / _RETAIN_WEIGHT_NAME).write_text(json.dumps(self._retain_weight), encoding="utf-8")
            if self._relearner is not None:
                self._relearner.save(Path(directory))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        weights = (directory if self.adapter_name == "default" else directory / self.adapter_name) / _WEIGHTS_NAME
        retain_weight = directory / _RETAIN_WEIGHT_NAME
        needed = {
            weights: True,
            retain_weight: self.settings.retain_budget is not None,
            directory / RELEARNER_NAME: self._relearner is not None,
        }
        missing = next((path.name for path, is_needed in needed.items() if is_needed and not path.is_file()), None)
        if missing is not None:
            raise AdapterError(
                f"{directory} holds no {missing} of adapter {self.adapter_name!r}; expected a checkpoint that "
                "UnlearningTrainer wrote, with the same settings"
            )
        if needed[retain_weight]:
            self._retain_weight = read_json(retain_weight)
        if self._relearner is not None:
            self._relearner.load(directory, self.args.device)
        self.evaluations.load(directory)
        set_peft_model_state_dict(self.model, load_file(weights), adapter_name=self.adapter_name)
