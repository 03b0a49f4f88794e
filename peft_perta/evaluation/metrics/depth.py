"""How deep in the network knowledge was unlearned."""

from __future__ import annotations

from torch import Tensor

LEAST_FALL = 0.05  # nats per token


def depth_score(carried: Tensor, gone: Tensor) -> Tensor:
    """The unlearning depth score of N rows: [N], 0 (all still there) to 1 (as deep as never learned).

    UDS = sum_l carried_l clip(gone_l / carried_l, 0, 1) / sum_l carried_l, over the blocks with carried_l > 0.05. It is
    NaN for a row that no block carries.

    Args:
        carried: [N, L], the fall of the mean log-probability of a row's answer under the full model, nats per token,
            when the states after block l are those of the retain-only model.
        gone: [N, L], the same with the states of the unlearned model.

    Reference: arXiv 2605.24614.
    """
    counts = carried > LEAST_FALL
    replaced = gone.clamp_min(0).minimum(carried)  # carried * clip(gone / carried, 0, 1)
    return replaced.where(counts, 0).sum(1) / carried.where(counts, 0).sum(1)
