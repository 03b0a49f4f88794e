"""The same commands on every family of models: each works, or is refused by one line that holds a remedy.

``python -m tests.families [NAME ...]`` runs them and prints the table of docs/models.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))  # as conftest.py does: the helpers are imported by name

import builders
import family_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from peft_perta import load_provenance
from peft_perta.cli import main

COMMANDS = ("forget", "unlearn", "fuse", "merge", "evaluate", "verify", "train")
HEAD = "| family | layers edited | " + " | ".join(f"`{command}`" for command in COMMANDS) + " |"


@dataclass(frozen=True)
class Refusal:
    """One line on standard error, status 2.

    Attributes:
        match: a regular expression of the line, its remedy included.
        why: the reason and the remedy in the table.
    """

    match: str
    why: str


@dataclass(frozen=True)
class Family:
    """What is expected of a family.

    Attributes:
        layers: the layers that are edited, by kind.
        refused: command -> its refusal.
        options: options of ``forget`` and ``train`` that make them run where the default is refused.
        quick: it is one of those that differ most, which the normal run of the tests takes.
    """

    layers: str = "linear: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a command did: its status, or None if it ended in a traceback; its last line; and its seconds."""

    status: int | None
    said: str
    seconds: float


FAMILIES: dict[str, Family] = {name: Family() for name in family_models.BUILDERS}

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
        "train": [*model, *forget, *retain, "--task-adapter", "task_adapter", *training, *options, "--output", "trained"],
    }  # fmt: skip


def run_command(command: str, arguments: list[str]) -> Outcome:
    """Run a command in this process, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    began = time.perf_counter()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _verified_in_this_process():
            status: int | None = main([command, *arguments])
    except Exception:
        status, said = None, traceback.format_exc()
    else:
        said = (err if status == 2 else out).getvalue().rpartition("peft-perta: error: ")[2]
    return Outcome(status, said.strip(), time.perf_counter() - began)


@contextlib.contextmanager
def _verified_in_this_process() -> Iterator[None]:
    """``verify`` starts a Python of its own, which takes seconds to import torch: run its program here instead.

    tests/test_shipping.py tests the fresh process.
    """

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        assert command[:2] == [sys.executable, "-c"]
        ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft_perta"}
        printed = io.StringIO()
        try:
            with mock.patch.object(sys, "argv", ["-c", *command[3:]]), contextlib.redirect_stdout(printed):
                exec(command[2], {"__name__": "__main__"})
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, printed.getvalue(), f"{type(error).__name__}: {error}")
        finally:
            sys.modules.update(ours)
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    with mock.patch("peft_perta.adapters._fresh_process.subprocess.run", run):
        yield


def run_family(name: str, directory: Path) -> dict[str, Outcome]:
    """Run the commands on one family in an empty directory, and check that what they emit is exact.

    Where ``forget`` is refused, the others are given an adapter that PEFT made.
    """
    family, base = FAMILIES[name], str(family_models.directory(name))
    write_rows(directory)
    outcomes = {}
    with contextlib.chdir(directory):
        plain_adapter(name, directory / "task_adapter", few=True)
        for command, arguments in commands(base).items():
            outcomes[command] = run_command(command, arguments)
            if outcomes[command].status != 0 and family.options and command in ("forget", "train"):
                remedied = run_command(command, commands(base, family.options)[command])
                assert remedied.status == 0, f"{command} {family.options}: {remedied.said}"
            if command == "forget" and not Path("forget_adapter").exists():
                plain_adapter(name, directory / "forget_adapter")
    return outcomes


def plain_adapter(name: str, directory: Path, few: bool = False) -> None:
    """An adapter that PEFT made, with random factors: of all linear layers, or of one kind of layer."""
    model = load(name)
    projections = [path.rpartition(".")[2] for path, module in model.named_modules() if _is_projection(path, module)]
    modules = projections[:1] if few else sorted(set(projections))
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type=task)
    adapted = get_peft_model(model, config)
    builders.fill(adapted, "default")
    adapted.save_pretrained(str(directory))


def _is_projection(path: str, module: torch.nn.Module) -> bool:
    in_decoder = re.search(r"(layers|blocks?|h)\.\d+\.", path) and not re.search("vision|visual", path)
    return bool(in_decoder) and type(module).__name__ in ("Linear", "Conv1D") and "out_proj" not in path


def load(name: str) -> PreTrainedModel:
    """The family's model from its files, by its own class."""
    import transformers

    base = family_models.directory(name)
    (architecture,) = AutoConfig.from_pretrained(base).architectures
    model = getattr(transformers, architecture).from_pretrained(base, attn_implementation="eager")
    return model.eval()
