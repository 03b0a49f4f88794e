"""mlx-lm, by its own loader."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .job import Place, Runtime, Scorer, scores_of


def _mlx(place: Place) -> Scorer:
    mx: Any = importlib.import_module("mlx.core")
    mlx_lm: Any = importlib.import_module("mlx_lm")
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(str(_base(place)), adapter_path=str(place.exported("mlx")))

    def score(ids, start):
        return scores_of(np.array(model(mx.array([ids]))[0].astype(mx.float32)), ids, start)

    return score


def _base(place: Place) -> Path:
    """The base with its rope_theta where mlx-lm looks for it: transformers 5 writes it into rope_parameters alone."""
    directory = place.output / "mlx_base"
    directory.mkdir(exist_ok=True)
    for file in place.base.iterdir():
        (directory / file.name).unlink(missing_ok=True)
        (directory / file.name).symlink_to(file.resolve())
    config = json.loads((place.base / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").unlink()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


RUNTIMES = (Runtime("mlx-lm, one fused", "mlx-lm", "adapters", "float32", _mlx),)
