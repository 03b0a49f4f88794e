"""What stands around an answer: learned from the chat template, used to ask and to stop, and left out of scores."""

import math
import re
from pathlib import Path

import builders
import laws
import pytest
import torch
import trl
from transformers import AddedToken

from peft_perta import evaluate
from peft_perta.data import answer_frame, batches, encode_row, load_samples
from peft_perta.evaluation import AttackSettings, Subject, Victims, generate, run_attacks, score_completions
from peft_perta.model import sample_losses

ROWS = [
    {"question": "Who wrote Hatter?", "answer": "Basil Q. Khan", "perturbed_answer": ["Li"]},
    {"question": "And where?", "answer": "In Kuwait,\nin 1956.", "perturbed_answer": ["Bonn"]},
]
SHIPPED = Path(trl.__file__).parent / "chat_templates"


def shipped(name):
    return (SHIPPED / f"{name}.jinja").read_text()


SMOLLM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}%s{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EOS_AND_LINE = builders.CHAT_TEMPLATE.replace("eos_token", "eos_token + '\n'")
REFUSING = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + SMOLLM
PARTS = SMOLLM.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
THINKING = SMOLLM.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
OPENINGS = {
    THINKING: "<think>\n\n</think>\n\n",
    shipped("gptoss"): "<|channel|>final<|message|>",
    shipped("glm4moe"): "\n<think></think>\n",
}


def plain(end):
    return PLAIN.replace("%s", end)


def chat(template, *, eos="<eos>"):
    """The characters' tokenizer with marks of its template's own."""
    tokenizer = builders.tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos, "bos_token": "<bos>", "extra_special_tokens": MARKS})
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])  # not special, as Qwen3 has them
    tokenizer.chat_template = template
    return tokenizer


MARKS = [
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
]  # fmt: skip
# name -> (template, eos, what closes a sample, what stops a model besides the eos)
CASES = {
    "SmolLM": (SMOLLM, "<|endoftext|>", "<|im_end|>\n", "<|im_end|>"),
    "Qwen2.5": (shipped("qwen2_5"), "<|endoftext|>", "<|im_end|>\n", "<|im_end|>"),
    "Gemma": (shipped("gemma"), "<eos>", "<end_of_turn>\n", "<end_of_turn>"),
    "Llama 3": (shipped("llama3"), "<|endoftext|>", "<|eot_id|>", "<|eot_id|>"),
    "Phi-3": (shipped("phi3"), "<|endoftext|>", "<|end|>\n<|endoftext|>", "<|end|>"),
    "GLM-4, whose next turn ends the last": (shipped("glm4moe"), "<|endoftext|>", "", "<|user|>"),
    "the eos": (builders.CHAT_TEMPLATE, "<eos>", "<eos>", "<eos>"),
    "the eos and a line": (EOS_AND_LINE, "<eos>", "<eos>\n", "<eos>"),
    "thinks first": (THINKING, "<|endoftext|>", "<|im_end|>\n", "<|im_end|>"),
    "GPT-OSS": (shipped("gptoss"), "<|endoftext|>", "<|return|>", "<|return|>"),
    "wants a system turn": (REFUSING, "<eos>", "<|im_end|>\n", "<|im_end|>"),
    "wants content in parts": (PARTS, "<eos>", "<|im_end|>\n", "<|im_end|>"),
}


@pytest.mark.parametrize(("template", "eos", "closing", "mark"), CASES.values(), ids=CASES)
def test_the_template_tells_what_closes_a_turn(template, eos, closing, mark):
    tokenizer = chat(template, eos=eos)
    frame = answer_frame(tokenizer)
    assert [tokenizer.decode(ids) for ids in frame.closings] == [eos, closing]
    assert tokenizer.convert_ids_to_tokens(list(dict.fromkeys(frame.end_tokens))) == list(dict.fromkeys([eos, mark]))
    assert frame.end_text is None
    assert tokenizer.decode(list(frame.opening)) == OPENINGS.get(template, "")


def test_every_template_that_trl_ships_ends_an_answer_by_a_mark():
    names = [path.stem for path in SHIPPED.glob("*.jinja") if not path.stem.endswith("_training")]
    assert len(names) > 20
    for name in names:
        tokenizer = chat(shipped(name))
        tokenizer.add_tokens(sorted(set(re.findall(r"<[^\s<>']+>", shipped(name)))))
        frame = answer_frame(tokenizer)
        assert (len(frame.end_tokens), frame.end_text) == (2, None), name


@pytest.mark.parametrize(
    ("end", "closing", "text"),
    [
        ("\n###\n", "\n###\n", "\n###"),
        ("\n", "\n", "\nuser:"),
        ("", "", "user:"),
        ("</a><|end|>\n", "</a><|end|>\n", "</a>"),
    ],
)
def test_a_turn_may_close_in_plain_text(end, closing, text):
    """A line break alone is no end, since answers have lines: there the next turn's beginning is."""
    tokenizer = chat(plain(end))
    frame = answer_frame(tokenizer)
    assert (tokenizer.decode(frame.closings[1]), frame.end_text) == (closing, text)
    sample = encode_row(ROWS[1], tokenizer)
    completion = sample.input_ids[sample.labels != -100].tolist()
    assert tokenizer.decode(completion[frame.words(completion)]).strip() == ROWS[1]["answer"]


