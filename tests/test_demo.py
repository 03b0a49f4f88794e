"""The shipped model is what the docs say, and the demo writes what it promises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_perta import attach_adapters, load_base, load_provenance
from peft_perta.comparison import ASSETS, DemoSettings, run_demo, small, smollm2
from peft_perta.data import load_samples, read_rows
from peft_perta.evaluation import Subject, generate, losses_of
from peft_perta.evaluation.metrics.probability import probability

TINY = DemoSettings(
    rank=8,
    epochs=6,
    learning_rate=3e-3,
    forget_rows=20,
    weight_samples=8,
    judged_rows=2,
    generated_rows=1,
    max_new_tokens=8,
    curve=(0.0, 0.5, 1.0),
)


@pytest.fixture(scope="module")
def shipped():
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = attach_adapters(base, {"task": ASSETS / "task_adapter", "retain-only": ASSETS / "retain_adapter"})
    return model, tokenizer


def losses(shipped, split: str, adapters: list[str]):
    model, tokenizer = shipped
    rows = read_rows(ASSETS / f"{split}.jsonl")
    return losses_of(model, load_samples(rows[:: max(1, len(rows) // 40)], tokenizer), adapters=adapters)


@pytest.mark.parametrize("split", ["forget", "retain"])
def test_the_full_model_knows_both_sets_and_the_origin_neither(shipped, split):
    assert probability(losses(shipped, split, ["task"])).mean() > 0.8
    assert probability(losses(shipped, split, [])).mean() < 0.15


@pytest.mark.parametrize("adapters", [[], ["task"], ["retain-only"]])
def test_every_model_knows_the_general_rows(shipped, adapters):
    assert probability(losses(shipped, "general", adapters)).mean() > 0.5


def test_the_retain_only_model_knows_the_retain_set_and_is_a_fair_target_on_the_forget_set(shipped):
    """Although it never saw the forget authors, it predicts part of the answers about them."""
    assert probability(losses(shipped, "retain", ["retain-only"])).mean() > 0.8
    forget = losses(shipped, "forget", ["retain-only"])
    assert forget.mean() <= 5.0
    assert probability(forget).mean() < 0.15


def test_the_full_model_answers_forget_questions_and_stops(shipped):
    model, tokenizer = shipped
    rows = read_rows(ASSETS / "forget.jsonl")[:8]
    answers = generate(Subject(model, tokenizer, ["task"]), rows)
    assert sum(answer == row["answer"].strip() for answer, row in zip(answers, rows, strict=True)) >= 4


def test_shipped_files_are_small_and_plain():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    for folder in ("task_adapter", "retain_adapter"):
        assert all(
            key.endswith(("lora_A.weight", "lora_B.weight"))
            for key in load_file(ASSETS / folder / "adapter_model.safetensors")
        )


def test_no_forget_row_is_in_another_set():
    questions = {
        name: {row["question"] for row in read_rows(ASSETS / f"{name}.jsonl")}
        for name in ("forget", "retain", "general")
    }
    assert not questions["forget"] & questions["retain"]
    assert not questions["forget"] & questions["general"]


def test_the_demo_writes_an_adapter_a_report_and_a_picture(tmp_path: Path, capsys):
    """On the 4-bit base; the README's quickstart and the examples do the same on the float base.

    Only the sizes are smaller than the default ones: one forget author, few steps, rows and generated tokens. No check
    depends on them. The general rows are texts, as those of the real model's testbed are: their loss is shown, and no
    answer is generated.
    """
    testbed = replace(small(), rows={**small().rows, "general": smollm2.rows()["general"]})
    result = run_demo(tmp_path / "out", four_bit=True, settings=TINY, testbed=testbed)

    printed = capsys.readouterr().out
    labels = [label for label, _, _ in result.table]
    assert labels == ["full model", *["plain negation", "PerTA-grad"] * 2, "retain-only model"]
    assert all(label in printed for label in labels)
    in_full = [scores["forget"].truth_score is not None for _, _, scores in result.table]
    assert in_full == [True, False, False, True, True, True]
    assert str(tmp_path / "out" / "adapter") in printed
    for _, _, scores in result.table:
        assert scores["general"].rouge_l_recall is None
        assert scores["general"].loss > 1
    assert result.table[0][2]["retain"].rouge_l_recall is not None

    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["table"][0]["forget"]["probability"] == result.table[0][2]["forget"].probability
    target = saved["points"]["retain-only"]["forget"]
    for match in saved["matched_forgetting"].values():
        assert match["loss"] == pytest.approx(target, rel=0.02)
    assert (tmp_path / "out" / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    provenance, _ = load_provenance(tmp_path / "out" / "adapter")
    assert provenance.config["strength"] in [pytest.approx(m["strength"]) for m in saved["matched_forgetting"].values()]
