"""Training: the forget adapter, and unlearning by training, with its losses and combiners of gradients.

The trainers are thin: TRL's SFTTrainer for the forget adapter, a subclass of transformers' Trainer for unlearning.

Imports from: errors, data, model, gradients, evaluation, adapters.
"""

from .combiners import COMBINERS
from .forget_adapter import train_forget_adapter
from .losses import FORGET_LOSSES, RETAIN_LOSSES, ForwardPass
from .new_adapter import default_lora_config, with_new_adapter
from .reports import check_reporter, reports_beside
from .settings import LoraSettings, UnlearningSettings
from .trainer import UnlearningTrainer
from .unlearning_adapter import evaluation_arguments, train_unlearning

__all__ = [
    "COMBINERS",
    "FORGET_LOSSES",
    "RETAIN_LOSSES",
    "ForwardPass",
    "LoraSettings",
    "UnlearningSettings",
    "UnlearningTrainer",
    "check_reporter",
    "default_lora_config",
    "evaluation_arguments",
    "reports_beside",
    "train_forget_adapter",
    "train_unlearning",
    "with_new_adapter",
]
