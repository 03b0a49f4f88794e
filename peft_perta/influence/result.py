"""The result of an influence edit: the change of an adapter's factors, and the adapters that can be emitted from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters import (
    EmittedAdapter,
    InfluenceProvenance,
    Product,
    build_adapter,
    check_servable,
    dtype_name,
    factorize,
    servable_rank,
)
from ..model import Target


@dataclass(frozen=True)
class InfluenceResult:
    """The change of an adapter that an influence edit solved for.

    Attributes:
        changes: target name -> (dA [R, I], dB [O, R]).
        provenance: the record of the edit; ``str`` of it is one line.
    """

    changes: Mapping[str, tuple[Tensor, Tensor]]
    provenance: InfluenceProvenance
    _model: nn.Module = dataclasses.field(repr=False)
    _targets: list[Target] = dataclasses.field(repr=False)

    def edited(self, dtype: torch.dtype = torch.float32) -> EmittedAdapter:
        """The edited adapter s (B + dB) (A + dA), at the original's rank. It replaces the original.

        Args:
            dtype: of the emitted factors.
        """
        edits = {}
        for target in self._targets:
            dA, dB = self.changes[target.name]
            edits[target.name] = Product(B=target.scaling * (target.B + dB), A=target.A + dA)
        return self._emit("edited", edits, dtype)

    def difference(self, dtype: torch.dtype = torch.float32) -> EmittedAdapter:
        """The edited adapter minus the original, exactly, at twice the original's rank. It is stacked on the original.

        s [(B + dB) (A + dA) - B A] = s [(B + dB) dA + dB A] = s [B + dB, dB] [dA; A]

        Args:
            dtype: of the emitted factors.

        Raises:
            ConfigError: twice the rank is above what servers accept.
        """
        check_difference(self._targets)
        edits = {}
        for target in self._targets:
            dA, dB = self.changes[target.name]
            B = torch.cat([target.B + dB, dB], dim=1)
            edits[target.name] = Product(B=target.scaling * B, A=torch.cat([dA, target.A]))
        return self._emit("difference", edits, dtype)

    def _emit(
        self, form: Literal["edited", "difference"], edits: Mapping[str, Product], dtype: torch.dtype
    ) -> EmittedAdapter:
        factors = {name: factorize(edit, len(edit.A)) for name, edit in edits.items()}
        rank = servable_rank(max(target_factors.rank for target_factors in factors.values()))
        lora_config, state_dict = build_adapter(self._model, factors, rank, dtype)
        provenance = dataclasses.replace(self.provenance, form=form, rank=rank, dtype=dtype_name(dtype))
        return EmittedAdapter(lora_config, state_dict, provenance)


def check_difference(targets: Sequence[Target]) -> None:
    """Refuse an adapter whose difference adapter would have too large a rank for any server.

    Raises:
        ConfigError: twice the adapter's rank is above what servers accept.
    """
    check_servable(
        2 * max(target.rank for target in targets),
        "the difference adapter would need rank",
        "emit the edited adapter, which keeps the original's rank",
    )
