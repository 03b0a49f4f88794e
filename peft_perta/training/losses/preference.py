"""Losses that treat the forget set as answers that are not preferred. Each is bounded from below.

softplus(z) = log(1 + e^z) = -log sigmoid(-z).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import softplus

from .loss import OWN, REFERENCE, REFUSAL, REFUSAL_REFERENCE
from .loss_inputs import LossInputs


def npo(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """2/beta log(1 + (pi / pi_ref)^beta), [N], pi the probability of the whole completion; margin has no say.

    As beta goes to 0 its gradient becomes that of gradient ascent on the summed log-probability.

    Reference: Zhang et al. 2024, arXiv 2404.05868, eq. 3.
    """
    return 2 / beta * softplus(beta * _gained(readings[OWN], readings[REFERENCE]))


def simnpo(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """2/beta log(1 + exp(-beta (mean_t NLL - margin))), [N]: no reference, and long completions count as short ones.

    The paper writes its margin as gamma = beta * margin; 0 there and here by default.

    Reference: Fan et al. 2024, arXiv 2410.07163.
    """
    return 2 / beta * softplus(-beta * (readings[OWN].mean_losses() - margin))


def dpo(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """-2/beta log sigmoid(beta (log pi/pi_ref (refusal) - log pi/pi_ref (answer))), [N]; margin has no say.

    The factor 2/beta makes it NPO where the refusal's ratio is 1.

    Reference: Rafailov et al. 2023, arXiv 2305.18290, with refusals preferred as in TOFU (arXiv 2401.06121).
    """
    preferred = _gained(readings[REFUSAL], readings[REFUSAL_REFERENCE])
    return 2 / beta * softplus(-beta * (preferred - _gained(readings[OWN], readings[REFERENCE])))


def _gained(own: LossInputs, reference: LossInputs) -> Tensor:
    return own.log_probabilities() - reference.log_probabilities()
