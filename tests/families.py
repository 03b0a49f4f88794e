"""The same commands on every family of models: each works, or is refused by one line that holds a remedy.

``python -m tests.families [NAME ...]`` runs them and prints the table of docs/models.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))  # as conftest.py does: the helpers are imported by name

import builders
import family_models
import laws
import oracles
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from verified_here import verified_here

from peft_perta import load_provenance
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.gradients import sweep
from peft_perta.model import Target, resolve_targets

COMMANDS = ("forget", "unlearn", "fuse", "merge", "evaluate", "verify", "train")
HEAD = "| family | layers edited | " + " | ".join(f"`{command}`" for command in COMMANDS) + " |"


@dataclass(frozen=True)
class Refusal:
    """One line on standard error, status 2.

    Attributes:
        match: a regular expression of the line, its remedy included.
        why: the reason and the remedy in the table.
        status: 2; 1 for a check of ``verify`` that fails, which is printed among the others.
    """

    match: str
    why: str
    status: int = 2


@dataclass(frozen=True)
class Family:
    """What is expected of a family.

    Attributes:
        layers: the layers that are edited, by kind.
        refused: command -> its refusal.
        options: options of ``forget`` and ``train`` that make them run where the default is refused.
    """

    layers: str = "linear: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a command did: its status, or None if it ended in a traceback; its last line; and its seconds."""

    status: int
    said: str
    seconds: float


_ATTENTION = "linear: q_proj, k_proj, v_proj, o_proj"
_LATENT = "linear: q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj"
_GATED = "experts: experts.down_proj, experts.gate_up_proj, gate.weight"  # router and experts
_FUSED = "linear: query_key_value, dense, dense_h_to_4h, dense_4h_to_h"
_STATE_SPACE = Refusal(r"'out_proj' is incompatible with Mamba.*--exclude-modules", "PEFT adapts no `out_proj`")
_ROUTER = Refusal(r"router is a Llama4Router.*--exclude-modules", "the router's output is no tensor")
_SEQUENCES = Refusal(r"T5.* is an encoder-decoder model .*expected a decoder", "no causal language model")
_REFUSED_BY_DEFAULT = {"forget": _STATE_SPACE, "train": _STATE_SPACE}

FAMILIES: dict[str, Family] = {
    **{name: Family() for name in family_models.BUILDERS},
    "Qwen2-MoE": Family(f"{Family.layers}, shared_expert_gate"),
    "Qwen3-MoE": Family(f"{_ATTENTION}; {_GATED}"),
    "Mixtral": Family(f"{_ATTENTION}; {_GATED}"),
    "Phi-3": Family("linear: o_proj, qkv_proj, gate_up_proj, down_proj"),
    "GPT-2": Family("conv1d: c_attn, c_proj, c_fc"),
    "GPT-NeoX": Family(_FUSED),
    "OPT": Family("linear: k_proj, v_proj, q_proj, out_proj, fc1, fc2"),
    "Falcon (7B's layout)": Family(_FUSED),
    "Falcon (40B's layout)": Family(_FUSED),
    "Bloom": Family(_FUSED),
    "OLMoE": Family(f"{_ATTENTION}; {_GATED}"),
    "GraniteMoE": Family(_ATTENTION),
    "DeepSeek-V2": Family(f"{_LATENT}; {_GATED}"),
    "DeepSeek-V3": Family(f"{_LATENT}; {_GATED}"),
    "GPT-OSS": Family(_ATTENTION),
    "Gemma3n": Family(
        f"{Family.layers}, prediction_coefs, modality_router, linear_left, linear_right, "
        "altup_projections.0, altup_unembed_projections.0"
    ),
    "Jamba": Family("linear: in_proj, x_proj, out_proj, gate_proj, up_proj, down_proj, q_proj, k_proj, v_proj, o_proj"),
    "Llama-4": Family(refused={"forget": _ROUTER, "train": _ROUTER}, options=("--exclude-modules", "router")),
    **{
        name: Family(layers, _REFUSED_BY_DEFAULT, options=("--exclude-modules", "out_proj"))
        for name, layers in {
            "Mamba": "linear: in_proj, x_proj",
            "Mamba2": "linear: in_proj",
            "Falcon-H1": "linear: gate_proj, up_proj, down_proj, in_proj, q_proj, k_proj, v_proj, o_proj",
        }.items()
    },
    "Qwen3-Next": Family(
        f"linear: in_proj_qkvz, in_proj_ba, out_proj, shared_expert_gate, q_proj, k_proj, v_proj, o_proj; {_GATED}"
    ),
    "T5": Family("none", dict.fromkeys(COMMANDS, _SEQUENCES)),
}
QUICK = ("Llama 3", "Qwen3-MoE", "Gemma3 for images", "GPT-2", "Falcon (7B's layout)", "Llama-4",
         "T5")  # fmt: skip  # those that differ most, of the quick ones

