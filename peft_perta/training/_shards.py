"""Training on a base that FSDP2 shards: the adapter in training stays whole in every process.

The base is sharded when transformers loads it, and the adapter put on it afterwards. So FSDP2 knows nothing of the
adapter: its gradients are summed as on a whole base, and only the frozen weights are gathered.
"""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import ConfigError
from ..model import distributed

SHARD_ON_LOADING = "load it with load_base(name, device_map='fsdp'), then put the adapters on it"


def check_shards(model: nn.Module, args: TrainingArguments) -> None:
    """Check that a model which is sharded can be trained so.

    Args:
        model: the model, with the adapter in training on it.
        args: the training arguments.

    Raises:
        ConfigError: it was not sharded on loading, or is to write checkpoints.
    """
    distributed.check_sharding(model)
    if not distributed.is_sharded(model):
        return
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        raise ConfigError(
            f"the model was sharded after it was loaded, and a Trainer would wrap it once more; {SHARD_ON_LOADING}"
        )
    strategy = SaveStrategy(args.save_strategy)
    if strategy != SaveStrategy.NO:
        raise ConfigError(
            "a Trainer writes no checkpoint of a model that is sharded on loading; expected no checkpoint_dir, and "
            f"save_strategy 'no', found {strategy.value!r}"
        )
