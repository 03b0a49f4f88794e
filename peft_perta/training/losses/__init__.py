"""The losses of unlearning: pure functions of logits, labels and hidden states, one value per sample.

To add one: a file here with a ``Loss``, a row in ``FORGET_LOSSES`` or ``RETAIN_LOSSES``, a row in ``tests/tables.py``.
"""

from .ascent import GRADIENT_ASCENT
from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs
from .preference import DPO, NPO, SIMNPO
from .representation import EMBED_DIFF, RMU
from .retaining import KL, NLL

FORGET_LOSSES: dict[str, Loss] = {loss.name: loss for loss in (GRADIENT_ASCENT, NPO, SIMNPO, DPO, RMU)}
RETAIN_LOSSES: dict[str, Loss] = {loss.name: loss for loss in (NLL, KL, EMBED_DIFF)}

__all__ = ["FORGET_LOSSES", "RETAIN_LOSSES", "ForwardPass", "Loss", "LossInputs"]
