"""Is this directory what it says, and will the servers take it? One line a check, pass or fail.

What needs the base runs in a fresh process that knows PEFT and transformers alone (``_LOAD``), as a user without this
package would load it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import Sample
from ..errors import AdapterError
from ..evaluation import losses_of
from ..model import BASE_CHANGING_INITS, CONFIG_NAME, VARIANT_FIELDS, WEIGHTS_NAME, hash_file, load_skeleton
from .emitted import PROVENANCE_NAME, load_provenance
from .servable import SERVABLE_RANKS

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


_LOAD = """
import hashlib, json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, directory, revision = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, revision=revision or None, device_map={"": "cpu"})
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
    "embeddings": hashlib.sha256(embeddings.numpy().tobytes()).hexdigest(),
    "moved": float((on - off).abs().max()), "package": "peft_perta" in sys.modules,
}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    found: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL':<6}{self.name:<34}{self.found}"


def verify_adapter(directory: str | Path, base: str | None = None, *, revision: str | None = None) -> list[Check]:
    """Every check of an emitted adapter; with ``base``, also that it fits and works there.

    Raises:
        AdapterError: the directory does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory; expected one that peft_perta wrote")
    checks = list(_files(directory))
    config, tensors = _read(directory)
    checks += _config(config)
    checks += _tensors(config, tensors)
    if base is not None:
        checks += _base(directory, config, tensors, base, revision)
    return checks


def _files(directory: Path) -> Iterator[Check]:
    try:
        _, files = load_provenance(directory)
    except AdapterError as error:
        yield Check("provenance", False, str(error))
        return
    yield Check("provenance", True, f"{PROVENANCE_NAME} reads")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if name not in files or not (directory / name).is_file():
            yield Check(
                f"hash of {name}", False, "not in the provenance" if name not in files else "the file is missing"
            )
            continue
        same = hash_file(directory / name) == files[name]
        yield Check(f"hash of {name}", same, "as emitted" if same else "changed, or of another adapter's provenance")


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What can be read; the checks say what is missing."""
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        config = {}
    try:
        tensors = load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError):
        tensors = {}
    return config if isinstance(config, dict) else {}, tensors


def _config(config: dict[str, Any]) -> Iterator[Check]:
    rank = config.get("r")
    yield Check("vLLM: rank", rank in SERVABLE_RANKS, f"r = {rank}{_ceiling(rank)}")
    alpha = config.get("lora_alpha")
    yield Check("llama.cpp, TGI: lora_alpha == r", alpha == rank, f"lora_alpha = {alpha}, r = {rank}")
    yield Check("all: no rsLoRA", not config.get("use_rslora"), f"use_rslora = {config.get('use_rslora')}")
    patterns = {name: config.get(name) for name in ("rank_pattern", "alpha_pattern") if config.get(name)}
    yield Check("llama.cpp, TGI: no patterns", not patterns, f"{patterns or 'none'}")
    biased = config.get("bias", "none") != "none" or bool(config.get("lora_bias"))
    yield Check("all: no bias", not biased, f"bias = {config.get('bias')!r}, lora_bias = {config.get('lora_bias')}")
    variants = [name for name in VARIANT_FIELDS if config.get(name)]
    extra = [name for name in ("modules_to_save", "trainable_token_indices") if config.get(name)]
    plain = config.get("peft_type") == "LORA" and not variants and not extra
    yield Check("all: plain LoRA", plain, ", ".join(variants + extra) or str(config.get("peft_type")))
    init = config.get("init_lora_weights", True)
    changes = isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)
    yield Check("all: the base as it is", not changes, f"init_lora_weights = {init!r}")
    modules = config.get("target_modules")
    yield Check("all: target_modules named", (isinstance(modules, list) and bool(modules)) or bool(
        config.get("target_parameters")), f"{modules}")  # fmt: skip


def _ceiling(rank: Any) -> str:
    if rank not in SERVABLE_RANKS:
        return f"; expected one of {', '.join(map(str, SERVABLE_RANKS))}"
    return f"; start vLLM with --max-lora-rank {rank}" if rank > 16 else ", within vLLM's default of 16"


