"""Training to a target: it stops as soon as the forget rows' loss is there, and keeps the path."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import Sample
from ..evaluation import check_start, losses_of
from ..model import distributed
from ._pairs import Pairs
from .settings import UnlearningSettings

_LOGGED = {"forget": "checked_forget_loss", "retain": "checked_retain_loss"}  # in the state's log history


class TargetCheck(TrainerCallback):
    """Stops training at the first check at which the mean forget loss is at least the target.

    A check measures the cross-entropy of the forget rows and of the first retain rows, as many as there are forget
    rows, in eval mode. Its points stand in the trainer's log history, which a checkpoint holds. No checkpoint is
    written where training stops: a run that resumed from there would go on.

    Args:
        model: the model in training.
        pairs: both sets.
        settings: with a ``target_forget_loss``, and maybe ``check_steps``.
        args: the training arguments.

    Raises:
        NumericalError: the forget loss is above the target at the start.
    """

    def __init__(self, model: PeftModel, pairs: Pairs, settings: UnlearningSettings, args: TrainingArguments) -> None:
        assert settings.target_forget_loss is not None
        self.target = settings.target_forget_loss
        self._model = model
        self._samples = {"forget": pairs.forget, "retain": pairs.retain[: len(pairs.forget)]}
        self._batch_size = args.per_device_train_batch_size
        global_batch = self._batch_size * args.gradient_accumulation_steps * args.world_size
        self._steps = settings.check_steps or max(1, len(pairs) // global_batch // 4)
        self.points: list[dict[str, Any]] = [self._measured(0)]
        check_start(self.points[0]["forget"], self.target)

    @property
    def reached(self) -> bool:
        """Whether the last check met the target."""
        return self.points[-1]["forget"] >= self.target

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the points of the run that is resumed."""
        earlier = [entry for entry in state.log_history if _LOGGED["forget"] in entry]
        of_run = [{"step": entry["step"]} | {name: entry[key] for name, key in _LOGGED.items()} for entry in earlier]
        self.points[1:] = of_run

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check, if it is time or the last step, and stop at the target."""
        if state.global_step % self._steps and state.global_step < state.max_steps:
            return
        point = self._measured(state.global_step)
        self.points.append(point)
        state.log_history.append({"step": point["step"]} | {key: point[name] for name, key in _LOGGED.items()})
        if self.reached:
            control.should_training_stop, control.should_save = True, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write no checkpoint of the step at which training stopped."""
        control.should_save = control.should_save and not self.reached

    def _measured(self, step: int) -> dict[str, Any]:
        return {"step": step} | {name: self._mean_loss(samples) for name, samples in self._samples.items()}

    def _mean_loss(self, samples: list[Sample]) -> float:
        """The mean over samples of all processes, which thus stop together."""
        share = distributed.share(samples)
        total = torch.zeros((), dtype=torch.float64)
        if share:
            total += losses_of(self._model, share, batch_size=self._batch_size).double().sum()
        distributed.add_up(total)
        return float(total) / len(samples)
