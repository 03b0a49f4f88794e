"""General benchmarks: lm-eval's numbers for the model with exactly these adapters; the model is left as it was."""

import importlib.util
import json
import random
import sys
import types

import builders
import laws
import numpy
import pytest
import torch

from peft_perta import ConfigError
from peft_perta.evaluation import SUITES, Subject, check_lm_eval, general_benchmarks, generate
from peft_perta.evaluation.suites.suite import SuiteSettings

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; pip install 'peft-perta[benchmarks]'",
)
NAMES = ["Lima", "Bonn", "Rome", "Oslo", "Basil Khan", "Ada", "Four, of course", "Li", "King"]
DRAW = random.Random(5)
ROWS = [
    {"question": f"Who wrote {DRAW.choice(NAMES)}?", "choices": DRAW.sample(NAMES, 4), "answer": DRAW.randrange(4)}
    for _ in range(12)
]
DATA = """\
dataset_path: json
dataset_kwargs:
  data_files: {directory}/rows.json
  cache_dir: {directory}/cache
test_split: train
num_fewshot: 0
"""
TASKS = {
    "tiny_letters": r"""
output_type: multiple_choice
description: "The following are multiple choice questions (with answers).\n\n"
doc_to_text: "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "tiny_texts": r"""
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_answers": r"""
output_type: generate_until
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
GROUP = "group: tiny\ntask: [tiny_letters, tiny_texts]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


def write(directory, rows=ROWS):
    (directory / "rows.json").write_text(json.dumps(rows))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(directory=directory)}{text.lstrip()}")
    (directory / "tiny.yaml").write_text(GROUP)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tasks"))


def subject(model=None, adapters=("task",), chat=False, batch_size=2):
    model = model or builders.adapted_llama()
    return Subject(model, builders.tokenizer(chat), list(adapters), batch_size, show_progress_bar=False)


def scores(log, metric):
    return [log[metric]["value_by_index"][str(index)]["score"] for index in range(len(ROWS))]


@installed
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("adapters", [["task"], ["task", "forget"]])
def test_choices_are_those_of_our_own_suite(tasks, chat, adapters):
    judged = subject(adapters=adapters, chat=chat)
    found = general_benchmarks(judged, ["tiny_texts"], include_path=tasks)
    ours = SUITES["choices"].evaluate(judged, {"wmdp": ROWS}, SuiteSettings())
    for metric, same in (("tiny_texts/acc", "choices_text_acc"), ("tiny_texts/acc_norm", "choices_text_acc_norm")):
        assert scores(found, metric) == scores(ours, same)
        assert found[metric]["agg_value"] == pytest.approx(sum(scores(found, metric)) / len(ROWS))
    if not chat:  # there lm-eval puts the description into a system's turn
        found = general_benchmarks(judged, ["tiny_letters"], include_path=tasks)
        assert scores(found, "tiny_letters/acc") == scores(ours, "choices_acc")
        assert 0 < sum(scores(ours, "choices_text_acc")) < len(ROWS)


@installed
def test_generations_are_our_own(tasks, tmp_path):
    """Either every true answer is the model's own generation, or none is."""
    model = builders.adapted_llama()
    asked = [{"question": row["question"], "answer": "?"} for row in ROWS]
    said = generate(Subject(model, builders.tokenizer(), ["task"]), asked, max_new_tokens=6)
    told = [{**row, "choices": [text.split("\n")[0]] * 4, "answer": 0} for row, text in zip(ROWS, said, strict=True)]
    right = general_benchmarks(subject(model), ["tiny_answers"], include_path=write(tmp_path, told))
    wrong = general_benchmarks(subject(model), ["tiny_answers"], include_path=tasks)
    assert right["tiny_answers/exact_match"]["agg_value"] > wrong["tiny_answers/exact_match"]["agg_value"] == 0


@installed
def test_a_group_and_a_limit(tasks):
    log = general_benchmarks(subject(), ["tiny", "tiny_answers"], include_path=tasks, limit=2)
    assert {len(entry["value_by_index"]) for name, entry in log.items() if not name.startswith("tiny/")} == {2}
    assert set(log) == {
        "tiny/acc", "tiny_letters/acc", "tiny_texts/acc", "tiny_texts/acc_norm", "tiny_answers/exact_match"
    }  # fmt: skip
    mean = (log["tiny_letters/acc"]["agg_value"] + log["tiny_texts/acc"]["agg_value"]) / 2
    assert log["tiny/acc"] == {"agg_value": pytest.approx(mean), "value_by_index": {}}
    assert json.loads(json.dumps(log)) == log


@installed
@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_nf4_llama])
def test_the_model_goes_back_as_it_came(tasks, build):
    model = build().train()
    tokens = builders.tokenizer()
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with laws.untouched(model):
        judged = Subject(model, tokens, ["task"], show_progress_bar=False)
        general_benchmarks(judged, ["tiny_texts", "tiny_answers"], include_path=tasks)
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert tokens.padding_side == "right"


@installed
def test_a_task_that_is_unknown_or_out_of_reach_is_refused(tasks, tmp_path):
    with pytest.raises(ConfigError, match="expected the names of lm-eval tasks, found 'no_such_task'"):
        general_benchmarks(subject(), ["no_such_task"], include_path=tasks)
    broken = write(tmp_path)
    (broken / "rows.json").unlink()
    with pytest.raises(ConfigError, match=r"the lm-eval task 'tiny_texts' could not be loaded .*check its YAML file"):
        general_benchmarks(subject(), ["tiny_texts"], include_path=broken)
    with pytest.raises(ConfigError, match=r"expected a directory of task files at .*nowhere"):
        general_benchmarks(subject(), ["tiny_texts"], include_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="limit: expected at least 1 row"):
        general_benchmarks(subject(), ["tiny_texts"], include_path=tasks, limit=0)
    with pytest.raises(ConfigError, match="expected at least one lm-eval task"):
        general_benchmarks(subject(), [], include_path=tasks)


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="need lm-eval, found none"):  # before a model is loaded
        check_lm_eval()
    with pytest.raises(ConfigError, match=r"need lm-eval, found none .*pip install 'peft-perta\[benchmarks\]'"):
        general_benchmarks(subject(), ["hellaswag"])


def test_nothing_of_the_models_own_generation_counts(monkeypatch):
    """A stand-in for lm-eval, which sees the model while it judges: a repetition penalty is no part of greedy."""
    seen = []
    evaluator, huggingface, tasks = (
        types.ModuleType(f"lm_eval.{name}") for name in ("evaluator", "models.huggingface", "tasks")
    )
    huggingface.HFLM = lambda model, **_: types.SimpleNamespace(model=model)
    tasks.TaskManager = lambda **_: types.SimpleNamespace(
        all_tasks=["tiny"], all_subtasks=["tiny"], load=lambda names: {"groups": {}, "tasks": {"tiny": object()}}
    )
    for module in (evaluator, huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for package in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))

    def simple_evaluate(judged, **_):
        seen.append(judged.model.generation_config)
        return {"results": {}, "samples": {}}

    evaluator.simple_evaluate = simple_evaluate
    model = builders.llama()
    model.generation_config.update(repetition_penalty=1.9, suppress_tokens=[70], eos_token_id=[1, 71])
    judged = Subject(model, builders.tokenizer())
    with laws.untouched(model):
        assert general_benchmarks(judged, ["tiny"]) == {}
    (config,) = seen
    assert (config.repetition_penalty, config.suppress_tokens, config.eos_token_id) == (None, None, [1, 71])
