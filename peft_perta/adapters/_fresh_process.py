"""Load an adapter in a fresh process that knows only PEFT and transformers, as a user without this package would."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MARK = "VERIFIED "

_PROGRAM = """
import hashlib, json, sys
import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
base, directory, revision = sys.argv[1:4]
of_text = type(AutoConfig.from_pretrained(base, revision=revision or None)) in MODEL_FOR_CAUSAL_LM_MAPPING
auto_class = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
model = auto_class.from_pretrained(base, revision=revision or None, device_map={"": "cpu"})
model = PeftModel.from_pretrained(model, directory, adapter_name="verified")
result = model.load_adapter(directory, adapter_name="verified")
missing = [k for k in result.missing_keys if ".verified." in k]
ids = torch.arange(8).unsqueeze(0) % model.config.get_text_config().vocab_size
with torch.no_grad():
    on = model(input_ids=ids).logits.float()
    with model.disable_adapter():
        off = model(input_ids=ids).logits.float()
embeddings = model.get_input_embeddings().weight.detach().to(torch.bfloat16).contiguous().view(torch.int16)
print("VERIFIED " + json.dumps({
    "missing": missing, "unexpected": list(result.unexpected_keys), "finite": bool(torch.isfinite(on).all()),
    "embeddings_sha256": hashlib.sha256(embeddings.numpy().tobytes()).hexdigest(),
    "change": float((on - off).abs().max()), "knows_package": "peft_perta" in sys.modules,
}))
"""


@dataclass(frozen=True)
class FreshLoad:
    """What the fresh process saw.

    Attributes:
        missing: keys of the adapter that the directory does not hold.
        unexpected: keys in the directory that the adapter does not have.
        finite: every logit is finite with the adapter on.
        embeddings_sha256: SHA-256 of the base's input embeddings in bfloat16, as ``hash_embeddings`` takes it.
        change: the largest absolute change of a logit by the adapter.
        knows_package: this package was imported, so that the process was not a user's.
    """

    missing: list[str]
    unexpected: list[str]
    finite: bool
    embeddings_sha256: str
    change: float
    knows_package: bool


def load_afresh(directory: Path, base: str, revision: str | None) -> FreshLoad | str:
    """Load the adapter on the base, on the CPU, in a fresh process; the last line of its errors where that fails."""
    command = [sys.executable, "-c", _PROGRAM, base, str(directory), revision or ""]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in run.stdout.splitlines() if line.startswith(_MARK)), None)
    if run.returncode or line is None:
        errors = run.stderr.strip().splitlines()
        return errors[-1][:200] if errors else f"the process ended with status {run.returncode}"
    return FreshLoad(**json.loads(line.removeprefix(_MARK)))
