"""Questions to several models, from a pipe: streamed as generated, with the strength set in between."""

import io
import sys

import builders
import pytest
import torch

from peft_perta import evaluation
from peft_perta.cli import chat, main
from peft_perta.evaluation import Subject, generate

ROW = {"question": "Who?", "answer": "-"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    builders.adapted_saved_llama().save_pretrained(path)
    return path


def answers_of(model, stack, tokenizer=None):
    subject = Subject(model, tokenizer or builders.tokenizer(), stack, show_progress_bar=False)
    (answer,) = generate(subject, [ROW], max_new_tokens=8)
    pieces = []
    evaluation.stream(subject, ROW, pieces.append, max_new_tokens=8)
    return answer, pieces


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("stack", [[], ["task"], ["task", "forget"]])
def test_what_is_streamed_is_what_is_generated(stack, chat_template):
    model = builders.adapted_saved_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer, pieces = answers_of(model, stack, builders.tokenizer(chat_template))
    assert "".join(pieces) == answer
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_answer_is_shown_by_words_and_without_what_ends_it():
    tokenizer = builders.tokenizer()
    shown = []
    frame = evaluation.generation.AnswerFrame((), (), (tokenizer.eos_token_id,), "<end>")
    pieces = evaluation.generation._Pieces(tokenizer, frame, shown.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer("Ned Bo<end> more")["input_ids"]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert shown == ["Ned", " Bo"]


def asked(monkeypatch, capsys, place, *lines, more=()):
    """The status, and what is printed for each of the lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = ["--model", str(builders.llama_directory()), "--max-new-tokens", "8", *map(str, more)]
    status = main(["chat", *options, "--adapter", str(place / "task"), "--adapter", str(place / "forget")])
    printed = capsys.readouterr().out
    return status, [block.rstrip("\n").split("\n")[1:] for block in f"\n{printed}".split("\n> ")[1:]]


def test_each_model_is_asked_and_the_strength_is_live(place, monkeypatch, capsys):
    model = builders.adapted_saved_llama()
    full, both = (answers_of(model, stack)[0] for stack in (["task"], ["task", "forget"]))
    only = answers_of(model, ["forget"])[0]
    assert len({full, both, only}) == 3, "or the test could not fail"
    status, blocks = asked(
        monkeypatch, capsys, place, "Who?", "", "/off", "Who?", "/strength 1", "Who?", "/strength x", "/quit", "Who?",
        more=["--retain-only-adapter", retain_only(place)],
    )  # fmt: skip
    assert status == 0
    first = [f"full: {full}", f"unlearned: {both}"]
    assert [blocks[0][:2], blocks[2][:2], blocks[4][:2]] == [
        first,
        [f"full: {full}", f"unlearned (off): {full}"],
        first,
    ]
    assert all(block[2] == blocks[0][2] and block[2].startswith("retain-only: ") for block in (blocks[2], blocks[4]))
    assert blocks[1] == ["the last adapter has strength 0"]
    assert blocks[5][0].startswith("expected a command, found '/strength x'; /strength X ")
    assert len(blocks) == 7, "nothing is asked after /quit"


def retain_only(place):
    """Another adapter than the two of the stack."""
    other = place / "other"
    if not other.exists():
        model = builders.adapted_saved_llama()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B.forget" in name:
                    parameter.mul_(-1)
        model.save_pretrained(other, selected_adapters=["forget"])
    return other / "forget"


def test_a_question_that_cannot_be_asked_is_told_in_its_place(place, monkeypatch, capsys):
    status, blocks = asked(monkeypatch, capsys, place, "x" * 300, "a\x1b[2Jb \ud800", "Who?")
    assert status == 0
    assert "half of a character" in blocks[1][0]
    assert blocks[2][0].startswith("full: ")


def test_a_chat_without_an_adapter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["chat", "--model", "m"]) == 2
    assert "--adapter: expected the adapters of the stack" in capsys.readouterr().err


def test_a_terminal_is_prompted(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    lines = iter(["Who? ", " "])

    def prompted(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", prompted)
    assert list(chat._lines()) == ["Who?"]
    assert capsys.readouterr().out == "", "the terminal shows what is typed"
