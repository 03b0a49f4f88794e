"""Exports hold the adapters' sum, by readers that are not ours; what a runtime cannot say is refused in one line."""

import errno
import json
import os
import re
import shutil

import builders
import gguf
import jinja2
import pytest
import tables
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from test_gguf import llama, write_gguf
from transformers import AutoModelForCausalLM

from benchmarks.serving.in_llama_cpp import rewritten
from peft_perta import AdapterError, ConfigError, OutputError, save_perta_adapter
from peft_perta.adapters import EXPORT_NAME, EXPORTS, export_adapters, format_checks, judge_runtimes, verify_adapter
from peft_perta.adapters.export import merged_gguf
from peft_perta.adapters.export._chat_pieces import read_pieces
from peft_perta.cli import main
from peft_perta.data import note

IDS = torch.tensor([[5, 9, 12, 40, 7]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(model, seed=0, **settings):
    """A model with an adapter whose factors are drawn at random."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=ALL, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def place(tmp_path):
    """A base as a GGUF, and two adapters of it with what both together answer."""
    base = write_gguf(tmp_path / "tiny.gguf", llama())
    for name, seed in (("one", 1), ("two", 2)):
        model = adapted(llama(), seed)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def expected(place, strength):
    model = PeftModel.from_pretrained(llama(), place / "one", adapter_name="one")
    model.load_adapter(place / "two", adapter_name="two")
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.set_scale("two", strength)
    model.base_model.set_adapter(["one", "two"])
    return logits(model)


def export(place, to, output="out", base=None, strength=-0.5, **settings):
    parts = {str(place / "one"): 1.0, str(place / "two"): strength}
    return export_adapters(str(base or place / "tiny.gguf"), parts, EXPORTS[to], place / output, **settings)


STAND_IN = """
import sys
import gguf
from safetensors.numpy import load_file
model, file = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
writer = gguf.GGUFWriter(file, "llama")
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
if "--vocab-only" not in sys.argv:
    assert sys.argv[sys.argv.index("--outtype") + 1] == "f32"
    for name, value in load_file(f"{model}/model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A stand-in for llama.cpp's converter, first on the PATH; the real one is in tests/test_export_runtimes.py."""
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script


@pytest.mark.parametrize("to", EXPORTS)
def test_an_export_lists_its_files_and_says_what_serves_it(to, place, converter):
    base = builders.llama_directory()
    model = builders.adapted_saved_llama()
    model.save_pretrained(place)
    save_perta_adapter(place / "mine", *builders.negate(model, weighting="uniform"))
    record = export_adapters(str(base), {str(place / "mine"): 1.0}, EXPORTS[to], place / "out")
    written = {file.name for file in (place / "out").iterdir()}
    assert written == tables.EXPORTS[to] | {EXPORT_NAME, "SERVING.md"}
    page = (place / "out" / "SERVING.md").read_text()
    assert all(command in page for command in record.commands)
    assert "still knows" in page
    assert str(place / "out") in record.commands[0]
    kept = json.loads((place / "out" / EXPORT_NAME).read_text())
    assert (kept["rank"], set(kept["files"])) == (8, written - {EXPORT_NAME})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gguf_holds_the_sum_as_llama_cpp_lays_it_out(dtype, place):
    """Added to the base's GGUF tensor by tensor, and read back by transformers, which undoes the permutation."""
    export(place, "gguf", dtype=dtype)
    reader = gguf.GGUFReader(place / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert [fields[key] for key in ("general.type", "adapter.type", "general.architecture")] == [
        "adapter", "lora", "llama",
    ]  # fmt: skip
    factors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(factors) == 2 * 2 * len(ALL)

    def added(name, values):
        if f"{name}.lora_b" not in factors:
            return values
        B, A = factors[f"{name}.lora_b"], factors[f"{name}.lora_a"]
        return values + fields["adapter.lora.alpha"] / B.shape[1] * B @ A

    (place / "merged").mkdir()
    rewritten(place / "tiny.gguf", place / "merged" / "merged.gguf", added)
    found = AutoModelForCausalLM.from_pretrained(place / "merged", gguf_file="merged.gguf")
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(logits(found), expected(place, -0.5), rtol=0, atol=tolerance)


def test_mlx_gets_transposed_factors_with_the_scaling_in_them(place):
    (place / "model").mkdir()
    llama().save_pretrained(place / "model")
    for name in ("one", "two"):
        file = place / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(place / "model")}))
    export(place, "mlx", base=place / "model")
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"], config["lora_parameters"]["scale"]) == ("lora", 2, 1.0)
    factors = load_file(place / "out" / "adapters.safetensors")
    model = llama()
    for name, module in model.named_modules():
        if f"{name}.lora_a" in factors:
            assert name.split(".", 3)[-1] in config["lora_parameters"]["keys"]
            module.weight.data += torch.from_numpy((factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T)
    torch.testing.assert_close(logits(model), expected(place, -0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("theta", "beside", "told"), [(1e5, False, True), (1e5, True, False), (1e4, False, False)])
def test_where_mlx_lm_would_not_find_the_rotary_angles_is_told(theta, beside, told, place, capsys):
    """transformers 5 writes rope_theta into rope_parameters alone; mlx-lm reads it beside them, and has a default."""
    model = place / "model"
    model.mkdir()
    llama().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = theta
    (model / "config.json").write_text(json.dumps({**config, **({"rope_theta": theta} if beside else {})}))
    EXPORTS["mlx"].check(str(model), llama())
    assert ('add "rope_theta": 100000.0 to the file' in capsys.readouterr().err) == told


def test_peft_and_vllm_get_one_adapter_and_vllm_its_rank(place):
    export(place, "peft")
    model = PeftModel.from_pretrained(llama(), place / "out")
    torch.testing.assert_close(logits(model), expected(place, -0.5), rtol=0, atol=1e-5)
    model = builders.adapted_saved_llama()
    model.save_pretrained(place)
    base = builders.llama_directory()
    record = export_adapters(str(base), {str(place / "task"): 1.0}, EXPORTS["vllm"], place / "v")
    options = f"--enable-lora --max-lora-rank 8 --lora-modules unlearned={place / 'v'}"
    assert record.commands == [f"vllm serve {base} {options}"]


# Ollama's template


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def by_go(template, messages):
    """A Modelfile's template, rendered: its few actions have counterparts in Jinja."""
    actions = {
        "range .Messages": "{% for m in messages %}", ".Content": "{{ m.content }}", ".Response": "",
    }  # fmt: skip
    depth = []

    def translated(match):
        action = match[1].strip()
        role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', action)
        if action == "end":
            return "{% endfor %}" if depth.pop() == "range" else "{% endif %}"
        if role:
            depth.extend([] if role[1] else ["if"])
            return f"{{% {'elif' if role[1] else 'if'} m.role == '{role[2]}' %}}"
        depth.extend(["range"] if action.startswith("range") else [])
        return actions[action]

    text = re.sub(r"\{\{(.*?)\}\}", translated, template)
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)


@pytest.mark.parametrize(
    ("template", "default", "stops"),
    [
        (SMOLLM2, "You are helpful", ["<|im_end|>", "<eos>"]),
        (builders.CHAT_TEMPLATE, None, ["<eos>"]),
        (NO_SYSTEM, None, ["<eos>"]),
    ],
    ids=["chatml", "tiny", "no system"],
)
def test_a_modelfile_writes_the_prompts_of_the_chat_template(template, default, stops):
    tokenizer = builders.tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    pieces = read_pieces(tokenizer)
    assert (pieces.default_system, pieces.stops) == (default, stops)
    talks = [[("user", "Hi")], [("user", "Hi"), ("assistant", "Yes"), ("user", "Who?")]]
    talks += [[("system", "Be short"), *talk] for talk in talks] if pieces.has_system else []
    for talk in talks:
        messages = [{"role": role, "content": content} for role, content in talk]
        given = messages if default is None or talk[0][0] == "system" else [
            {"role": "system", "content": default}, *messages,
        ]  # fmt: skip
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_go(pieces.go_template(), given) == wanted


def test_a_chat_template_that_does_more_is_refused():
    tokenizer = builders.tokenizer(chat=True)
    tokenizer.chat_template = builders.CHAT_TEMPLATE + "{% if messages|length > 2 %}!{% endif %}"
    with pytest.raises(ConfigError, match="does more than a Modelfile can say"):
        read_pieces(tokenizer)


# Refusals


def refused(place, to, error, message, **settings):
    with pytest.raises(error, match=message) as caught:
        export(place, to, **settings)
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()


def test_an_architecture_that_was_not_tested_is_refused(place):
    (place / "model").mkdir()
    builders.gpt2().save_pretrained(place / "model")
    for to in ("gguf", "ollama", "mlx"):
        refused(
            place,
            to,
            ConfigError,
            r"of an architecture that was tested \(llama, .*\), found gpt2",
            base=place / "model",
        )


@pytest.mark.parametrize("to", ["mlx", "vllm"])
def test_a_gguf_is_refused_where_the_runtime_does_not_serve_it(to, place):
    refused(place, to, ConfigError, "expected the base as a directory or a hub name, found the GGUF file")


def test_a_rank_that_no_runtime_takes_is_refused(place):
    for name in ("one", "two"):
        model = get_peft_model(llama(), LoraConfig(r=200, target_modules=["q_proj"]))
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        model.peft_config["default"].base_model_name_or_path = str(place / "tiny.gguf")
        model.save_pretrained(place / name)
    refused(place, "gguf", ConfigError, "ranks add up to 400, expected at most 256; give a rank to truncate to")


def test_a_gguf_without_the_tensors_of_the_adapter_is_refused(place, monkeypatch):
    layout = EXPORTS["gguf"].write.__globals__["read_gguf_layout"](place / "tiny.gguf")
    shapes = {**layout.shapes, "blk.1.attn_k.weight": (16, 31)}
    other = type(layout)(layout.architecture, shapes)
    monkeypatch.setattr("peft_perta.adapters.export.gguf.read_gguf_layout", lambda _: other)
    refused(
        place, "gguf", AdapterError, r"expected a tensor blk.1.attn_k.weight of shape \(16, 32\).*found one of shape"
    )


def test_a_full_disk_leaves_nothing(place, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    refused(place, "gguf", OutputError, "could not be written: .*No space left on device")
    assert not list(place.glob(".out*"))


def test_a_merged_gguf_without_a_converter_that_takes_the_model_is_refused_before_anything_is_merged(
    place, converter, monkeypatch
):
    base = builders.llama_directory()
    monkeypatch.setattr(merged_gguf, "merge_adapters", lambda *_, **__: pytest.fail("merged"))
    converter.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    refused(place, "gguf-merged", ConfigError, "not convert the model: NotImplementedError: BPE pre-tok", base=base)
    converter.write_text("raise OSError(28, 'No space left on device')")
    refused(place, "gguf-merged", OutputError, "has no space for the GGUF; free some", base=base)
    converter.unlink()
    monkeypatch.setenv("PATH", str(converter.parent))
    refused(place, "gguf-merged", ConfigError, "convert_hf_to_gguf.py on the PATH, found none; add", base=base)
    refused(place, "gguf-merged", ConfigError, "expected the full-precision base, found the GGUF file")


def test_verify_compares_a_merged_gguf_with_its_base(place, converter, capsys):
    note.cache_clear()
    base = str(builders.llama_directory())
    model = builders.adapted_saved_llama()
    save_perta_adapter(place / "mine", *builders.negate(model, weighting="uniform"))
    export_adapters(base, {str(place / "mine"): 1.0}, EXPORTS["gguf-merged"], place / "out")
    assert "rounding to 4 bits can undo the edit" in capsys.readouterr().err
    checks = verify_adapter(place / "out", base)
    assert all(check.passed for check in checks), format_checks(checks)
    llama_cpp = {each.runtime.name: each.verdict for each in judge_runtimes(place / "out", checks)}
    assert (llama_cpp["llama.cpp"], llama_cpp["vLLM"]) == ("pass", "not supported")
    failed = [check for check in verify_adapter(place / "out", str(place / "tiny.gguf")) if check.failed]
    assert [check.name for check in failed] == ["names and shapes as the base's"]


def test_a_foreign_adapter_is_refused_by_the_command(place, capsys):
    (place / "two" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    arguments = ["export", str(place / "two"), "--base", str(place / "tiny.gguf"), "--to", "gguf"]
    assert main([*arguments, "--output", str(place / "out")]) == 2
    assert (
        "expected a LoRA adapter (peft_type 'LORA'), found an adapter of the peft_type 'IA3'" in capsys.readouterr().err
    )


def test_experts_are_refused(place):
    model = builders.adapted_mixtral()
    model.save_pretrained(place)
    (place / "model").mkdir()
    model.get_base_model().config.save_pretrained(place / "model")
    adapter = next(
        path.parent for path in place.glob("*/adapter_config.json") if path.parent.name not in ("one", "two")
    )
    with pytest.raises(AdapterError, match="edits expert parameters"):
        export_adapters(str(place / "model"), {str(adapter): 1.0}, EXPORTS["vllm"], place / "out")


# verify


def test_verify_checks_what_was_exported(place):
    base = str(place / "tiny.gguf")
    export(place, "gguf")
    checks = verify_adapter(place / "out", base)
    assert all(check.passed for check in checks), format_checks(checks)
    assert {"GGUF header", "finite", "names and shapes as the base's"} <= {check.name for check in checks}
    shutil.copy(place / "tiny.gguf", place / "out" / "adapter.gguf")  # a model, no adapter
    failed = {check.name: check.found for check in verify_adapter(place / "out", base) if check.failed}
    assert failed["hash of adapter.gguf"].startswith("changed since")
    assert "cannot be read" in failed["GGUF header"]


def test_verify_finds_an_export_for_another_base(place):
    export(place, "gguf")
    (place / "other").mkdir()
    builders.llama().save_pretrained(place / "other")
    failed = [check for check in verify_adapter(place / "out", str(place / "other")) if check.failed]
    assert [check.name for check in failed] == ["names and shapes as the base's"]
    assert "blk.0.attn_q.weight: (32, 32), the base has (64, 64)" in failed[0].found
