"""Score the same texts in every runtime that is installed, and write the table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from peft_perta import attach_adapters, fuse_adapters
from peft_perta.adapters import EXPORTS, export_adapters
from peft_perta.comparison import smollm2
from peft_perta.data import write_file
from peft_perta.model import load_skeleton, quiet

from . import in_llama_cpp, in_mlx, in_torch, in_vllm
from .job import Place, Question, Runtime, answers, read_questions, write_questions

RUNTIMES = (*in_torch.RUNTIMES, *in_llama_cpp.RUNTIMES, *in_mlx.RUNTIMES, *in_vllm.RUNTIMES)
YARDSTICKS = {"adapters": "PEFT, stack of two", "base": "PEFT, no adapter"}
_NEW_TOKENS = 24


def prepare(options: argparse.Namespace) -> Place:
    """The adapters, their exports and the questions; what is there is kept.

    Without ``--adapter``, the negative adapter is the difference of the two that ship: retain-only minus task. On the
    full model it gives the retain-only model.
    """
    base, task = smollm2.base(), smollm2.ADAPTERS / "task_adapter"
    negative = options.adapter or options.output / "negative"
    place = Place(base, smollm2.find_gguf(), task, negative, options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    if not negative.exists():
        shipped = {"retain": smollm2.ADAPTERS / "retain_adapter", "task": task}
        model = attach_adapters(load_skeleton(str(base)), shipped)
        fuse_adapters(model, {"retain": 1.0, "task": -1.0}).save(negative)
    both, quantised = {str(task): 1.0, str(negative): 1.0}, str(place.quantised)
    exports = {
        "peft": (str(base), both), "mlx": (str(base), both), "vllm": (str(base), both), "gguf": (quantised, both),
        "gguf_task": (quantised, {str(task): 1.0}), "gguf_negative": (quantised, {str(negative): 2.0}),
        "vllm_task": (str(base), {str(task): 1.0}),
    }  # fmt: skip
    for name, (served, parts) in exports.items():
        if not place.exported(name).exists():
            export_adapters(served, parts, EXPORTS[name.partition("_")[0]], place.exported(name))
    return place


def ask(place: Place, rows: int) -> list[Question]:
    """The questions: answers of forget and retain rows, and the yardstick's own greedy answers."""
    file = place.output / "questions.json"
    if file.is_file():
        return read_questions(file)
    tokenizer = AutoTokenizer.from_pretrained(place.base, padding_side="left")
    questions, prompts = [], []
    for kind in ("forget", "retain"):
        for number, row in enumerate(smollm2.rows()[kind][:rows]):
            messages = [{"role": "user", "content": row["question"]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
            questions.append(Question(kind, prompt + answer, len(prompt)))
            prompts += [prompt] if number < rows // 2 else []
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.no_grad():
        found = in_torch.stacked(place).generate(**batch, max_new_tokens=_NEW_TOKENS, do_sample=False)
    for prompt, ids in zip(prompts, found[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        questions.append(Question("greedy", prompt + ids[:end], len(prompt)))
    write_questions(file, questions)
    return questions


def version_of(runtime: Runtime) -> str | None:
    """The version of a runtime's package; None if it is not installed."""
    try:
        return importlib.metadata.version(runtime.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(runtime: Runtime, place: Place, questions: list[Question]) -> None:
    """Score all questions in one runtime, and keep what it says."""
    file = place.output / "scores" / f"{runtime.weights} {runtime.name}.json"
    version = version_of(runtime)
    if version is None or (file.is_file() and "answers" in json.loads(file.read_text(encoding="utf-8"))):
        return
    record: dict[str, Any] = {"version": version}
    try:
        record["answers"] = answers(runtime.open(place), questions)
    except Exception as error:  # a runtime that does not start is a result
        record["fault"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    write_file(file, json.dumps(record))
    print(f"{runtime.name} ({runtime.weights}) is done: {record.get('fault', 'scored')}", flush=True)


def table(place: Place) -> str:
    """A line for each runtime."""
    lines = [
        "| runtime | version | weights | greedy answers as PEFT's | mean difference, nats a token | largest |"
        " forget rows, nats a token | retain rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kept = {}
    for runtime in RUNTIMES:
        file = place.output / "scores" / f"{runtime.weights} {runtime.name}.json"
        kept[runtime] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    of_yardsticks = {
        serves: next(kept[runtime] for runtime in RUNTIMES if runtime.name == name)["answers"]
        for serves, name in YARDSTICKS.items()
    }
    for runtime, record in kept.items():
        if "answers" not in record:
            reason = record.get("fault") or f"not run: {runtime.package} is not installed"
            lines.append(f"| {runtime.name} | {record.get('version', '-')} | {runtime.weights} | {reason} | | | | |")
            continue
        lines.append(_line(runtime, record, of_yardsticks[runtime.serves]))
    return "\n".join(lines)


def _line(runtime: Runtime, record: dict[str, Any], yardstick: list[dict[str, Any]]) -> str:
    differences, losses, same = [], {"forget": [], "retain": []}, []
    for ours, theirs in zip(yardstick, record["answers"], strict=True):
        if ours["kind"] == "greedy":
            same.append(all(top for _, top in theirs["scores"]))
            continue
        losses[ours["kind"]] += [-value for value, _ in theirs["scores"]]
        differences += [abs(a - b) for (a, _), (b, _) in zip(ours["scores"], theirs["scores"], strict=True)]
    means = {kind: sum(values) / len(values) for kind, values in losses.items()}
    greedy = f"{sum(same)} of {len(same)}" if runtime.serves == "adapters" else "-"
    return (
        f"| {runtime.name} | {runtime.package} {record['version']} | {runtime.weights} | {greedy} | "
        f"{sum(differences) / len(differences):.1e} | {max(differences):.1e} | {means['forget']:.3f} | "
        f"{means['retain']:.3f} |"
    )


def main() -> None:
    """Run what is installed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--adapter", type=Path, help="a negative adapter (default: retain-only minus task)")
    parser.add_argument("--rows", type=int, default=20, help="of each set (default: 20)")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    place = prepare(options)
    questions = ask(place, options.rows)
    for runtime in RUNTIMES:
        run(runtime, place, questions)
    write_file(options.output / "table.md", table(place) + "\n")
    print(table(place))


if __name__ == "__main__":
    main()
