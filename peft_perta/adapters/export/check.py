"""Check the files of an export: as they were written, readable, finite, and of the base's names and shapes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...data import read_json
from ...errors import ConfigError
from ...model import find_gguf, hash_file, load_skeleton, read_gguf_layout
from .gguf import ADAPTER_NAME, ARCHITECTURES, weight_shapes
from .merged_gguf import MODEL_NAME
from .run import EXPORT_NAME

Finding = tuple[str, bool, str]  # what is checked, whether it passes, what was found

_SHAPES = "names and shapes as the base's"
_MLX_WEIGHTS = "adapters.safetensors"


def check_export(directory: Path, base: str | None, revision: str | None) -> Iterator[Finding]:
    """Check a directory that ``export_adapters`` wrote.

    Args:
        directory: the directory.
        base: the base model, as a directory, a GGUF file or a hub name; names and shapes are compared with it.
        revision: revision of a hub model.
    """
    try:
        files = dict(read_json(directory / EXPORT_NAME)["files"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield "export record", False, f"{EXPORT_NAME} is damaged ({error}); export the adapter again"
        return
    yield "export record", True, f"{EXPORT_NAME} is readable"
    for name, expected in files.items():
        there = (directory / name).is_file()
        same = there and hash_file(directory / name) == expected
        yield f"hash of {name}", same, "as written" if same else "changed since" if there else "the file is missing"
    if MODEL_NAME in files:
        yield from _merged_model(directory / MODEL_NAME, base, revision)
    factors: dict[str, Any] = {}
    if ADAPTER_NAME in files:
        yield from _gguf_head(directory / ADAPTER_NAME, factors)
    elif _MLX_WEIGHTS in files:
        yield from _mlx_tensors(directory / _MLX_WEIGHTS, factors)
    if not factors:
        return
    infinite = next((name for name, value in factors.items() if not np.isfinite(value).all()), None)
    yield "finite", infinite is None, infinite or "every value"
    if base is not None:
        yield _against_base(factors, ADAPTER_NAME in files, base, revision)


def _merged_model(file: Path, base: str | None, revision: str | None) -> Iterator[Finding]:
    try:
        layout = read_gguf_layout(file)
    except (OSError, ConfigError) as error:
        yield "GGUF header", False, f"cannot be read ({error})"
        return
    yield "GGUF header", True, f"a model of {layout.architecture}"
    model = load_skeleton(base, revision=revision) if base is not None else None
    if model is None or model.config.model_type not in ARCHITECTURES:  # whose names in a GGUF were not tested
        return
    expected = weight_shapes(model)
    wrong = next((name for name, shape in expected.items() if layout.shapes.get(name) != shape), None)
    other = f"{wrong}: {layout.shapes.get(wrong)}, the base has {expected[wrong]}" if wrong else ""
    yield _SHAPES, not other, other or f"{len(expected)} weights"


def _gguf_head(file: Path, factors: dict[str, Any]) -> Iterator[Finding]:
    gguf: Any = importlib.import_module("gguf")
    try:
        reader = gguf.GGUFReader(file)
        kinds = [reader.get_field(key).contents() for key in ("general.type", "adapter.type")]
        alpha = reader.get_field("adapter.lora.alpha").contents()
        architecture = reader.get_field("general.architecture").contents()
        for tensor in reader.tensors:
            factors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (OSError, ValueError, AttributeError, LookupError) as error:  # a reader that checks nothing
        yield "GGUF header", False, f"cannot be read ({error})"
        return
    yield "GGUF header", kinds == ["adapter", "lora"], f"{' '.join(kinds)} of {architecture}, alpha {alpha:g}"


def _mlx_tensors(file: Path, factors: dict[str, Any]) -> Iterator[Finding]:
    try:
        loaded = load_file(file)
    except (OSError, SafetensorError) as error:
        yield "mlx-lm: tensors", False, f"cannot be read ({error})"
        return
    for name, value in loaded.items():
        factors[name] = value.T.float().numpy()
    yield "mlx-lm: tensors", True, f"{len(loaded)} tensors"


def _against_base(factors: dict[str, Any], is_gguf: bool, base: str, revision: str | None) -> Finding:
    """Whether each pair of factors has a weight of its shape in the base."""
    file = find_gguf(base)
    if is_gguf and file is not None:
        shapes = dict(read_gguf_layout(file).shapes)
    else:
        model = load_skeleton(base, revision=revision)
        paths = {path.removesuffix(".weight"): tuple(value.shape) for path, value in model.named_parameters()}
        shapes = weight_shapes(model) if is_gguf else paths
    for name, value in factors.items():
        if not name.endswith(".lora_a"):
            continue
        weight = name.removesuffix(".lora_a")
        B = factors.get(f"{weight}.lora_b")
        found = (len(B), value.shape[1]) if B is not None and B.shape[1] == len(value) else None
        if found is None or shapes.get(weight) != found:
            return _SHAPES, False, f"{weight}: {found}, the base has {shapes.get(weight)}"
    return _SHAPES, True, f"{len(factors) // 2} layers"
