"""PEFT and transformers: the yardstick, and the other ways to load the same adapters there."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_perta import stack_adapters
from peft_perta.adapters import merge_adapters

from .job import Place, Runtime, Scorer, scores_of


def _base(place: Place, where: str = "") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(where or str(place.base), dtype=torch.float32).eval()


def _scorer(model: torch.nn.Module) -> Scorer:
    def score(ids, start):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        return scores_of(logits.float().numpy(), ids, start)

    return score


def stacked(place: Place) -> PeftModel:
    """The yardstick: both adapters on the base, by PEFT."""
    model = PeftModel.from_pretrained(_base(place), str(place.task), adapter_name="task")
    model.load_adapter(str(place.negative), adapter_name="negative")
    stack_adapters(model, ["task", "negative"])
    return model.eval()


def _transformers(place: Place) -> Scorer:
    model = _base(place)
    for name, directory in (("task", place.task), ("negative", place.negative)):
        model.load_adapter(str(directory), adapter_name=name)
    model.set_adapter(["task", "negative"])
    return _scorer(model)


def _fused(place: Place) -> Scorer:
    return _scorer(PeftModel.from_pretrained(_base(place), str(place.exported("peft"))).eval())


def _merged(place: Place) -> Scorer:
    merged = place.output / "merged"
    merge_adapters(str(place.base), {str(place.task): 1.0, str(place.negative): 1.0}, merged, show_progress_bar=False)
    return _scorer(_base(place, str(merged)))


RUNTIMES = (
    Runtime("PEFT, no adapter", "peft", "base", "float32", lambda place: _scorer(_base(place))),
    Runtime("PEFT, stack of two", "peft", "adapters", "float32", lambda place: _scorer(stacked(place))),
    Runtime("transformers' own loader, two", "transformers", "adapters", "float32", _transformers),
    Runtime("PEFT, one fused", "peft", "adapters", "float32", _fused),
    Runtime("merged", "transformers", "adapters", "float32", _merged),
)
