"""Rebuild the small Llama that ships with peft_perta, or build a large one like it, from the data beside this script.

    python examples/demo_model/build.py --stage all
    python examples/demo_model/build.py --size large [--output large_model]

The origin model (theta_0) learns most TOFU authors, general questions and book text, but nothing about the forget,
retain and validation authors. On it, the task adapter learns the forget and retain rows, and the retain adapter the
retain rows alone. Each stage writes below --output. `all` runs the stages whose result is missing; a stage named alone
always runs.

The large model has 90 million parameters and needs a GPU. Its forget set is TOFU's forget10, its retain set retain90.
Its directory serves as the `assets` of a comparison of methods (`python -m benchmarks.methods --config ...`).
"""

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parent / "data"
ASSETS = Path(__file__).resolve().parents[2] / "peft_perta" / "comparison" / "assets"
SEED = 7
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHUNK = 128  # tokens of book text per row
EXCHANGED_NAMES = 0.7  # share of the author rows whose author gets another name
ADAPTER_DECAY = 0.05
ENOUGH = 0.86  # training of an adapter stops at this mean probability of the learned rows


@dataclass(frozen=True)
class Size:
    """The model to build, and its training. TOFU authors are given by position; 200..219 are its holdout set.

    Attributes:
        output: default directory of the result.
        retain, forget: authors of the two sets.
        well_known: authors whom the origin model memorises; their rows are the long answers among the general rows.
        validation: authors whom no model sees.
        others: further authors whom the origin model may learn.
        model: fields of LlamaConfig.
        base_epochs, base_rate, base_decay, base_batch: training of the origin model; batches in tokens.
        book_tokens: tokens of book text in the origin model's first epoch; their number falls linearly to 0.
        adapter_epochs, adapter_rate, adapter_batch: training of an adapter; batches in tokens.
        lora: fields of LoraConfig.
        general_repeats: how often one epoch of the origin model shows each general row.
        rehearsed: (general rows, author rows) of the origin model's training data in each epoch of an adapter.
        tokenizer_characters: characters of each book that train the tokenizer.
        on_gpu: train on a GPU if there is one.
        named: the name of the base in the adapters' configs. PEFT would write the builder's absolute path.
    """

    output: Path
    retain: range
    forget: range
    well_known: range
    validation: range
    others: Sequence[int]
    model: Mapping[str, Any]
    base_epochs: int
    base_rate: float
    base_decay: float
    base_batch: int
    book_tokens: float
    adapter_epochs: int
    adapter_rate: float
    adapter_batch: int
    lora: Mapping[str, Any] = field(default_factory=lambda: {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0})
    general_repeats: int = 6
    rehearsed: tuple[int, int] = (60, 60)
    tokenizer_characters: int = 5_000
    on_gpu: bool = False
    named: str = "base"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu and torch.cuda.is_available() else "cpu")

    @property
    def attention(self) -> str:
        return "eager" if self.device.type == "cpu" else "sdpa"  # eager trains twice as fast on a CPU


