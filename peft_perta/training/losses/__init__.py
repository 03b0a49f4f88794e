"""What is descended on the forget set, and on the retain set: pure functions of readings, one value a sample.

To add one: a function under the contract of ``loss.py`` in a file beside this one, and a row here.
"""

from .ascent import gradient_ascent
from .keeping import kl, nll
from .loss import OWN, REFERENCE, REFUSAL, REFUSAL_REFERENCE, Loss
from .loss_inputs import LossInputs
from .preference import dpo, npo, simnpo
from .representation import kept_states, rmu

FORGET_LOSSES: dict[str, Loss] = {
    "gradient-ascent": Loss("minus the loss", gradient_ascent),
    "npo": Loss("negative preference optimisation", npo, (OWN, REFERENCE), beta=0.1),
    "simnpo": Loss("the same without a reference, per token", simnpo, beta=2.5, margin=0.0),
    "dpo": Loss("refusals preferred to the answers", dpo, (OWN, REFERENCE, REFUSAL, REFUSAL_REFERENCE), beta=0.1),
    "rmu": Loss("hidden states steered to a random one", rmu, (OWN, REFERENCE), beta=5.0, needs_states=True),
}


RETAIN_LOSSES: dict[str, Loss] = {
    "nll": Loss("the loss", nll),
    "kl": Loss("the divergence from the reference model", kl, (OWN, REFERENCE)),
    "embed-diff": Loss("the distance from its hidden states", kept_states, (OWN, REFERENCE), needs_states=True),
}


__all__ = ["FORGET_LOSSES", "OWN", "REFERENCE", "REFUSAL", "REFUSAL_REFERENCE", "RETAIN_LOSSES", "Loss", "LossInputs"]