def _tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    if not tensors:
        yield Check("weights", False, f"{WEIGHTS_NAME} cannot be read, or is empty")
        return
    odd = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    yield Check("vLLM: keys", not odd, odd[0] if odd else f"{len(tensors)} tensors, lora_A and lora_B alone")
    infinite = next((key for key, value in tensors.items() if not bool(torch.isfinite(value.float()).all())), None)
    yield Check("all: finite", infinite is None, infinite or "every value")
    kinds = {value.dtype for value in tensors.values()}
    yield Check("all: one type", len(kinds) == 1 and kinds <= set(_TYPES), ", ".join(map(str, kinds)))
    rank, lonely, unequal = config.get("r"), None, None
    for key, value in tensors.items():
        pair = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        lonely = lonely or (key if pair not in tensors else None)
        of_key = value.shape[0] if ".lora_A." in key else value.shape[-1]
        experts = bool(config.get("target_parameters"))
        unequal = unequal or (key if of_key != rank and not (experts and rank and of_key % rank == 0) else None)
    yield Check("all: factors in pairs", lonely is None, lonely or "A and B of every layer")
    yield Check("all: rank of the factors", unequal is None, unequal or f"{rank} everywhere")


def _base(
    directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: str, revision: str | None
) -> Iterator[Check]:
    yield _named(config, base)
    skeleton = load_skeleton(base, revision=revision)
    modules = set(config.get("target_modules") or ())
    expected = {
        name: tuple(module.weight.shape)  # type: ignore[union-attr]
        for name, module in skeleton.named_modules()
        if name.rpartition(".")[2] in modules and getattr(module, "weight", None) is not None
    }
    adapted = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    }
    absent = sorted(set(expected) - adapted)
    yield Check(
        "TGI: every layer of each projection", not absent,
        f"{absent[0]} is missing" if absent else f"{len(expected)} layers, zero-filled where nothing changes",
    )  # fmt: skip
    found, error = _loaded(directory, base, revision)
    if found is None:
        yield Check("PEFT: loads in a fresh process", False, error)
        return
    whole = not found["missing"] and not found["unexpected"]
    detail = "all keys matched" if whole else f"missing {found['missing'][:2]}, unexpected {found['unexpected'][:2]}"
    yield Check("PEFT: loads in a fresh process", whole and not found["package"], detail)
    made_on = _embeddings_of(directory)
    if made_on is not None:
        same = found["embeddings"] == made_on
        yield Check("the base's embeddings", same, "as when it was made" if same else "of another model")
    works = found["finite"] and found["moved"] > 0
    yield Check("PEFT: changes the logits", works, f"by up to {found['moved']:.3g}, finite: {found['finite']}")


def _embeddings_of(directory: Path) -> str | None:
    """The hash of the embeddings that the adapter was made on, where its provenance holds one."""
    try:
        return load_provenance(directory)[0].base_model.get("embeddings_sha256")
    except AdapterError:
        return None


def _named(config: dict[str, Any], base: str) -> Check:
    claimed = config.get("base_model_name_or_path")
    same = bool(claimed) and (Path(claimed).name == Path(base).name or Path(claimed).resolve() == Path(base).resolve())
    return Check("the base that it was made for", same, f"made for {claimed!r}, verified on {base!r}")


def _loaded(directory: Path, base: str, revision: str | None) -> tuple[dict[str, Any] | None, str]:
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, base, str(directory), revision or ""], capture_output=True, text=True, check=False
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("VERIFIED ")), None)
    if run.returncode or line is None:
        reason = run.stderr.strip().splitlines()
        return None, reason[-1][:200] if reason else f"the process ended with {run.returncode}"
    return json.loads(line.removeprefix("VERIFIED ")), ""


def format_checks(checks: list[Check]) -> str:
    failed = sum(not check.passed for check in checks)
    verdict = "every check passed" if not failed else f"{failed} of {len(checks)} checks FAILED"
    return "\n".join([*map(str, checks), verdict])


def re_evaluate(
    model: nn.Module, samples: Mapping[str, list[Sample]], adapter_name: str, with_adapters: Sequence[str] = ()
) -> list[Check]:
    """The losses with the adapter off and on: forgetting must rise, and what it costs is said."""
    checks = []
    for name, rows in samples.items():
        off = float(losses_of(model, rows, adapters=list(with_adapters)).mean())
        on = float(losses_of(model, rows, adapters=[*with_adapters, adapter_name]).mean())
        passed = on > off if name == "forget" else math.isfinite(on)
        checks.append(Check(f"re-evaluated: {name} loss", passed, f"{off:.3f} without it, {on:.3f} with it"))
    return checks
