"""A LoRA GGUF, as llama.cpp reads it (``--lora``), by the package ``gguf`` and its own map of tensor names.

Reference:
    The keys: github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import AdapterError, ConfigError
from ...model import find_gguf, read_gguf_layout
from .format import Factored, Served, check_architecture

ADAPTER_NAME = "adapter.gguf"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp keeps a model of one type of transformers.

    Attributes:
        name: of the architecture in GGUF files.
        permuted: rows of queries and keys are stored with the two halves of each head interleaved.
    """

    name: str
    permuted: bool


# Each was held against llama.cpp's own answers (tests/test_export_runtimes.py).
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", permuted=False),
    "qwen3": Architecture("qwen3", permuted=False),
}


class Gguf:
    """For llama.cpp, and whatever is built on it."""

    name = "gguf"
    description = "a LoRA GGUF, for llama.cpp (--lora) and what is built on it"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse an architecture that was not tested, and a machine without the package gguf."""
        check_architecture("llama.cpp", model, tuple(ARCHITECTURES))
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("export to GGUF: expected the package gguf, found none; run: pip install gguf")
        file, architecture = find_gguf(base), ARCHITECTURES[model.config.model_type]
        if file is not None and read_gguf_layout(file).architecture != architecture.name:
            found = read_gguf_layout(file).architecture
            raise ConfigError(
                f"{file}: expected the architecture {architecture.name}, found {found}; name another base"
            )

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write ``adapter.gguf``."""
        write_lora(served, directory / ADAPTER_NAME)
        adapter = output / ADAPTER_NAME
        base = find_gguf(served.base) or "BASE.gguf"
        start = f"llama-server -m {shlex.quote(str(base))}"
        return [
            f"{start} --lora {shlex.quote(str(adapter))}",
            f"{start} --lora-scaled {shlex.quote(f'{adapter}:0.5')}",
        ]


def write_lora(served: Served, file: Path) -> None:
    """Write the adapter as a LoRA GGUF. Its alpha is its rank, so llama.cpp's scale alpha / rank is 1.

    Raises:
        AdapterError: a layer has no tensor in the base's GGUF, or one of another shape.
    """
    gguf: Any = importlib.import_module("gguf")
    architecture = ARCHITECTURES[served.model.config.model_type]
    names = _tensor_names(served, architecture, gguf)
    writer = gguf.GGUFWriter(file, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(served.rank))
        for layer in served.layers():
            B = _permuted(layer, served.model.config) if architecture.permuted else layer.B
            _add(writer, f"{names[layer.path]}.lora_a", layer.A, gguf)
            _add(writer, f"{names[layer.path]}.lora_b", B, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def weight_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The weights of a base of a tested architecture, by their names in a GGUF -> their shapes."""
    gguf: Any = importlib.import_module("gguf")
    names = _name_map(ARCHITECTURES[model.config.model_type], model.config.num_hidden_layers, gguf)
    shapes = {path: tuple(value.shape) for path, value in model.named_parameters()}
    named = {names.get_name(path, try_suffixes=(".weight",)): shape for path, shape in shapes.items()}
    return {name: shape for name, shape in named.items() if name is not None}


def _name_map(architecture: Architecture, blocks: int, gguf: Any) -> Any:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    return gguf.get_tensor_name_map(kind, blocks)


def _tensor_names(served: Served, architecture: Architecture, gguf: Any) -> dict[str, str]:
    """The path of each layer -> the name of its weight in the base's GGUF."""
    names = _name_map(architecture, served.model.config.num_hidden_layers, gguf)
    file = find_gguf(served.base)
    shapes = read_gguf_layout(file).shapes if file is not None else None
    found = {}
    for layer in served.layers():
        name = names.get_name(f"{layer.path}.weight", try_suffixes=(".weight",))
        if name is None or (name == "output.weight" and served.model.config.tie_word_embeddings):
            raise AdapterError(
                f"{layer.path} has no tensor of its own in a GGUF of the architecture {architecture.name}; merge the "
                "adapter into the base, and convert that"
            )
        if shapes is not None:
            _check_shape(name, layer, shapes, served.base)
        found[layer.path] = name
    return found


def _check_shape(name: str, layer: Factored, shapes: Mapping[str, tuple[int, ...]], base: str) -> None:
    expected = (len(layer.B), layer.A.shape[1])
    if shapes.get(name) != expected:
        found = f"one of shape {shapes[name]}" if name in shapes else "none"
        raise AdapterError(
            f"{base}: expected a tensor {name} of shape {expected} for {layer.path}, found {found}; name the GGUF of "
            "the base that the adapter was made on"
        )


def _permuted(layer: Factored, config: Any) -> Tensor:
    """B [O, R] with its rows as llama.cpp keeps those of queries and keys: x0 x1 .. y0 y1 .. -> x0 y0 x1 y1 .."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(layer.path.rpartition(".")[2])
    if count is None:
        return layer.B
    rows, rank = layer.B.shape
    return layer.B.reshape(count, 2, rows // count // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _add(writer: Any, name: str, value: Tensor, gguf: Any) -> None:
    if value.dtype == torch.bfloat16:  # NumPy has no such type
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, value.contiguous().numpy())