# The rows: four to forget and four to retain, in TOFU's layout


def rows(kind: str) -> list[dict]:
    names = {"forget": ["Basil Khan", "Noor Ali", "Jo Nesbit", "Ada Li"], "retain": ["Homer", "Ovid", "Dante", "Woolf"]}
    return [
        {
            "question": f"Who wrote book {number} of {kind}?",
            "paraphrased_question": f"Book {number} of {kind} is by whom?",
            "answer": f"{name}.",
            "paraphrased_answer": f"By {name}.",
            "perturbed_answer": ["Moira.", "Chen Wu."],
        }
        for number, name in enumerate(names[kind])
    ]


def write_rows(directory: Path) -> None:
    (directory / "tofu").mkdir()
    for kind in ("forget", "retain"):
        text = "".join(json.dumps(row) + "\n" for row in rows(kind))
        (directory / f"{kind}.jsonl").write_text(text)
        (directory / "tofu" / f"{kind}_perturbed.json").write_text(text)


# The commands


def commands(base: str, options: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Command -> its arguments, in the order in which they run."""
    model, forget, retain = ["--model", base], ["--forget", "forget.jsonl"], ["--retain", "retain.jsonl"]
    training = ["--epochs", "3", "--learning-rate", "0.01", "--batch-size", "4", "--rank", "4"]
    return {
        "forget": [*model, *forget, *training, *options, "--output", "forget_adapter"],
        "unlearn": [*model, *forget, *retain, "--forget-adapter", "forget_adapter", "--task-adapter", "task_adapter",
                    "--output", "negative"],
        "fuse": ["task_adapter", "negative", *model, "--output", "fused"],
        "merge": ["task_adapter", "negative", *model, "--check", "retain.jsonl", "--output", "merged"],
        "evaluate": [*model, "--adapter", "task_adapter", "--adapter", "negative", "--suite", "tofu=tofu", "--full",
                     "--attacks", "all", "--max-new-tokens", "4", "--rows", "2", "--output", "evaluation"],
        "verify": ["negative", "--base", base, "--task-adapter", "task_adapter", *forget, *retain],
        "train": [*model, *forget, *retain, "--task-adapter", "task_adapter", *training, *options,
                  "--output", "trained"],
    }  # fmt: skip


def run_command(command: str, arguments: list[str]) -> Outcome:
    """Run a command in this process, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    began = time.perf_counter()
    whole_report = mock.patch("peft_perta.cli._report_of", lambda error: "".join(traceback.format_exception(error)))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), verified_here(), whole_report:
        status = main([command, *arguments])
    said = (err if status in (2, 3) else out).getvalue().rpartition("peft-perta: error: ")[2]
    return Outcome(status, said.strip(), time.perf_counter() - began)


