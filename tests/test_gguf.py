"""A base in a GGUF file: the same model as its weights, and the whole way through the commands."""

import importlib.util
import json
import os
import re
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import builders
import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_perta import ConfigError, OutputError, load_base
from peft_perta.cli import main
from peft_perta.model import compare_bases, compare_names, identify_base, identify_base_files, load_skeleton

HEADS, KEY_HEADS, WIDTH, LAYERS, INNER = 4, 2, 32, 2, 48
WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    *(chr(n) for n in range(33, 127)),
    "\u0120",
    "th",
    "in",
]  # \u0120: the space of byte-level BPE
OTHER_WORDS = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_theta=10_000.0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a projection in llama.cpp's order: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: LlamaForCausalLM, architecture: str = "llama", words=WORDS, template: str = "", base: float = 1e4
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 2] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    if template:
        writer.add_chat_template(template)
    for name, tensor in model.state_dict().items():
        if ".layers." in name:
            _, number, layer = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(layer)
            tensor = permuted(tensor, heads) if heads else tensor
            target = f"blk.{number}.{NAMES[layer]}.weight"
        else:
            ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            target = f"{ends[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(target, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def file(model, tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("name", ["file", "directory", "named"])
def test_a_gguf_is_the_model_that_was_written(name, model, file, capsys):
    if name == "named":
        loaded, tokenizer = load_base(str(file.parent), gguf_file=file.name)
    else:
        loaded, tokenizer = load_base(str(file if name == "file" else file.parent))
    ids = torch.tensor([[5, 9, 12, 40, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert tokenizer.eos_token == "</s>"
    assert loaded.config._name_or_path == str(file)
    assert not hasattr(loaded.config, "quantization_config")
    assert f"{file} is dequantised" in "".join(capsys.readouterr())


def test_a_gguf_can_be_saved_and_loaded_again(model, file, tmp_path):
    loaded, _ = load_base(str(file))
    loaded.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 9, 12]])
    with torch.no_grad():
        again = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_gguf_in_four_bit_is_quantised_anew_and_leaves_no_copy(model, file, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    loaded, _ = load_base(str(file), four_bit=True)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert loaded.config._name_or_path == str(file)
    assert list((tmp_path / "scratch").iterdir()) == []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(OutputError, match="free to quantise a GGUF model anew, found 0 GB; set TMPDIR"):
        load_base(str(file), four_bit=True)


def test_a_gguf_in_four_bit_is_dequantised_on_the_host_and_freed_before_it_is_quantised(file, monkeypatch):
    whole, devices, load = [], [], AutoModelForCausalLM.from_pretrained

    def watched(*arguments, **more):
        assert not any(reference() is not None for reference in whole), "two copies are in memory"
        model, found = load(*arguments, **more)
        whole.append(weakref.ref(model))
        devices.append(more["device_map"])
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    loaded, _ = load_base(str(file), four_bit=True)
    assert whole[1]() is loaded
    assert devices[0] == "cpu"


@pytest.mark.parametrize("name", ["file", "directory"])
def test_a_skeleton_has_the_name_of_the_loaded_model(name, file):
    name = str(file if name == "file" else file.parent)
    loaded, skeleton = load_base(name)[0], load_skeleton(name)
    assert skeleton.config._name_or_path == loaded.config._name_or_path == str(file)


def test_a_skeleton_of_a_gguf_has_its_modules_and_no_weights(file):
    skeleton = load_skeleton(str(file))
    assert skeleton.config.num_hidden_layers == LAYERS
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_commands_take_a_gguf_and_verify_tells_it_from_another(file, tmp_path, capsys):
    rows = {}
    for name in ("forget", "retain"):
        rows[name] = str(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"question": f"{name[0]}{n}?", "answer": f"{name[1]}{n}!"}) + "\n" for n in range(6)]
        Path(rows[name]).write_text("".join(lines))
    base, forget, unlearn = ["--model", str(file)], str(tmp_path / "forget_adapter"), str(tmp_path / "unlearn")
    common = ["--forget", rows["forget"]]
    assert main(["forget", *base, *common, "--output", forget, "--epochs", "2", "--rank", "4"]) == 0
    common += ["--retain", rows["retain"], "--forget-adapter", forget]
    assert main(["unlearn", *base, *common, "--output", unlearn]) == 0
    assert json.loads((Path(unlearn) / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    capsys.readouterr()
    assert main(["verify", unlearn, "--base", str(file)]) == 0, capsys.readouterr().out
    assert main(["verify", unlearn, "--base", str(file.parent)]) == 0, capsys.readouterr().out
    (tmp_path / "other").mkdir()
    other = write_gguf(tmp_path / "other" / "tiny.gguf", llama(seed=1))
    assert main(["verify", unlearn, "--base", str(other)]) == 1
    capsys.readouterr()
    write_gguf(other, llama(), words=OTHER_WORDS)
    assert main(["verify", unlearn, "--base", str(other)]) == 1
    assert re.search("FAIL  the base's tokenizer +those of another model", capsys.readouterr().out)
    assert main(["merge", *base, unlearn, "--output", str(tmp_path / "merged")]) == 2
    assert "expected the full-precision base that it was made from" in capsys.readouterr().err


CHANGES = {
    "none": (0, {}, []),
    "weights": (1, {}, ["weights"]),
    "settings of the architecture": (0, {"base": 5e5}, ["weights"]),
    "tokenizer": (0, {"words": OTHER_WORDS}, ["tokenizer"]),
    "chat template": (0, {"template": "{{ messages }}"}, ["chat template"]),
}


@pytest.mark.parametrize(("seed", "change", "parts"), CHANGES.values(), ids=CHANGES)
def test_what_another_file_under_the_same_name_changes_is_told(seed, change, parts, file):
    before = identify_base_files(str(file))
    assert before == identify_base_files(str(file.parent)) == identify_base(load_skeleton(str(file)))["files"]
    write_gguf(file, llama(seed), **change)
    os.utime(file, ns=(1, 1))
    after = identify_base_files(str(file))
    same = compare_bases({"files": before}, {"files": after})
    assert {part: is_same for part, is_same in same.items() if not is_same} == dict.fromkeys(parts, False)
    assert {"weights", "tokenizer", "chat template"} == set(same)
    assert compare_names(str(file.parent), str(file)) is None


def test_the_ends_of_a_large_tensor_are_in_its_hash(tmp_path):
    hashes = []
    for place in (None, 0, -1):
        values = torch.zeros(64 * 1024)
        if place is not None:
            values[place] = 1
        file = tmp_path / f"{place}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tensor("token_embd.weight", values.view(64, 1024).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        hashes.append(identify_base_files(str(file))["weights"])
    assert len(set(hashes)) == 3


def test_a_file_of_the_same_name_with_other_weights_is_another_base(file, tmp_path):
    for folder, seed in (("same", 0), ("other", 1)):
        (tmp_path / folder).mkdir()
        write_gguf(tmp_path / folder / "tiny.gguf", llama(seed))
    assert compare_names(str(tmp_path / "same"), str(file)) is None
    assert "whose weights differ" in str(compare_names(str(tmp_path / "other" / "tiny.gguf"), str(file)))


def test_a_gguf_and_other_files_compare_in_what_both_tell(file, tmp_path):
    """The weights of a full-precision base are not those of its GGUF, and its tokens are written otherwise."""
    llama().save_pretrained(tmp_path / "full")
    builders.tokenizer().save_pretrained(tmp_path / "full")
    files = [{"files": identify_base_files(str(place))} for place in (tmp_path / "full", file)]
    assert compare_bases(*files) == {"chat template": True}


def test_a_gguf_that_cannot_be_read_is_refused_by_name(model, file, tmp_path):
    damaged = tmp_path / "damaged" / "damaged.gguf"
    damaged.parent.mkdir()
    damaged.write_bytes(b"<html>" + file.read_bytes())
    with pytest.raises(ConfigError, match=r"damaged\.gguf' cannot be loaded"):
        load_base(str(damaged))
    foreign = write_gguf(damaged.parent / "foreign.gguf", model, "warpdrive")
    with pytest.raises(ConfigError, match=r"foreign\.gguf' cannot be loaded: .*warpdrive.* not supported"):
        load_base(str(foreign))
    with pytest.raises(ConfigError, match=r"several GGUF files \(damaged\.gguf, foreign\.gguf\), expected one"):
        load_base(str(damaged.parent))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "ends early, at 0 bytes, within its metadata"),
        (3, "ends early, at 3 bytes, within its metadata"),
        (1000, "ends early, at 1,000 bytes, within its metadata"),
        (2400, "ends early, at 2,400 bytes, within its metadata"),
        (3400, "ends early: expected 91,040 bytes, found 3,400"),
        (78240, "ends early: expected 91,040 bytes, found 78,240"),
        (91039, "ends early: expected 91,040 bytes, found 91,039"),
    ],
)
@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_a_file_that_ends_early_is_to_be_downloaded_again(load, kept, message, file):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))} {message}; download it again$"):
        load(str(file))


