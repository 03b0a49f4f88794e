"""An attacker in training: an adapter that learns the forget rows again while they are being unlearned.

What is only hidden comes back in a few steps of training. So the forget gradient is taken with an attacker's adapter
on, which has had some of these steps already; what it brings back is unlearned too. The attacker begins anew every so
many steps, so that the adapter in training meets attackers of every age, and none at first.

Reference: adversarial training against relearning, as in Tamirisa et al. 2024 (TAR), arXiv 2408.00761; the gradient is
of first order there too. Here the attacker takes its steps between those of the adapter in training, so that it costs
one forward and backward pass over the forget rows a step, however many steps it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Batch
from ..evaluation import fresh_adapter, with_factors
from ..model import distributed, preserved, sample_losses

RELEARNER_NAME = "relearner.pt"  # in a checkpoint
LEARNING_RATE = 4e-3


class Relearner:
    """The attacker's adapter, LoRA on every linear layer, and its AdamW.

    Args:
        steps: begins anew after so many.
        seed: draws the fresh adapters.
    """

    def __init__(self, steps: int, seed: int) -> None:
        self._steps, self._seed = steps, seed
        self._taken = 0  # steps, of all its adapters
        self._factors: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._total, self._samples = 0.0, 0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block, the attacker's adapter is on, whichever other adapters are. It gets no gradient from the
        losses of the block."""
        if self._optimizer is None:
            with fresh_adapter(model, self._seed + self._taken) as factors:
                self._begin(factors)
        with with_factors(model, [factor.detach() for factor in self._factors]):
            yield

    def learn(self, model: nn.Module, batch: Batch) -> None:
        """Add the gradient of the rows' loss to that of the next step; the model itself gets none."""
        with preserved(model, checkpointing=True), with_factors(model, self._factors), torch.enable_grad():
            total = sample_losses(model, batch).sum()
            total.backward()
        self._total += float(total.detach())
        self._samples += len(batch.labels)

    def step(self) -> float:
        """Take a step on the mean over all rows of all processes since the last one; returns their mean loss, nats per
        token, which is not finite where no step was taken."""
        assert self._optimizer is not None
        reduced = torch.tensor([self._total, self._samples], dtype=torch.float64, device=self._factors[0].device)
        distributed.add_up(reduced)
        total, samples = reduced.tolist()
        for factor in self._factors:
            assert factor.grad is not None
            distributed.add_up(factor.grad)
            factor.grad.div_(samples)
        if math.isfinite(total):
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._total, self._samples = 0.0, 0
        self._taken += 1
        if self._taken % self._steps == 0:
            self._optimizer = None
        return total / samples

    def save(self, directory: Path) -> None:
        """Write what a resumed run needs into a checkpoint."""
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else None
        torch.save(
            {"taken": self._taken, "factors": [factor.detach() for factor in self._factors], "optimizer": optimizer},
            directory / RELEARNER_NAME,
        )

    def load(self, directory: Path, device: torch.device) -> None:
        """Read it back."""
        state = torch.load(directory / RELEARNER_NAME, map_location=device, weights_only=True)
        self._taken = state["taken"]
        if state["optimizer"] is not None:
            self._begin([factor.requires_grad_() for factor in state["factors"]])
            assert self._optimizer is not None
            self._optimizer.load_state_dict(state["optimizer"])

    def _begin(self, factors: list[Tensor]) -> None:
        self._factors = factors
        self._optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
