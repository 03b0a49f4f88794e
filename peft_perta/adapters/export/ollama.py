"""A LoRA GGUF and a Modelfile, as ``ollama create`` reads them."""

from __future__ import annotations

import shlex
from pathlib import Path

from transformers import PreTrainedModel

from ...errors import ConfigError
from ...model import find_gguf, load_tokenizer
from ._chat_pieces import read_pieces
from .format import Served
from .gguf import ADAPTER_NAME, Gguf, write_lora

MODELFILE = "Modelfile"


class Ollama:
    """For Ollama, which takes one adapter a model and switches none at run time."""

    name = "ollama"
    description = "a LoRA GGUF and a Modelfile with the base, the adapter, the chat template and its stops"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse what GGUF refuses, and a base that is not on this machine."""
        if not Path(base).exists():
            raise ConfigError(
                f"ollama: expected the base as a GGUF file or a directory, to write after FROM, found {base}; download "
                "it"
            )
        Gguf().check(base, model)

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write ``adapter.gguf`` and ``Modelfile``."""
        write_lora(served, directory / ADAPTER_NAME)
        pieces = read_pieces(load_tokenizer(served.base, revision=served.revision))
        base = (find_gguf(served.base) or Path(served.base)).resolve()
        lines = [f"FROM {base}", f"ADAPTER ./{ADAPTER_NAME}", f"TEMPLATE {_quoted(pieces.go_template())}"]
        if pieces.default_system:
            lines.append(f"SYSTEM {_quoted(pieces.default_system)}")
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in pieces.stops]
        (directory / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [f"ollama create NAME -f {shlex.quote(str(output / MODELFILE))}", "ollama run NAME"]


def _quoted(text: str) -> str:
    """A text as a Modelfile quotes it.

    Raises:
        ConfigError: it holds the quotes themselves.
    """
    if '"""' in text or ("\n" not in text and text.endswith('"')):
        raise ConfigError(f"a Modelfile cannot quote {text[:80]!r}; export to gguf, and write the Modelfile yourself")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