@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_a_file_that_does_not_exist_is_named_with_those_that_do(load, file):
    wanted = f"misspelt.gguf: expected a GGUF file, found none; {file.parent} holds tiny.gguf: name one of these"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file.parent))}/{re.escape(wanted)}$"):
        load(str(file.parent / "misspelt.gguf"))
    file.rename(file.with_name("tiny"))
    with pytest.raises(ConfigError, match=r"misspelt\.gguf: .*holds no GGUF file: correct the path, or download"):
        load(str(file.parent / "misspelt.gguf"))
    with pytest.raises(ConfigError, match=r"nowhere/tiny\.gguf: .*nowhere is no directory on this machine"):
        load("nowhere/tiny.gguf")


@pytest.mark.parametrize("name", ["misspelt.gguf", "misspelt"])
def test_a_named_file_that_does_not_exist_is_named_with_those_that_do(name, model, file):
    write_gguf(file.with_name("other.gguf"), model)
    with pytest.raises(
        ConfigError, match=rf"/{name}: expected a GGUF file, found none; .* holds other\.gguf, tiny\.gg"
    ):
        load_base(str(file.parent), gguf_file=name)


def test_without_the_package_the_command_that_installs_it_is_named(file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="expected the package gguf to read it, found none; run: pip install gguf"):
        load_base(str(file))


def test_the_tokenizer_of_other_bases_is_untouched(tmp_path):
    """A directory with a config is no GGUF base, whatever else is in it."""
    builders.llama().save_pretrained(tmp_path)
    builders.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.Q4_0.gguf").write_bytes(b"GGUF")
    loaded, _ = load_base(str(tmp_path))
    assert loaded.config._name_or_path == str(tmp_path)
