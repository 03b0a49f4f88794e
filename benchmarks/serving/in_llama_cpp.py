"""llama.cpp itself, by the bindings ``llama-cpp-python``."""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peft_perta.adapters import EXPORTS, export_adapters

from .job import Place, Runtime, Scorer, scores_of

PACKAGE = "llama-cpp-python"
_CONTEXT = 512


class LlamaCpp:
    """A model with adapters at their scales; its keys and values are kept in float32."""

    def __init__(self, file: Path, adapters: Mapping[Path, float]) -> None:
        self.lib: Any = importlib.import_module("llama_cpp.llama_cpp")
        logging.getLogger(PACKAGE).setLevel(logging.CRITICAL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = _CONTEXT
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = self.lib.GGML_TYPE_F32
        settings.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.lib.llama_init_from_model(self.model, settings)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self._load(adapters)

    def _load(self, adapters: Mapping[Path, float]) -> None:
        loaded = [self.lib.llama_adapter_lora_init(self.model, str(adapter).encode()) for adapter in adapters]
        if not all(loaded):
            raise RuntimeError(f"llama.cpp does not load one of {sorted(map(str, adapters))}")
        pointers = (self.lib.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
        scales = (ctypes.c_float * len(loaded))(*adapters.values())
        if self.lib.llama_set_adapters_lora(self.context, pointers, len(loaded), scales):
            raise RuntimeError("llama.cpp does not take the adapters")

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits [T, V] at every token."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama.cpp refuses to decode ({status})")
        values = self.lib.llama_get_logits(self.context)
        found = np.ctypeslib.as_array(values, (len(ids), self.vocabulary)).copy()
        self.lib.llama_batch_free(batch)
        return found

    def close(self) -> None:
        """Free the model."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def rewritten(source: Path, target: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """The same GGUF with every tensor in float32, changed by ``change`` (its name, its values)."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, change(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _base_of(place: Place, weights: str) -> Path:
    target = place.output / "float32.gguf"
    if weights == "Q4_1" or target.is_file():
        return place.quantised if weights == "Q4_1" else target
    return rewritten(place.quantised, target, lambda _, values: values)


def _row(name: str, weights: str, adapters: Mapping[str, float]) -> Runtime:
    def open_(place: Place) -> Scorer:
        files = {place.exported(export) / "adapter.gguf": scale for export, scale in adapters.items()}
        llama = LlamaCpp(_base_of(place, weights), files)
        return lambda ids, start: scores_of(llama.logits(ids), ids, start)

    return Runtime(f"llama.cpp, {name}", PACKAGE, "adapters" if adapters else "base", weights, open_)


def _merged(place: Place, weights: str) -> Path:
    """The GGUF of the merged model, quantised by llama.cpp itself where ``weights`` is not float32."""
    exported = place.exported("gguf-merged")
    if not exported.exists():
        parts = {str(place.task): 1.0, str(place.negative): 1.0}
        export_adapters(str(place.base), parts, EXPORTS["gguf-merged"], exported)
    whole, target = exported / "model.gguf", place.output / f"merged-{weights}.gguf"
    if weights == "float32":
        return whole
    if target.is_file():
        return target
    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{weights}"), 1
    if lib.llama_model_quantize(str(whole).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp does not quantise {whole} to {weights}")
    return target


def _merged_row(weights: str) -> Runtime:
    def open_(place: Place) -> Scorer:
        llama = LlamaCpp(_merged(place, weights), {})
        return lambda ids, start: scores_of(llama.logits(ids), ids, start)

    name = "llama.cpp, merged" if weights == "float32" else "llama.cpp, merged and then quantised"
    return Runtime(name, PACKAGE, "adapters", weights, open_)


RUNTIMES = tuple(
    _row(name, weights, adapters)
    for weights in ("float32", "Q4_1")
    for name, adapters in {
        "no adapter": {},
        "one fused": {"gguf": 1.0},
        "two, the negative one stored at 2 and scaled by 0.5": {"gguf_task": 1.0, "gguf_negative": 0.5},
    }.items()
) + tuple(map(_merged_row, ("float32", "Q4_1", "Q4_K_M")))
