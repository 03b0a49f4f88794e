"""Other loaders read an emitted directory without peft_perta installed, on float and 4-bit bases."""

import json
import subprocess
import sys

import builders
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from peft_perta import PerTAConfig, add_perta_adapter, get_perta_state_dict, save_perta_adapter, stack_adapters

# What a user of the emitted directory writes, without this package.
PROGRAM = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_perta":
            raise ModuleNotFoundError("peft_perta is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import peft_perta
    raise SystemExit("the block does not hold")
except ModuleNotFoundError:
    pass

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
settings = {"dtype": torch.float32}
if job["four_bit"]:
    settings["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}, **settings)

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(job["input_ids"])).logits.contiguous()

results = {}
results["peft, alone"] = logits(PeftModel.from_pretrained(load(job["base"]), job["emitted"]))
results["transformers, alone"] = logits(load(job["emitted"]))

stacked = PeftModel.from_pretrained(load(job["base"]), job["task"], adapter_name="task")
stacked.load_adapter(job["emitted"], adapter_name="perta_unlearn")
stacked.base_model.set_adapter(["task", "perta_unlearn"], inference_mode=True)
results["peft, stacked"] = logits(stacked)

stacked = load(job["base"])
stacked.load_adapter(job["task"], adapter_name="task")
stacked.load_adapter(job["emitted"], adapter_name="perta_unlearn")
stacked.set_adapter(["task", "perta_unlearn"])
results["transformers, stacked"] = logits(stacked)

save_file(results, job["results"])
"""
IDS = [[10, 20, 30, 40, 50, 60], [61, 51, 41, 31, 21, 11]]


def logits(model, names=None):
    if names is not None:
        stack_adapters(model, names)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


# Why the 4-bit tolerance is larger: on CPUs with AVX512-BF16, bitsandbytes repacks NF4 weights in an eval forward
# without gradients, rounds their scales to bfloat16 (8 bits: 2^-9 relative) and multiplies in bfloat16. Both
# processes do the same, and were seen to agree to the bit. But a build may sum in another order, and then the rounding
# of activations to bfloat16 shows (2^-9 of logits of size about 5). The adapter's effect is much larger, which the test
# asserts.
@pytest.mark.parametrize(
    ("base", "four_bit", "tolerance"),
    [(builders.adapted_saved_llama, False, 1e-5), (builders.adapted_nf4_llama, True, 2e-2)],
    ids=["float32", "nf4"],
)
def test_another_process_without_this_package_gets_the_same_logits(base, four_bit, tolerance, tmp_path):
    model = base()
    model.save_pretrained(tmp_path / "adapters", selected_adapters=["task"])
    arguments = (PerTAConfig(granularity="delta", strength=3.0), builders.forget_rows(), builders.retain_rows())
    settings = {"tokenizer": builders.tokenizer(), "show_progress_bar": False}
    save_perta_adapter(tmp_path / "emitted", *get_perta_state_dict(model, *arguments, **settings))
    add_perta_adapter(model, *arguments, **settings)
    job = {
        "base": str(builders.llama_directory()),
        "task": str(tmp_path / "adapters" / "task"),
        "emitted": str(tmp_path / "emitted"),
        "results": str(tmp_path / "results.safetensors"),
        "four_bit": four_bit,
        "input_ids": IDS,
    }
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(job)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = load_file(tmp_path / "results.safetensors")
    expected = {
        "alone": logits(model, ["perta_unlearn"]),
        "stacked": logits(model, ["task", "perta_unlearn"]),
    }
    assert set(results) == {f"{loader}, {how}" for loader in ("peft", "transformers") for how in expected}
    for name, logits_found in results.items():
        error = (logits_found - expected[name.rpartition(", ")[2]]).abs().max()
        assert error <= tolerance, f"{name}: {error:.3g}"
    # The negative adapter changes the logits by far more than the tolerance.
    without = {"stacked": logits(model, ["task"])}
    model.base_model.disable_adapter_layers()
    without["alone"] = logits(model)
    for how, plain in without.items():
        assert (plain - expected[how]).abs().max() > 25 * tolerance


def test_a_served_adapter_is_swapped_for_another_in_place(tmp_path):
    """PEFT's ``hotswap_adapter``: the scaling of both is 1, so nothing of the first one stays."""
    model = builders.adapted_saved_llama()
    for name, strength in (("weak", 0.5), ("strong", 3.0)):
        save_perta_adapter(tmp_path / name, *builders.negate(model, weighting="uniform", strength=strength))

    def served(name):
        return PeftModel.from_pretrained(builders.saved_llama(), tmp_path / name)

    swapped, expected = served("weak"), logits(served("strong"))
    assert (logits(swapped) - expected).abs().max() > 1e-2
    hotswap_adapter(swapped, str(tmp_path / "strong"), adapter_name="default")
    torch.testing.assert_close(logits(swapped), expected, rtol=0, atol=1e-6)