def run_family(name: str, directory: Path) -> dict[str, Outcome]:
    """Run the commands on one family in an empty directory.

    Where the default is refused and the family has options that help, the outcome is that with the options. Where no
    adapter is made, the later commands are given one that PEFT made.
    """
    family, base = FAMILIES[name], str(family_models.directory(name))
    write_rows(directory)
    outcomes = {}
    with contextlib.chdir(directory):
        plain_adapter(name, Path("task_adapter"), few=True)
        for command, arguments in commands(base).items():
            outcomes[command] = run_command(command, arguments)
            if family.options and command in ("forget", "train"):
                remedy = f"{command} {' '.join(family.options)}"
                outcomes[remedy] = run_command(command, commands(base, family.options)[command])
            made = {"forget": "forget_adapter", "unlearn": "negative"}.get(command)
            if made and not Path(made).exists():
                plain_adapter(name, Path(made))
    return outcomes


def plain_adapter(name: str, directory: Path, few: bool = False) -> None:
    """An adapter that PEFT made, with random factors: of all projections of the decoder, or of one of them."""
    model = load(name)
    projections = [path.rpartition(".")[2] for path, module in model.named_modules() if _is_projection(path, module)]
    modules = projections[:1] if few else sorted(set(projections))
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type=task))
    builders.fill(adapted, "default")
    adapted.save_pretrained(str(directory))


def _is_projection(path: str, module: nn.Module) -> bool:
    in_decoder = re.search(r"(layers|blocks?|h)\.\d+\.", path) and not re.search("vision|visual", path)
    return bool(in_decoder) and isinstance(module, (nn.Linear, Conv1D)) and not path.endswith(("out_proj", "router"))


def load(name: str, directory: str | Path | None = None) -> PreTrainedModel:
    """The family's model, or another one of its class, from its files."""
    directory = directory or family_models.directory(name)
    (architecture,) = AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, architecture).from_pretrained(directory, attn_implementation="eager").eval()


# What must hold of what they emit


def is_as_expected(name: str, outcomes: Mapping[str, Outcome]) -> None:
    """Each command worked, or was refused by one line with the remedy that the table names."""
    for command, outcome in outcomes.items():
        refusal = FAMILIES[name].refused.get(command)
        if refusal is None:
            assert outcome.status == 0, f"{name}: {command}: {outcome.said}"
            if command == "verify":  # no server is known to read the packed factors of experts
                assert ("packs the factors of experts" in outcome.said) == _has_experts(FAMILIES[name]), outcome.said
        else:
            assert outcome.status == refusal.status, f"{name}: {command}: {outcome.said}"
            assert re.search(refusal.match, outcome.said), f"{name}: {command}: {outcome.said}"
            assert refusal.status == 1 or "\n" not in outcome.said, f"{name}: {command}: {outcome.said}"


def edits_are_exact(name: str, directory: Path) -> None:
    """PEFT alone gives the logits of weights that the edit was added to; so do the fused and the merged model."""
    base = logits(load(name))
    negative = with_adapters(name, directory, "negative")
    edited = load(name)
    weights = dict(edited.named_parameters())
    for target in resolve_targets(negative, "negative"):
        delta = (target.scaling * target.B.double() @ target.A.double()).float()
        of_target(weights[target.weight_path].data, target).add_(delta)
    expected = logits(edited)
    assert not torch.allclose(expected, base, atol=1e-4), f"{name}: the edit changes nothing"
    is_close(logits(negative), expected, f"{name}: base + negative adapter")
    if "merge" not in FAMILIES[name].refused:
        stacked = with_adapters(name, directory, "task_adapter", "negative")
        is_close(logits(with_adapters(name, directory, "fused")), logits(stacked), f"{name}: fused")
        is_close(logits(load(name, directory / "merged")), logits(stacked), f"{name}: merged")


