"""The losses of unlearning: pure functions of logits, labels and hidden states, one value per sample.

To add one: a file here with a ``Loss``, a row in ``FORGET_LOSSES`` or ``RETAIN_LOSSES``, a row in ``tests/tables.py``.
"""

from .distillation import CE_U, KL, ORIGIN_KL, UNDIAL
from .likelihood import GRADIENT_ASCENT, IHL, NLL, SATIMP, WGA
from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs
from .preference import DPO, NPO, SIMNPO
from .representation import EMBED_DIFF, RMU

FORGET_LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (GRADIENT_ASCENT, NPO, SIMNPO, DPO, RMU, WGA, SATIMP, IHL, UNDIAL, CE_U, ORIGIN_KL)
}
RETAIN_LOSSES: dict[str, Loss] = {loss.name: loss for loss in (NLL, KL, EMBED_DIFF)}

__all__ = ["FORGET_LOSSES", "RETAIN_LOSSES", "ForwardPass", "Loss", "LossInputs"]
