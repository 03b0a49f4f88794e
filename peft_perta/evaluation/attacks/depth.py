"""Depth: is the knowledge gone from inside the network, or only from its answers?

The states of the unlearned model are put into the full model after each block. What they make the full model forget is
compared with what the states of the retain-only model make it forget: the unlearning depth score (UDS) of
``metrics/depth.py``. The full model's own score is 0, the retain-only model's 1.

Reference: arXiv 2605.24614.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data import Sample, batches
from ...errors import AdapterError, NumericalError
from ...model import input_device, preserved
from ..metrics.depth import depth_score
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, RowValues, Victims, attacked_rows, check_victims
from .states import blocks_of, losses_with, states_and_losses

_NAME = "depth"


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        AdapterError: the full or the retain-only model is not given, or the models have other numbers of blocks.
        UnsupportedLayerError: a model has no decoder blocks.
    """
    check_victims(victims, settings)
    if victims.full is None or victims.retain_only is None:
        missing = "full" if victims.full is None else "retain-only"
        raise AdapterError(
            f"the depth attack: expected the full and the retain-only model, whose states it compares, found no "
            f"{missing} model; give it, or leave the attack out"
        )
    counts = {role: len(blocks_of(subject, _NAME)) for role, subject in victims.subjects()}
    if len(set(counts.values())) > 1:
        raise AdapterError(f"the depth attack: expected models of as many blocks each, found {counts}")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """'uds' over all blocks, and over the lower and the upper half: the mean over the rows that a block there carries.
    A part of the network that carries no row is skipped."""
    full, retain_only = victims.full, victims.retain_only
    assert full is not None and retain_only is not None  # noqa: PT018
    samples = full.encode(attacked_rows(victims, settings), _NAME)
    known = victims.known(_NAME, "retain-only").get("all blocks")
    if known is None:
        carried = patched_falls(full, retain_only, samples, f"{_NAME}, retain-only")
    else:
        blocks = range(1, len(blocks_of(full, _NAME)) + 1)
        carried = torch.tensor([known.values[fall_after(block)] for block in blocks], dtype=torch.float64).T
    gone = patched_falls(full, victims.unlearned, samples, f"{_NAME}, unlearned")
    half = carried.shape[1] // 2
    parts = {"all blocks": slice(None), "lower half": slice(half), "upper half": slice(half, None)}
    results = [_result(setting, carried[:, part], gone[:, part]) for setting, part in parts.items()]
    return [replace(results[0], rows=_with_blocks(results[0].rows, carried, gone)), *results[1:]]


ATTACK = Attack(_NAME, "Put the unlearned model's inner states into the full model: does it still know?", check, run)


def patched_falls(full: Subject, source: Subject, samples: list[Sample], name: str) -> Tensor:
    """[N, L], float64 on the CPU: by how much the full model's loss grows, nats per token, when its states after block
    l are the source's, wherever a token of the completion is predicted.

    Args:
        full: the model that is patched.
        source: the model whose states are put in: another model, or the same with other adapters on.
        samples: N samples.
        name: of the progress bar, and in messages.

    Raises:
        NumericalError: a loss is not finite.
    """
    blocks, blocks_of_source = blocks_of(full, _NAME), blocks_of(source, _NAME)
    rows = torch.empty(len(samples), len(blocks), dtype=torch.float64)
    bar = tqdm(total=len(samples), desc=name, unit="row", disable=not full.show_progress_bar, leave=False)
    with bar, torch.no_grad():
        for batch in batches(samples, full.batch_size):
            with preserved(source.model, source.adapters):
                states, _ = states_and_losses(source.model, blocks_of_source, batch.to(input_device(source.model)))
            with preserved(full.model, full.adapters):
                own = batch.to(input_device(full.model))
                _, before = states_and_losses(full.model, [], own)
                for place, (block, state) in enumerate(zip(blocks, states, strict=True)):
                    after = losses_with(full.model, block, state, own)
                    rows[batch.indices, place] = (after - before).double().cpu()
            bar.update(len(batch.indices))
    if not rows.isfinite().all():
        raise NumericalError(f"{name}: a loss is not finite; evaluate in float32 or bfloat16")
    return rows


def _with_blocks(rows: Mapping[str, RowValues], carried: Tensor, gone: Tensor) -> dict[str, RowValues]:
    """The rows' values, and what the states after each block make the full model forget."""
    falls = {"unlearned": gone, "retain-only": carried}
    return {
        role: {**values, **{fall_after(block): column.tolist() for block, column in enumerate(falls[role].T, start=1)}}
        if role in falls
        else values
        for role, values in rows.items()
    }


def fall_after(block: int) -> str:
    """The measure 'nats per token that the full model forgets with the states after this block', counted from 1."""
    return f"fall after block {block}"


def _result(setting: str, carried: Tensor, gone: Tensor) -> AttackResult:
    scores = depth_score(carried, gone)
    if scores.isnan().all():
        reason = f"no block of the {setting} carries a row: the full and the retain-only model know the same there"
        return AttackResult(_NAME, setting, {}, None, None, skipped=reason)
    found = scores[~scores.isnan()].tolist()
    rows = {
        "unlearned": {"uds": found},
        "full": {"uds": [0.0] * len(found)},
        "retain-only": {"uds": [1.0] * len(found)},
    }
    return AttackResult(_NAME, setting, {"uds": float(scores.nanmean())}, {"uds": 0.0}, {"uds": 1.0}, rows=rows)
