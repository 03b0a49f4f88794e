"""Which runtimes take an adapter directory, by their own rules: pass, not supported and why, or not checked.

Each runtime stands with the version whose rules these are, and with how they were learned: run against that version, or
read in its source or its documents. Of other versions nothing is said.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data import read_json
from ..model import find_adapter
from .export import EXPORT_NAME
from .verify import PLAIN_CHECK, Check

Verdict = Literal["pass", "not supported", "not checked"]

_LAYERS = "TGI: every layer of each projection"
_PATTERNS = "llama.cpp, TGI: no patterns"
_ALPHA = "llama.cpp, TGI: lora_alpha == r"
_SHAPES = "names and shapes as the base's"
_ALWAYS = (PLAIN_CHECK, "weights", "GGUF header", "finite", _SHAPES)  # what no runtime could read
_FRESH = ("PEFT: loads in a fresh process", "PEFT: changes the logits")


@dataclass(frozen=True)
class Runtime:
    """What a runtime takes, and how that is known.

    Attributes:
        name: its name.
        version: whose rules these are; None for the one that is installed here.
        basis: how its rules were learned.
        exports: the formats of ``export_adapters`` that it reads; none where it reads PEFT's own files.
        rules: the names of the checks that it asks for beside those of 'all'.
        status: what else to know of it.
    """

    name: str
    version: str | None
    basis: str
    exports: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    status: str = ""

    @property
    def known(self) -> str:
        """The version, and how its rules were learned."""
        return f"{self.version or importlib.metadata.version(self.name.lower())}, {self.basis}"


RUNTIMES = (
    Runtime("PEFT", None, "installed here", rules=_FRESH),
    Runtime("transformers", "5.23.0", "run by benchmarks.serving", rules=_FRESH),
    Runtime("vLLM", "0.32.0", "run by benchmarks.serving", rules=("vLLM: rank", "vLLM: keys")),
    Runtime("SGLang", "0.5.23", "read in its source", rules=(_PATTERNS,)),
    Runtime("LoRAX", "commit 03679f3", "read in its source", rules=(_PATTERNS, _LAYERS)),
    Runtime("TGI", "commit 45d95bd", "read in its source", rules=(_ALPHA, _PATTERNS, _LAYERS), status="in maintenance"),
    Runtime("llama.cpp", "0.5.0", "run by benchmarks.serving", exports=("gguf", "gguf-merged")),
    Runtime("Ollama", "documents of 2026-11", "read there", exports=("ollama",)),
    Runtime("MLX-LM", "0.32.2", "run by benchmarks.serving", exports=("mlx",), rules=("mlx-lm: tensors",)),
)


@dataclass(frozen=True)
class RuntimeVerdict:
    """Whether a runtime takes the directory.

    Attributes:
        runtime: a row of ``RUNTIMES``.
        verdict: 'pass', 'not supported' or 'not checked'.
        why: the check that failed or is missing, or what to export; empty for 'pass'.
    """

    runtime: Runtime
    verdict: Verdict
    why: str = ""

    @property
    def known(self) -> str:
        """By which version's rules, why, and what else is known of the runtime."""
        more = "; ".join(part for part in (self.why, self.runtime.status) if part)
        return f"({self.runtime.known}){f': {more}' if more else ''}"

    def __str__(self) -> str:
        return f"{self.verdict:<15}{self.runtime.name:<14}{self.known}"


def judge_runtimes(directory: str | Path, checks: Sequence[Check]) -> list[RuntimeVerdict]:
    """Say of each runtime whether it takes an adapter directory.

    Args:
        directory: an adapter, or what ``export_adapters`` wrote.
        checks: what ``verify_adapter`` found of it.

    Returns:
        A verdict for each row of ``RUNTIMES``: 'not supported' where a check that the runtime asks for failed, 'not
        checked' where one was not made, such as those that need the base.
    """
    found, exported = {check.name: check for check in checks}, _exported_to(find_adapter(directory))
    return [RuntimeVerdict(runtime, *_judge(runtime, found, exported)) for runtime in RUNTIMES]


def _exported_to(directory: Path) -> str | None:
    try:
        return str(read_json(directory / EXPORT_NAME)["to"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _judge(runtime: Runtime, found: Mapping[str, Check], exported: str | None) -> tuple[Verdict, str]:
    if not runtime.exports and PLAIN_CHECK not in found:
        return "not supported", "reads PEFT's files; peft-perta export --to peft"
    if runtime.exports and exported not in runtime.exports:
        return "not supported", f"does not read these files; peft-perta export --to {runtime.exports[0]}"
    of_others = [check.name for check in found.values() if check.passed is None]
    if of_others and runtime.rules is not _FRESH:
        return _judge_experts(runtime, of_others[0])
    failed = next((name for name, check in found.items() if check.failed and _asked(runtime, name)), None)
    if failed is not None:
        return "not supported", f"fails {failed!r}"
    missing = next((name for name in _needed(runtime) if name not in found), None)
    return ("not checked", f"needs --base, for {missing!r}") if missing else ("pass", "")


def _judge_experts(runtime: Runtime, check: str) -> tuple[Verdict, str]:
    """The adapter packs the factors of experts; ``check`` names the servers that were found not to read it."""
    if runtime.name in check:
        return "not supported", "packs the factors of experts; merge it into the base"
    return "not checked", "packs the factors of experts, of which no rule was read"


def _asked(runtime: Runtime, name: str) -> bool:
    """Whether a check is one of the runtime's, or one that every runtime asks for."""
    return name in (*runtime.rules, *_ALWAYS) or name.startswith("all:")


def _needed(runtime: Runtime) -> tuple[Any, ...]:
    return runtime.rules if not runtime.exports else (_SHAPES,)


def format_runtimes(verdicts: Sequence[RuntimeVerdict]) -> str:
    """The verdicts as text, one per line, under what they are of."""
    return "\n".join(["Runtimes, by the rules of one version each:", *map(str, verdicts)])
