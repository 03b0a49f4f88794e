"""mlx-lm, by its own loader."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .job import Place, Runtime, Scorer, scores_of


def _mlx(place: Place) -> Scorer:
    mx: Any = importlib.import_module("mlx.core")
    mlx_lm: Any = importlib.import_module("mlx_lm")
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(str(place.base), adapter_path=str(place.exported("mlx")))

    def score(ids, start):
        return scores_of(np.array(model(mx.array([ids]))[0].astype(mx.float32)), ids, start)

    return score


RUNTIMES = (Runtime("mlx-lm, one fused", "mlx-lm", "adapters", "float32", _mlx),)
