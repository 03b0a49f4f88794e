"""Preference losses: the forget completions are the answers not to prefer. Each is bounded below.

They are written with softplus(z) = log(1 + e^z) = -log sigmoid(-z).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import softplus

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs


def npo(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """2/beta log(1 + (pi / pi_ref)^beta), [N], pi the probability of the whole completion.

    As beta goes to 0, its gradient becomes that of gradient ascent on the summed log-probability.

    Reference: Zhang et al. 2024, arXiv 2404.05868, eq. 3.
    """
    return 2 / beta * softplus(beta * _log_ratio(inputs[ForwardPass.MODEL], inputs[ForwardPass.REFERENCE]))


def simnpo(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """2/beta log(1 + exp(-beta (mean_t NLL - margin))), [N].

    It needs no reference model, and long completions weigh as much as short ones. The paper writes the margin as
    gamma = beta * margin; 0 is the default there and here.

    Reference: Fan et al. 2024, arXiv 2410.07163.
    """
    return 2 / beta * softplus(-beta * (inputs[ForwardPass.MODEL].mean_losses() - margin))


def dpo(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """-2/beta log sigmoid(beta (log pi/pi_ref (refusal) - log pi/pi_ref (answer))), [N].

    With the factor 2/beta it equals NPO where pi = pi_ref on the refusal.

    Reference: Rafailov et al. 2023, arXiv 2305.18290, with refusals preferred as in TOFU (arXiv 2401.06121).
    """
    answer = _log_ratio(inputs[ForwardPass.MODEL], inputs[ForwardPass.REFERENCE])
    refusal = _log_ratio(inputs[ForwardPass.MODEL_ON_REFUSALS], inputs[ForwardPass.REFERENCE_ON_REFUSALS])
    return 2 / beta * softplus(-beta * (refusal - answer))


def _log_ratio(model: LossInputs, reference: LossInputs) -> Tensor:
    """log pi/pi_ref of each completion, nats: [N]."""
    return model.log_probabilities() - reference.log_probabilities()


NPO = Loss(
    "npo",
    "negative preference optimization: lower the probability below the reference model's (beta: inverse temperature)",
    npo,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
    beta=0.1,
)
SIMNPO = Loss(
    "simnpo",
    "NPO on the mean loss per token, without a reference model; completions whose loss is above the margin weigh less",
    simnpo,
    beta=2.5,
    margin=0.0,
)
DPO = Loss(
    "dpo",
    "direct preference optimization: prefer a refusal to the completion; beta is the inverse temperature",
    dpo,
    (
        ForwardPass.MODEL,
        ForwardPass.REFERENCE,
        ForwardPass.MODEL_ON_REFUSALS,
        ForwardPass.REFERENCE_ON_REFUSALS,
    ),
    beta=0.1,
)
