"""Training: the forget adapter, and adapters trained to forget, with their losses and combiners.

Imports from: ...
"""

from .combiners import COMBINERS
from .forget_adapter import default_lora_config, train_forget_adapter
from .losses import FORGET_LOSSES, RETAIN_LOSSES
from .losses.loss import REFERENCE
from .settings import UnlearningSettings
from .trainer import UnlearningTrainer
from .unlearning import train_unlearning

__all__ = [
    "COMBINERS",
    "FORGET_LOSSES",
    "REFERENCE",
    "RETAIN_LOSSES",
    "UnlearningSettings",
    "UnlearningTrainer",
    "default_lora_config",
    "train_forget_adapter",
    "train_unlearning",
]
