"""One set's sums of a group, in the checkpoint until the other set's sums are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..model import Target, distributed
from .checkpoint import Address, Checkpoint
from .gradient_sums import GradientSums, Place
from .job import Job

_PREFIX = "sums-"


def save_sums(job: Job, set_name: str, sums: Mapping[str, GradientSums]) -> None:
    """Keep one set's sums of a group; without a checkpoint this does nothing.

    Args:
        job: the job.
        set_name: the set.
        sums: layer name -> its sums, for every layer of the group.
    """
    if job.checkpoint is None:
        return
    tensors = {
        (layer, kind, name): total
        for layer, of_layer in sums.items()
        for kind, totals in (("gradients", of_layer.gradients), ("moments", of_layer.moments))
        for name, total in totals.items()
    }
    record = {"layers": list(sums), "samples": next(iter(sums.values())).samples}
    with distributed.failing_together():
        job.checkpoint.save(_entry(set_name), tensors, record)


def load_sums(job: Job, group: Sequence[Target], set_name: str, place: Place) -> dict[str, GradientSums] | None:
    """The sums of this very group that an earlier run kept; None if there are none.

    Of several processes only the main one reads the file, because it also writes and deletes it.
    """
    if job.checkpoint is None:
        return None
    tensors, stored = {}, None
    with distributed.failing_together():
        entry = job.checkpoint.load(_entry(set_name)) if distributed.is_main() else None
        if entry is not None and entry[1]["layers"] == [target.name for target in group]:
            tensors = entry[0]
            described = {address: (total.shape, total.dtype) for address, total in tensors.items()}
            stored = entry[1]["samples"], described
    stored = distributed.from_main(stored)
    if stored is None:
        return None
    samples, described = stored
    by_name = {target.name: target for target in group}
    sums = {name: GradientSums(job.statistic, samples=samples) for name in by_name}
    address: Address
    for address, (shape, dtype) in described.items():
        layer, kind, name = address
        total = tensors[address] if address in tensors else torch.zeros(shape, dtype=dtype)
        if place == "device":
            total = total.to(by_name[layer].A.device)
        distributed.add_up(total)
        totals = sums[layer].gradients if kind == "gradients" else sums[layer].moments
        totals[name] = total
    return sums


def delete_sums(checkpoint: Checkpoint) -> None:
    """Delete the sums of all sets: the results of their group are in the checkpoint."""
    for entry in checkpoint.names():
        if entry.startswith(_PREFIX):
            checkpoint.delete(entry)


def _entry(set_name: str) -> str:
    return f"{_PREFIX}{set_name}"