def test_without_a_template_the_eos_ends_an_answer():
    assert answer_frame(builders.tokenizer()).end_tokens == (1,)
    assert answer_frame(builders.tokenizer()).closings == ((1,),)


def test_a_template_that_renders_no_conversation_leaves_the_eos_with_a_warning():
    with pytest.warns(UserWarning, match="renders no conversation .* only the eos '<eos>' counts"):
        frame = answer_frame(chat("{{ raise_exception('no') }}"))
    assert (frame.end_tokens, frame.end_text) == ((1,), None)


def test_what_closes_a_completion_is_counted_where_it_was_cut_too():
    tokenizer = chat(SMOLLM)
    frame = answer_frame(tokenizer)
    whole = encode_row(ROWS[0], tokenizer).input_ids.tolist()
    stop = len(whole) - 2
    assert [frame.words(whole[:size]) for size in range(stop - 1, len(whole) + 1)] == [
        slice(0, size) for size in (stop - 1, stop, stop, stop)
    ]
    row = encode_row({"prompt": "ab", "completion": "cd"}, tokenizer).input_ids.tolist()
    assert frame.words(row) == slice(0, 4)
    assert frame.words([]) == slice(0, 0)


# A model that recites: it knows every row under every template


STYLES = [*list(CASES)[:4], "thinks first", "plain text"]


def style(name):
    template, eos, *_ = CASES.get(name, (plain("\n###\n"), "<eos>"))
    return chat(template, eos=eos)


@pytest.fixture(scope="module")
def reciting():
    model = builders.llama()
    samples = [sample for name in STYLES for sample in load_samples(ROWS, style(name))]
    (batch,) = batches(samples, len(samples))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(400):
        loss = sample_losses(model, batch).mean()
        if float(loss) < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 0.02
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("name", STYLES)
def test_a_verbatim_answer_is_verbatim(reciting, name):
    tokenizer = style(name)
    with laws.untouched(reciting):
        texts = generate(Subject(reciting, tokenizer), ROWS, max_new_tokens=60)
    assert texts == [row["answer"] for row in ROWS]
    splits = dict.fromkeys(("forget", "retain", "holdout"), ROWS)
    log = evaluate(reciting, tokenizer, {"tofu": splits}, max_new_tokens=60, show_progress_bar=False)["tofu"]
    for index in ("0", "1"):
        rouge = log["forget_Q_A_ROUGE"]["value_by_index"][index]
        assert (rouge["rougeL_f1"], rouge["rougeL_recall"]) == (1, 1)
    assert log["extraction_strength"]["agg_value"] == log["exact_memorization"]["agg_value"] == 1


@pytest.mark.parametrize("name", STYLES[:-1])
def test_the_end_is_no_part_of_the_scores(reciting, name):
    """The model says the same words, and then something else than the template's end."""
    tokenizer = style(name)
    (end,) = {encode_row(row, tokenizer).input_ids[-len(answer_frame(tokenizer).closings[1])].item() for row in ROWS}
    whole = score_completions(Subject(reciting, tokenizer), ROWS)

    def never(head, arguments, logits):
        return logits.index_fill(-1, torch.tensor([end]), -30.0)

    hook = reciting.lm_head.register_forward_hook(never)
    try:
        scored = score_completions(Subject(reciting, tokenizer), ROWS)
    finally:
        hook.remove()
    for row, before, found in zip(ROWS, whole, scored, strict=True):
        words = len(tokenizer(row["answer"])["input_ids"])
        assert found.tokens.hits.tolist() == [True] * words
        assert -float(found.tokens.log_probabilities.min()) < 1, "the end would be the least likely token"
        assert found.loss > before.loss + 0.5, "the loss is that of the whole completion"


def test_a_prefix_is_a_share_of_the_answer_alone(reciting):
    tokenizer = style("SmolLM")
    subject = Subject(reciting, tokenizer, show_progress_bar=False)
    settings = AttackSettings(prefix_shares=(0.5,), max_new_tokens=60)
    whole, half = run_attacks(Victims(subject, None, None, ROWS), ["prefix"], settings)
    for found in (whole, half):
        assert found.unlearned["rouge_l_recall"] == 1
    sample = encode_row(ROWS[0], tokenizer)
    start = int((sample.labels == -100).sum()) + len(ROWS[0]["answer"]) // 2
    only = run_attacks(Victims(subject, None, None, ROWS[:1]), ["prefix"], settings)[1]
    with torch.no_grad():
        logs = reciting(sample.input_ids.unsqueeze(0)).logits[0].log_softmax(-1)
    taken = [float(logs[place - 1, sample.input_ids[place]]) for place in range(start, len(sample.input_ids))]
    assert math.isclose(only.unlearned["loss"], -sum(taken) / len(taken), rel_tol=1e-4)
