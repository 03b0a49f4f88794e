"""Evaluation while an adapter trains: both losses, their path, and where training stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import Sample
from ..errors import AdapterError, NumericalError
from ..evaluation import check_start, losses_of
from ..model import distributed
from ._training_arguments import global_batch
from .settings import UnlearningSettings

_METRICS = {"forget": "eval_forget_loss", "retain": "eval_retain_loss"}  # in the log history
_WITHIN_NAME = "within_tolerance.safetensors"  # in a checkpoint: the factors at the last evaluation
_PER_EPOCH = 4


class Evaluations(TrainerCallback):
    """The path of both losses, and the stop at a goal.

    An evaluation measures the mean cross-entropy of the forget rows and of held-out retain rows, in eval mode. Training
    stops at the first one at which the forget loss is at least the target, or the retain loss has risen by more than
    the tolerance; the adapter is then given the factors that it had at the evaluation before. The path stands in the
    trainer's log history, which a checkpoint holds. No checkpoint is written where training stops: a run that resumed
    from there would go on.

    Args:
        model: the model in training.
        factors: name -> the parameters in training.
        samples: 'forget' and 'retain', the samples to measure.
        settings: with a ``target_forget_loss`` or a ``retain_tolerance``, or neither.
        batch_size: samples per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, nn.Parameter],
        samples: dict[str, list[Sample]],
        settings: UnlearningSettings,
        batch_size: int,
    ) -> None:
        self._model, self._factors, self._samples, self._batch_size = model, factors, samples, batch_size
        self._target, self._tolerance = settings.target_forget_loss, settings.retain_tolerance
        self._path: dict[int, dict[str, Any]] = {}  # by step: a resumed run may evaluate one again
        self._within: dict[str, torch.Tensor] = {}
        self._is_training = self._stopped = False

    @property
    def points(self) -> list[dict[str, Any]]:
        """{step, forget, retain} of the start and of every evaluation; empty where nothing is evaluated."""
        return list(self._path.values())

    @property
    def went_back_to(self) -> int | None:
        """The step whose factors the adapter has, if training stopped beyond the tolerance."""
        return self.points[-2]["step"] if self._stopped and self._exceeds(self.points[-1]) else None

    def begin(self) -> None:
        """Measure the start.

        Raises:
            NumericalError: the forget loss is above the target already.
        """
        self._path = {0: {"step": 0, **self.measure()}}
        if self._target is not None:
            check_start(self._path[0]["forget"], self._target)

    def measure(self) -> dict[str, float]:
        """The mean loss of each set, over the samples of all processes, which thus stop together."""
        return {name: self._mean_loss(samples) for name, samples in self._samples.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the path of the run that is resumed."""
        earlier = [entry for entry in state.log_history if _METRICS["forget"] in entry and entry["step"] > 0]
        self._path = {0: self._path[0]} | {int(entry["step"]): _point(int(entry["step"]), entry) for entry in earlier}
        if self._tolerance is not None and earlier and not self._within:
            raise AdapterError(
                f"the checkpoint of step {state.global_step} holds no {_WITHIN_NAME}; expected one of a run with a "
                "retain_tolerance: begin anew"
            )
        if not earlier:
            self._within = {}  # of an earlier call
        self._is_training, self._stopped = True, False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a point to the path; stop at a goal."""
        if not self._is_training or not metrics or state.global_step == 0:
            return
        point = self._path[state.global_step] = _point(state.global_step, metrics)
        if self._exceeds(point):
            self._go_back(point)
        elif self._tolerance is not None:
            self._within = {name: factor.detach().clone() for name, factor in self._factors.items()}
        self._stopped = self._exceeds(point) or (self._target is not None and point["forget"] >= self._target)
        if self._stopped:
            control.should_training_stop, control.should_save = True, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write no checkpoint of the step at which training stopped."""
        control.should_save = control.should_save and not self._stopped

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A later evaluation is the user's own."""
        self._is_training = False

    def save(self, directory: Path) -> None:
        """Write what a resumed run needs beside the path into a checkpoint."""
        if self._within:
            save_file({name: factor.cpu() for name, factor in self._within.items()}, directory / _WITHIN_NAME)

    def load(self, directory: Path) -> None:
        """Read it back."""
        file = directory / _WITHIN_NAME
        self._within = load_file(file) if self._tolerance is not None and file.is_file() else {}

    def _exceeds(self, point: Mapping[str, Any]) -> bool:
        within = self._tolerance is None or point["retain"] - self._path[0]["retain"] <= self._tolerance
        return not within  # a loss that is no number is beyond it

    def _go_back(self, point: Mapping[str, Any]) -> None:
        if not self._within:
            rise = f"{self._path[0]['retain']:.3f} to {point['retain']:.3f}"
            raise NumericalError(
                f"the retain loss rose from {rise} up to step {point['step']}, the first evaluation, by more than the "
                f"retain tolerance {self._tolerance:g}; evaluate more often (eval_steps, --eval-steps), lower the "
                "learning rate, or raise the tolerance"
            )
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(self._within[name])

    def _mean_loss(self, samples: list[Sample]) -> float:
        own, fillers = distributed.share(samples, self._model)
        total = torch.zeros((), dtype=torch.float64)
        if own or fillers:
            losses = losses_of(self._model, [*own, *fillers], batch_size=self._batch_size)
            total += losses[: len(own)].double().sum()
        distributed.add_up(total)
        return float(total) / len(samples)


def _point(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step} | {name: metrics[key] for name, key in _METRICS.items()}


def evaluate_by_default(args: TrainingArguments, samples: int) -> None:
    """Evaluate four times an epoch of so many samples, where the arguments name no strategy."""
    if args.eval_strategy == IntervalStrategy.NO:
        args.eval_strategy = IntervalStrategy.STEPS
        args.eval_steps = max(1, samples // global_batch(args) // _PER_EPOCH)
