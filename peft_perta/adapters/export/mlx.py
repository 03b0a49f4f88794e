"""The layout that mlx-lm reads with ``--adapter-path``.

Reference:
    github.com/ml-explore/mlx-lm, mlx_lm/tuner/utils.py (load_adapters) and mlx_lm/tuner/lora.py (LoRALinear): the delta
    is scale * (x @ lora_a) @ lora_b, with lora_a [I, R] and lora_b [R, O].
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...data import note
from ...errors import AdapterError
from .format import Served, check_architecture, check_no_gguf

_TESTED = ("llama", "mistral", "qwen2", "qwen3")  # tests/test_export_runtimes.py
_ROPE_THETA = 10000  # that of mlx-lm where config.json names none
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Mlx:
    """For mlx-lm, which loads one adapter."""

    name = "mlx"
    description = "adapters.safetensors and adapter_config.json in mlx-lm's layout"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse an architecture that was not tested, and a GGUF file, which mlx-lm does not load. Say if mlx-lm would
        not find the base's rotary angles."""
        check_no_gguf("mlx-lm", base)
        check_architecture("mlx-lm", model, _TESTED)
        file = Path(base, "config.json")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        theta = (config.get("rope_parameters") or {}).get("rope_theta", _ROPE_THETA)
        if theta != _ROPE_THETA and "rope_theta" not in config:
            note(
                f"{file} has rope_theta in rope_parameters alone, as transformers 5 writes it; mlx-lm reads it beside "
                f'them, and would compute with {_ROPE_THETA} and answer wrongly: add "rope_theta": {theta} to the file'
            )

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write the factors, transposed, and the config."""
        tensors, keys = {}, set()
        for layer in served.layers():
            match = _LAYER.fullmatch(layer.path)
            if match is None:
                raise AdapterError(
                    f"mlx-lm adapts the layers of blocks alone, and the adapter edits {layer.path}; merge it into the "
                    "base, and convert that"
                )
            keys.add(match[2])
            tensors[f"{layer.path}.lora_a"] = layer.A.T.contiguous()
            tensors[f"{layer.path}.lora_b"] = layer.B.T.contiguous()
        save_file(tensors, directory / "adapters.safetensors", {"format": "mlx"})
        config = {
            "fine_tune_type": "lora",
            "num_layers": served.model.config.num_hidden_layers,
            "lora_parameters": {"rank": served.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        where = f"--model {shlex.quote(served.base)} --adapter-path {shlex.quote(str(output))}"
        return [f"mlx_lm.generate {where} --prompt TEXT", f"mlx_lm.server {where}"]
