"""Load an adapter in a fresh process that knows only PEFT and transformers, as a user without this package would."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..model import WEIGHTS_HASH_FILE, find_gguf

_MARK = "VERIFIED "

_PROGRAM = """
import json, runpy, sys
import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
base, directory, revision, weights_hash, gguf_file = sys.argv[1:6]
kind = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
source = {"revision": revision or None, **kind}
hashes = runpy.run_path(weights_hash)
of_text = type(AutoConfig.from_pretrained(base, **source)) in MODEL_FOR_CAUSAL_LM_MAPPING
auto_class = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
model, found = auto_class.from_pretrained(base, **source, device_map={"": "cpu"}, output_loading_info=True)
model = PeftModel.from_pretrained(model, directory, adapter_name="verified")
result = model.load_adapter(directory, adapter_name="verified")
missing = [k for k in result.missing_keys if ".verified." in k]
ids = torch.arange(8).unsqueeze(0) % model.config.get_text_config().vocab_size
with torch.no_grad():
    on = model(input_ids=ids).logits.float()
    with model.disable_adapter():
        off = model(input_ids=ids).logits.float()
print("VERIFIED " + json.dumps({
    "lacking": sorted(found["missing_keys"]), "missing": missing,
    "unexpected": list(result.unexpected_keys), "finite": bool(torch.isfinite(on).all()),
    "weights_sha256": hashes["hash_rounded_weights"](model.get_base_model()),
    "embeddings_sha256": hashes["hash_embeddings"](model.get_base_model()),
    "change": float((on - off).abs().max()), "knows_package": "peft_perta" in sys.modules,
}))
"""


@dataclass(frozen=True)
class FreshLoad:
    """What the fresh process saw.

    Attributes:
        lacking: weights of the base that its files do not hold, and that were drawn at random.
        missing: keys of the adapter that the directory does not hold.
        unexpected: keys in the directory that the adapter does not have.
        finite: every logit is finite with the adapter on.
        weights_sha256: hash of the base's weights in bfloat16, as ``identify_base`` has it.
        embeddings_sha256: hash of its input embeddings in bfloat16, likewise.
        change: the largest absolute change of a logit by the adapter.
        knows_package: this package was imported, so that the process was not a user's.
    """

    lacking: list[str]
    missing: list[str]
    unexpected: list[str]
    finite: bool
    weights_sha256: str | None
    embeddings_sha256: str | None
    change: float
    knows_package: bool


def load_afresh(directory: Path, base: str, revision: str | None) -> FreshLoad | str:
    """Load the adapter on the base, on the CPU, in a fresh process; the last line of its errors where that fails."""
    gguf = find_gguf(base)
    source, gguf_file = (base, "") if gguf is None else (str(gguf.parent), gguf.name)
    arguments = [source, str(directory), revision or "", str(WEIGHTS_HASH_FILE), gguf_file]
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in run.stdout.splitlines() if line.startswith(_MARK)), None)
    if run.returncode or line is None:
        errors = run.stderr.strip().splitlines()
        return errors[-1][:200] if errors else f"the process ended with status {run.returncode}"
    return FreshLoad(**json.loads(line.removeprefix(_MARK)))
