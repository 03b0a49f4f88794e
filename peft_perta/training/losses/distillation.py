"""Losses that teach the model another next-token distribution, over the whole vocabulary. Each is bounded below."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs, per_token


def kl(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t KL(pi_ref || pi), nats, [N]: predict what the reference model predicts, right or wrong."""
    return _divergence(inputs[ForwardPass.MODEL], inputs[ForwardPass.REFERENCE])


def origin_kl(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t KL(pi_origin || pi), nats, [N]: be as ignorant as the model that never saw the forget rows.

    It is of use where the task adapter taught the forget rows; where the base knows them itself, it is no teacher.

    Reference: the teacher of Chundawat et al. 2022, arXiv 2205.08096, is a random model; here it is the origin.
    """
    return _divergence(inputs[ForwardPass.MODEL], inputs[ForwardPass.ORIGIN])


def undial(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t CE(pi, softmax(z_ref - beta onehot(right))), [N], z_ref the logits of the reference model.

    It is least where the model predicts as the reference model would with the right token's logit lower by beta.

    Reference: UNDIAL, Dong et al. 2024, arXiv 2402.10052.
    """
    own, reference = inputs[ForwardPass.MODEL], inputs[ForwardPass.REFERENCE]

    def values(logits: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        right = tokens.unsqueeze(1)
        lowered = teacher.scatter(1, right, teacher.gather(1, right) - beta)
        return _cross_entropy(logits, lowered.softmax(1))

    return own.mean_over_tokens(per_token(values, own.logits, reference.logits, own.tokens))


def ce_u(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t CE(pi, softmax(z with z_right = -inf)), [N], over all completion tokens but the first.

    The teacher is the model's own distribution without the right token, and has no gradient: the more of the
    probability lies on the right token, the larger the step. The only token of a completion is not left out.

    Reference: CE-U, Yang 2025, arXiv 2503.01224.
    """
    own = inputs[ForwardPass.MODEL]
    return own.mean_over_tokens(per_token(_without_the_right_token, own.logits, own.tokens), without_first=True)


def _without_the_right_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return _cross_entropy(logits, logits.detach().scatter(1, tokens.unsqueeze(1), -math.inf).softmax(1))


def _divergence(own: LossInputs, teacher: LossInputs) -> Tensor:
    """mean_t KL(teacher || own), nats: [N]."""

    def values(logits: Tensor, of_teacher: Tensor) -> Tensor:
        logs = of_teacher.log_softmax(1)
        p = logs.exp()
        return (p * (logs - logits.log_softmax(1)).masked_fill(p == 0, 0.0)).sum(1)  # 0 log 0 is 0

    return own.mean_over_tokens(per_token(values, own.logits, teacher.logits))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_v target(v) log pi(v), nats: [K]."""
    return -(target * logits.log_softmax(1).masked_fill(target == 0, 0.0)).sum(1)


KL = Loss(
    "kl",
    "stay close to the reference model's next-token distributions (KL divergence)",
    kl,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
)
ORIGIN_KL = Loss(
    "origin-kl",
    "come close to the origin's next-token distributions: it never saw what the task adapter taught",
    origin_kl,
    (ForwardPass.MODEL, ForwardPass.ORIGIN),
)
UNDIAL = Loss(
    "undial",
    "learn the reference model's distribution with the right token's logit lowered by beta; bounded",
    undial,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
    beta=10.0,
)
CE_U = Loss(
    "ce-u", "learn the model's own distribution without the right token, from the second token on; bounded", ce_u
)