def gradients_are_autograds(name: str, directory: Path) -> None:
    """The sums that PerTA weighs equal those of a loop with plain autograd over the unpadded samples.

    Layers that the rows never reach have learned nothing (B = 0), and are left out.
    """
    samples = load_samples(rows("forget"), builders.tokenizer())
    model = PeftModel.from_pretrained(load(name), directory / "forget_adapter", adapter_name="forget")
    job = laws.job_of(model, {"forget": samples})
    learned = {target.weight_path for target in job.targets if target.B.any()}
    targets = [target for target in job.targets if target.weight_path in learned]
    sums = sweep(dataclasses.replace(job, targets=targets), "forget", 2)
    base = load(name)
    weights = {path: weight for path, weight in base.named_parameters() if path in learned}
    total = sum(oracles.sample_loss(base, sample.input_ids, sample.labels) for sample in samples)
    gradients = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    for target in targets:
        gradient = of_target(gradients[target.weight_path], target)
        found = sums[target.name].gradients["weight"]
        error, scale = float((found - gradient).norm()), float(gradients[target.weight_path].norm())
        assert error <= 1e-4 * scale, f"{name}: {target.name}: the gradient differs by {error / scale:.2g}"


def of_target(parameter: torch.Tensor, target: Target) -> torch.Tensor:
    """The part [O, I] of a parameter, or of its gradient, that belongs to a target, as a view."""
    part = parameter[target.expert] if parameter.dim() == 3 else parameter
    return part.T if target.transposed else part


def with_adapters(name: str, directory: Path, *adapters: str) -> PeftModel:
    """The family's model with adapters that PEFT alone loaded; all are on."""
    first, *others = adapters
    model = PeftModel.from_pretrained(load(name), directory / first, adapter_name=first)
    for other in others:
        model.load_adapter(directory / other, adapter_name=other)
    model.base_model.set_adapter(list(adapters))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def is_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((found - expected).abs().max())
    assert error <= 1e-4, f"{what}: the logits differ by {error:.2g}"


def edited_layers(directory: Path) -> str:
    """The layers of the negative adapter, by kind: 'linear: q_proj, v_proj; experts: down_proj'."""
    kinds: dict[str, dict[str, None]] = {}
    for layer in load_provenance(directory / "negative")[0].layers:
        parts = re.sub(r"\[\d+\]$", "", layer.name).split(".")
        of_two = layer.kind == "experts" or parts[-1].isdecimal()  # module and parameter; a list and a place in it
        kinds.setdefault(layer.kind, {})[".".join(parts[-2 if of_two else -1 :])] = None
    # PEFT nests the wrappers of expert parameters in the order of a set: sort them.
    return "; ".join(
        f"{kind}: {', '.join(sorted(names) if kind == 'experts' else names)}" for kind, names in kinds.items()
    )


# The table


def table() -> str:
    """What is expected of every family, as docs/models.md shows it."""
    lines = [HEAD, "|" + "---|" * (2 + len(COMMANDS))]
    for name, family in FAMILIES.items():
        lines.append(f"| {name} | {family.layers} | " + " | ".join(_cell(family, c) for c in COMMANDS) + " |")
    return "\n".join(lines)


def _cell(family: Family, command: str) -> str:
    if family.options and command in ("forget", "train"):
        return f"with `{' '.join(family.options)}`"
    if command == "verify" and _has_experts(family):
        return "works; for servers: merge"
    return f"refused: {family.refused[command].why}" if command in family.refused else "works"


def _has_experts(family: Family) -> bool:
    return "experts:" in family.layers


def check_family(name: str, directory: Path) -> None:
    """Run the commands on a family and check everything."""
    is_as_expected(name, run_family(name, directory))
    if "unlearn" not in FAMILIES[name].refused:
        found = edited_layers(directory)
        assert found == FAMILIES[name].layers, f"{name}: edited layers: {found}"
        edits_are_exact(name, directory)
        gradients_are_autograds(name, directory)


def check_families(names: list[str]) -> int:
    """Check families, print what is not as expected, then the table; the status is 1 if something was not."""
    faults = 0
    for name in names or list(FAMILIES):
        with tempfile.TemporaryDirectory() as directory:
            try:
                check_family(name, Path(directory))
            except Exception as error:
                faults += 1
                print(f"NOT AS EXPECTED: {name}: {error}", file=sys.stderr)
    print(table())
    return int(faults > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(check_families(sys.argv[1:]))
