"""Losses on the probability p_t of the right token, at each token t of the completion."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs, per_token


def nll(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t NLL, [N]: keep training on the retain set."""
    return inputs[ForwardPass.MODEL].mean_losses()


def gradient_ascent(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """-mean_t NLL, [N]. It is unbounded below: a few steps too many ruin the model."""
    return -inputs[ForwardPass.MODEL].mean_losses()


def wga(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """-mean_t p_t^beta NLL, [N], the weight without a gradient: what is forgotten already is pushed no further.

    Reference: weighted gradient ascent, Wang et al. 2025, arXiv 2502.19301.
    """
    return _weighted_ascent(inputs[ForwardPass.MODEL], beta, 0)


def satimp(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """-mean_t p_t^beta (1 - p_t) NLL, [N], the weight without a gradient: saturation times importance.

    The exponent of 1 - p_t is the paper's beta_2, which it sets to 1.

    Reference: Yang et al. 2025, arXiv 2505.11953.
    """
    return _weighted_ascent(inputs[ForwardPass.MODEL], beta, 1)


def ihl(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t 1 + p_t - max_{v != right} p(v), [N], between 0 and 2: the runner-up is to become the first choice.

    It is the paper's inverted hinge max(0, ..), which is never below 0 anyway.

    Reference: LoKU, Cha et al. 2024, arXiv 2408.06621.
    """
    own = inputs[ForwardPass.MODEL]
    return own.mean_over_tokens(per_token(_inverted_hinge, own.logits, own.tokens))


def _weighted_ascent(own: LossInputs, saturation: float, importance: float) -> Tensor:
    def weighted(logits: Tensor, tokens: Tensor) -> Tensor:
        losses = cross_entropy(logits, tokens, reduction="none")
        p = (-losses.detach()).exp()
        return -(p**saturation) * (1 - p) ** importance * losses

    return own.mean_over_tokens(per_token(weighted, own.logits, own.tokens))


def _inverted_hinge(logits: Tensor, tokens: Tensor) -> Tensor:
    right = tokens.unsqueeze(1)
    p = logits.softmax(1)
    return 1 + p.gather(1, right).squeeze(1) - p.scatter(1, right, 0.0).amax(1)


NLL = Loss("nll", "minimise the cross-entropy", nll)
GRADIENT_ASCENT = Loss(
    "gradient-ascent", "maximise the cross-entropy; unbounded, so too many steps ruin the model", gradient_ascent
)
WGA = Loss(
    "wga",
    "gradient ascent that weighs each token by its probability to the power beta (weighted ascent)",
    wga,
    beta=1.0,
)
SATIMP = Loss(
    "satimp", "gradient ascent that weighs each token by p^beta (1 - p): neither the forgotten nor the certain", satimp,
    beta=5.0,
)  # fmt: skip
IHL = Loss("ihl", "inverted hinge loss: make the likeliest other token likelier than the right one; bounded", ihl)