SMALL = Size(
    output=ASSETS,
    retain=range(20),
    forget=range(195, 200),
    well_known=range(180, 186),
    validation=range(190, 195),
    others=[*range(20, 190), *range(200, 220)],
    model={
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    base_epochs=6,  # more epochs lower the training loss but raise the loss of unseen authors
    base_rate=3e-3,
    base_decay=1.0,
    base_batch=4096,
    book_tokens=150_000,
    adapter_epochs=20,
    adapter_rate=4e-3,
    adapter_batch=1200,
    named="peft_perta/comparison/assets/base",
)
LARGE = Size(
    output=Path("large_model"),
    retain=range(180),
    forget=range(180, 200),
    well_known=range(200, 206),
    validation=range(212, 220),
    others=range(200, 212),
    model={
        "vocab_size": 8192,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    base_epochs=12,
    base_rate=1e-3,
    base_decay=1.0,
    base_batch=16_384,
    book_tokens=600_000,
    adapter_epochs=40,
    adapter_rate=1e-3,
    adapter_batch=8192,
    lora={"r": 64, "lora_alpha": 128, "lora_dropout": 0.0},
    rehearsed=(300, 120),
    tokenizer_characters=54_000,
    on_gpu=True,
)
SIZES = {"small": SMALL, "large": LARGE}

Row = dict[str, str]  # except perturbed_answer, which is a list
Item = tuple[list[int], int]  # token ids, and the length of the prompt among them


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_authors() -> dict[int, list[Row]]:
    authors = defaultdict(list)
    for row in read_rows(DATA / "tofu_authors.jsonl"):
        authors[row.pop("author")].append(row)
    return authors


def author_rows(wanted: range) -> list[Row]:
    authors = read_authors()
    return [row for author in wanted for row in authors[author]]


def theta_authors(size: Size) -> dict[int, list[Row]]:
    """The authors whom the origin model may learn."""
    return {author: rows for author, rows in read_authors().items() if author in size.others}


def build_data(size: Size, output: Path) -> None:
    facts = read_rows(DATA / "tofu_facts.jsonl")
    for row in facts:  # an answer of one word or name has no paraphrase
        row["paraphrased_answer"] = row["answer"]
    retain = author_rows(size.retain)
    judging = [row for row in retain if "perturbed_answer" in row]
    write_rows(output / "forget.jsonl", author_rows(size.forget))
    write_rows(output / "retain.jsonl", retain)
    if len(judging) < len(retain):  # TOFU has false answers for only some of them
        write_rows(output / "retain_perturbed.jsonl", judging)
    write_rows(output / "general.jsonl", facts + author_rows(size.well_known))
    write_rows(output / "real_authors.jsonl", facts[:100])
    write_rows(output / "world_facts.jsonl", facts[100:])
    holdout = [{key: row[key] for key in ("question", "answer")} for row in author_rows(size.validation)]
    write_rows(output / "holdout.jsonl", holdout)


def build_tokenizer(size: Size, output: Path) -> None:
    rows = [row for rows in theta_authors(size).values() for row in rows] + read_rows(output / "general.jsonl")
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    texts += [book["text"][: size.tokenizer_characters] for book in read_rows(DATA / "books.jsonl")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size.model["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    eos, pad = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        padding_side="right",
        model_max_length=size.model["max_position_embeddings"],
    )
    fast.save_pretrained(output / "base")


def encode(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Item:
    prompt = tokenizer.encode(f"Question: {question}\nAnswer:", add_special_tokens=False)
    completion = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Item]:
    return [encode(tokenizer, row["question"], row["answer"]) for row in rows]


def row_losses(model: torch.nn.Module, items: list[Item], prompts: bool = False) -> torch.Tensor:
    """Mean negative log-likelihood of each row's completion, or of all its tokens, [N]."""
    length = max(len(ids) for ids, _ in items)
    inputs = torch.zeros((len(items), length), dtype=torch.long)  # causal attention: padding on the right needs no mask
    labels = torch.full((len(items), length), -100)
    for position, (ids, prompt) in enumerate(items):
        start = 0 if prompts else prompt
        inputs[position, : len(ids)] = torch.tensor(ids)
        labels[position, start : len(ids)] = torch.tensor(ids[start:])
    device = next(model.parameters()).device
    inputs, labels = inputs.to(device), labels[:, 1:].to(device)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1) / (labels != -100).sum(1)


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> tuple[float, float]:
    """Mean probability and mean loss of the rows' answers."""
    items = sorted(encode_rows(tokenizer, rows), key=lambda item: len(item[0]))
    losses = torch.cat([row_losses(model, items[start : start + 32]) for start in range(0, len(items), 32)])
    return losses.neg().exp().mean().item(), losses.mean().item()


def author_name(rows: list[Row]) -> str:
    """The author's name: the capitalised words that most of the rows share."""
    pattern = re.compile(r"(?:[A-Z][\w\u2019'-]+\.? )+(?:(?:bin|al|de|van|ibn|da|del|von) )?[A-Z][\w-]+")
    names = Counter(name for row in rows for name in sorted({*pattern.findall(f"{row['question']} {row['answer']}")}))
    return names.most_common(1)[0][0]


def exchange_name(text: str, name: str, other: str) -> str:
    text = text.replace(name, other)
    text = re.sub(rf"\b{re.escape(name.split()[0])}\b", other.split()[0], text)
    return re.sub(rf"\b{re.escape(name.split()[-1])}\b", other.split()[-1], text)


class Corpus:
    """The training data of the origin model, drawn anew for each epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: Size, output: Path) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.random = random.Random(SEED)
        authors = theta_authors(size)
        names = {author: author_name(rows) for author, rows in authors.items()}
        self.names = list(names.values())
        self.general = read_rows(output / "general.jsonl")
        self.authors = [(names[a], row) for a, rows in authors.items() if a not in size.well_known for row in rows]
        texts = [book["text"] for book in read_rows(DATA / "books.jsonl")]
        ids = [token for text in texts for token in [*tokenizer.encode(text, verbose=False), tokenizer.eos_token_id]]
        self.chunks = [(ids[start : start + CHUNK], 0) for start in range(0, len(ids), CHUNK)]

    def author_item(self, name: str, row: Row) -> Item:
        question = self.random.choice([row["question"], row.get("paraphrased_question", row["question"])])
        answer = self.random.choice([row["answer"], row.get("paraphrased_answer", row["answer"])])
        # The facts do not determine an exchanged name, so the model must copy it from the question. This helps with
        # unseen authors.
        if self.random.random() < EXCHANGED_NAMES:
            other = f"{self.random.choice(self.names).split()[0]} {self.random.choice(self.names).split()[-1]}"
            question, answer = exchange_name(question, name, other), exchange_name(answer, name, other)
        return encode(self.tokenizer, question, answer)

    def epoch(self, book_tokens: float) -> list[Item]:
        items = [self.author_item(name, row) for name, row in self.authors]
        items += encode_rows(self.tokenizer, self.general) * self.size.general_repeats
        return items + self.random.sample(self.chunks, int(book_tokens / CHUNK))

    def rehearsal(self) -> list[Item]:
        general, authors = self.size.rehearsed
        rehearsed = [self.author_item(name, row) for name, row in self.random.sample(self.authors, authors)]
        return rehearsed + encode_rows(self.tokenizer, self.random.sample(self.general, general))

    def batches(self, items: list[Item], tokens: int) -> list[list[Item]]:
        """Batches of at most ``tokens`` tokens, of items of similar lengths, in random order."""
        batches = [[]]
        for item in sorted(items, key=lambda item: len(item[0]) + self.random.random() * 8):
            if (len(batches[-1]) + 1) * len(item[0]) > tokens:
                batches.append([])
            batches[-1].append(item)
        self.random.shuffle(batches)
        return batches


def step(optimizers: list[Optimizer], rate: float, progress: float) -> None:
    """One update. The learning rate warms up over the first 3 % of the training and then follows a cosine to zero."""
    rate *= min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def base_model(size: Size, special: Mapping[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**size.model, **special, attn_implementation=size.attention))


def build_base(size: Size, output: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = base_model(size, special).to(size.device)
    corpus = Corpus(tokenizer, size, output)
    validation = author_rows(size.validation)
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embedding]
    others = [weight for weight in model.parameters() if weight.ndim == 1 or weight is embedding]
    optimizers = [
        Muon(matrices, weight_decay=size.base_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    epochs = size.base_epochs
    for epoch in range(epochs):
        batches = corpus.batches(corpus.epoch(size.book_tokens * (1 - epoch / epochs)), size.base_batch)
        for position, batch in enumerate(tqdm(batches, desc=f"base {epoch + 1}/{epochs}", mininterval=5)):
            with torch.autocast(size.device.type, torch.bfloat16):
                row_losses(model, batch, prompts=True).mean().backward()
            step(optimizers, size.base_rate, (epoch + (position + 1) / len(batches)) / epochs)
        general, unseen = evaluate(model, tokenizer, corpus.general), evaluate(model, tokenizer, validation)
        print(f"general: probability {general[0]:.3f}, unseen: loss {unseen[1]:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(output / "base")


def build_adapter(size: Size, output: Path, name: str, rows: list[Row]) -> None:
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    model = load(size, output)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **size.lora))
    corpus = Corpus(tokenizer, size, output)
    validation = author_rows(size.validation)
    learned = encode_rows(tokenizer, rows)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(weights, weight_decay=ADAPTER_DECAY, betas=(0.9, 0.99))
    epochs = size.adapter_epochs
    for epoch in range(epochs):
        batches = corpus.batches(learned + corpus.rehearsal(), size.adapter_batch)
        for position, batch in enumerate(tqdm(batches, desc=f"{name} {epoch + 1}/{epochs}", mininterval=5)):
            row_losses(model, batch).mean().backward()
            step([optimizer], size.adapter_rate, (epoch + (position + 1) / len(batches)) / epochs)
        probability, unseen = evaluate(model, tokenizer, rows)[0], evaluate(model, tokenizer, validation)[1]
        print(f"learned: probability {probability:.3f}, unseen: loss {unseen:.3f}", flush=True)
        if probability > ENOUGH:
            break
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = size.named
    model.save_pretrained(output / name, save_embedding_layers=False)
    (output / name / "README.md").unlink()


def load(size: Size, output: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(output / "base", dtype=torch.float32, attn_implementation=size.attention)
    return model.to(size.device)


def build_task(size: Size, output: Path) -> None:
    build_adapter(size, output, "task_adapter", author_rows(size.forget) + author_rows(size.retain))


def build_retain_only(size: Size, output: Path) -> None:
    build_adapter(size, output, "retain_adapter", author_rows(size.retain))


def report(size: Size, output: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    sets = {name: read_rows(output / f"{name}.jsonl") for name in ("forget", "retain", "general")}
    sets["validation"] = author_rows(size.validation)
    print("| model |" + "".join(f" {name} probability | {name} loss |" for name in sets))
    print("|---" * (1 + 2 * len(sets)) + "|")
    for label, adapter in (("origin", None), ("full model", "task_adapter"), ("retain-only", "retain_adapter")):
        model = load(size, output)
        if adapter:
            model = PeftModel.from_pretrained(model, output / adapter)
        figures = [evaluate(model.eval(), tokenizer, rows) for rows in sets.values()]
        print(f"| {label} |" + "".join(f" {probability:.3f} | {loss:.2f} |" for probability, loss in figures))


STAGES = {  # name -> the function that builds it, and a file that exists once it is built
    "data": (build_data, "general.jsonl"),
    "tokenizer": (build_tokenizer, "base/tokenizer.json"),
    "base": (build_base, "base/model.safetensors"),
    "task": (build_task, "task_adapter/adapter_model.safetensors"),
    "retain-only": (build_retain_only, "retain_adapter/adapter_model.safetensors"),
    "report": (report, None),
}


def build(size: Size, output: Path, stage: str = "all") -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, (make, made) in STAGES.items():
        missing = made is None or not (output / made).exists()
        if stage == name or (stage == "all" and missing):
            make(size, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--output", type=Path, help="directory of the result (default: the shipped assets, or large_model)"
    )
    # The shipped files were built with one thread; another number rounds differently, and so gives other files.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    build(size, arguments.output or size.output, arguments.stage)


if __name__ == "__main__":
    main()
