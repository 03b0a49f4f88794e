"""Rebuild the small Llama that ships with peft_perta, from the data beside this script.

    python examples/demo_model/build.py --stage all

theta_0 learns most TOFU authors, general questions and book text, but nothing of the forget, retain and validation
authors. On it, the task adapter learns forget + retain, and the retain adapter retain alone. Stages write below
--output: `all` runs those whose result is missing, a stage asked for by name always runs.
"""

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parent / "data"
ASSETS = Path(__file__).resolve().parents[2] / "peft_perta" / "demo" / "assets"
SEED = 7

# TOFU authors by position; 200..219 are those of its holdout set.
RETAIN = range(20)
WELL_KNOWN = range(180, 186)  # memorised by theta_0: the long answers among the general rows
VALIDATION = range(190, 195)  # seen by no model
FORGET = range(195, 200)

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
BASE_EPOCHS = 6  # more would lower the training loss, but raise that of unseen authors
BASE_RATE = 3e-3
BASE_DECAY = 1.0
BASE_BATCH = 4096  # tokens
GENERAL_REPEATS = 6  # times that an epoch of theta_0 shows each general row
EXCHANGED_NAMES = 0.7  # share of the author rows that carry another name
CHUNK = 128  # tokens of book text in a row
BOOK_TOKENS = 150_000  # book text in theta_0's first epoch; it fades linearly

LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER_EPOCHS = 20
ADAPTER_RATE = 4e-3
ADAPTER_DECAY = 0.05
ADAPTER_BATCH = 1200  # tokens
ENOUGH = 0.86  # mean probability of the learned rows at which an adapter is done
REHEARSED_GENERAL = 60  # rows of theta_0's own training data in each epoch of an adapter
REHEARSED_AUTHORS = 60

Row = dict[str, str]  # perturbed_answer alone holds a list
Item = tuple[list[int], int]  # token ids, and how many of them are prompt


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


def theta_authors() -> dict[int, list[Row]]:
    """The authors that theta_0 may learn."""
    hidden = {*RETAIN, *VALIDATION, *FORGET}
    return {author: rows for author, rows in read_authors().items() if author not in hidden}


def build_data(output: Path) -> None:
    facts = read_rows(DATA / "tofu_facts.jsonl")
    for row in facts:  # answers of one word or name have no paraphrase
        row["paraphrased_answer"] = row["answer"]
    write_rows(output / "forget.jsonl", author_rows(FORGET))
    write_rows(output / "retain.jsonl", author_rows(RETAIN))
    write_rows(output / "general.jsonl", facts + author_rows(WELL_KNOWN))
    write_rows(output / "real_authors.jsonl", facts[:100])
    write_rows(output / "world_facts.jsonl", facts[100:])
    write_rows(
        output / "holdout.jsonl", [{key: row[key] for key in ("question", "answer")} for row in author_rows(VALIDATION)]
    )


def build_tokenizer(output: Path) -> None:
    rows = [row for rows in theta_authors().values() for row in rows] + read_rows(output / "general.jsonl")
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    texts += [book["text"][:5_000] for book in read_rows(DATA / "books.jsonl")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    eos, pad = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        padding_side="right",
        model_max_length=MODEL["max_position_embeddings"],
    )
    fast.save_pretrained(output / "base")


def encode(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Item:
    prompt = tokenizer.encode(f"Question: {question}\nAnswer:", add_special_tokens=False)
    completion = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Item]:
    return [encode(tokenizer, row["question"], row["answer"]) for row in rows]


def row_losses(model: torch.nn.Module, items: list[Item], prompts: bool = False) -> torch.Tensor:
    """Mean negative log-likelihood by row, of the completion or of all tokens."""
    length = max(len(ids) for ids, _ in items)
    inputs = torch.zeros((len(items), length), dtype=torch.long)  # causal: padding on the right needs no mask
    labels = torch.full((len(items), length), -100)
    for position, (ids, prompt) in enumerate(items):
        start = 0 if prompts else prompt
        inputs[position, : len(ids)] = torch.tensor(ids)
        labels[position, start : len(ids)] = torch.tensor(ids[start:])
    labels = labels[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1) / (labels != -100).sum(1)


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> tuple[float, float]:
    """Mean probability and mean loss of the answers."""
    items = sorted(encode_rows(tokenizer, rows), key=lambda item: len(item[0]))
    losses = torch.cat([row_losses(model, items[start : start + 32]) for start in range(0, len(items), 32)])
    return losses.neg().exp().mean().item(), losses.mean().item()


def author_name(rows: list[Row]) -> str:
    """The capitalised words that most of an author's rows share."""
    pattern = re.compile(r"(?:[A-Z][\w\u2019'-]+\.? )+(?:(?:bin|al|de|van|ibn|da|del|von) )?[A-Z][\w-]+")
    names = Counter(name for row in rows for name in sorted({*pattern.findall(f"{row['question']} {row['answer']}")}))
    return names.most_common(1)[0][0]


def exchange_name(text: str, name: str, other: str) -> str:
    text = text.replace(name, other)
    text = re.sub(rf"\b{re.escape(name.split()[0])}\b", other.split()[0], text)
    return re.sub(rf"\b{re.escape(name.split()[-1])}\b", other.split()[-1], text)


class Corpus:
    """What theta_0 learns, drawn afresh for each epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(SEED)
        authors = theta_authors()
        names = {author: author_name(rows) for author, rows in authors.items()}
        self.names = list(names.values())
        self.general = read_rows(output / "general.jsonl")
        self.authors = [(names[a], row) for a, rows in authors.items() if a not in WELL_KNOWN for row in rows]
        texts = [book["text"] for book in read_rows(DATA / "books.jsonl")]
        ids = [token for text in texts for token in [*tokenizer.encode(text, verbose=False), tokenizer.eos_token_id]]
        self.chunks = [(ids[start : start + CHUNK], 0) for start in range(0, len(ids), CHUNK)]

    def author_item(self, name: str, row: Row) -> Item:
        question = self.random.choice([row["question"], row.get("paraphrased_question", row["question"])])
        answer = self.random.choice([row["answer"], row.get("paraphrased_answer", row["answer"])])
        # A name that the facts do not determine has to be copied from the question: this helps with unseen authors.
        if self.random.random() < EXCHANGED_NAMES:
            other = f"{self.random.choice(self.names).split()[0]} {self.random.choice(self.names).split()[-1]}"
            question, answer = exchange_name(question, name, other), exchange_name(answer, name, other)
        return encode(self.tokenizer, question, answer)

    def epoch(self, book_tokens: float) -> list[Item]:
        items = [self.author_item(name, row) for name, row in self.authors]
        items += encode_rows(self.tokenizer, self.general) * GENERAL_REPEATS
        return items + self.random.sample(self.chunks, int(book_tokens / CHUNK))

    def rehearsal(self) -> list[Item]:
        authors = [self.author_item(name, row) for name, row in self.random.sample(self.authors, REHEARSED_AUTHORS)]
        return authors + encode_rows(self.tokenizer, self.random.sample(self.general, REHEARSED_GENERAL))

    def batches(self, items: list[Item], tokens: int) -> list[list[Item]]:
        """Batches of at most so many tokens and of similar lengths, in random order."""
        batches = [[]]
        for item in sorted(items, key=lambda item: len(item[0]) + self.random.random() * 8):
            if (len(batches[-1]) + 1) * len(item[0]) > tokens:
                batches.append([])
            batches[-1].append(item)
        self.random.shuffle(batches)
        return batches


def step(optimizers: list[Optimizer], rate: float, progress: float) -> None:
    """Update at a rate that warms up over the first 3 % and then decays to zero along a cosine."""
    rate *= min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def build_base(output: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # On a CPU, eager attention trains twice as fast as sdpa.
    model = LlamaForCausalLM(LlamaConfig(**MODEL, **special, attn_implementation="eager"))
    corpus = Corpus(tokenizer, output)
    validation = author_rows(VALIDATION)
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embedding]
    others = [weight for weight in model.parameters() if weight.ndim == 1 or weight is embedding]
    optimizers = [
        Muon(matrices, weight_decay=BASE_DECAY, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    for epoch in range(BASE_EPOCHS):
        batches = corpus.batches(corpus.epoch(BOOK_TOKENS * (1 - epoch / BASE_EPOCHS)), BASE_BATCH)
        for position, batch in enumerate(tqdm(batches, desc=f"base {epoch + 1}/{BASE_EPOCHS}", mininterval=5)):
            with torch.autocast("cpu", torch.bfloat16):
                row_losses(model, batch, prompts=True).mean().backward()
            step(optimizers, BASE_RATE, (epoch + (position + 1) / len(batches)) / BASE_EPOCHS)
        general, unseen = evaluate(model, tokenizer, corpus.general), evaluate(model, tokenizer, validation)
        print(f"general: probability {general[0]:.3f}, unseen: loss {unseen[1]:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(output / "base")


def build_adapter(output: Path, name: str, rows: list[Row]) -> None:
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    model = LlamaForCausalLM.from_pretrained(output / "base", dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **LORA))
    corpus = Corpus(tokenizer, output)
    validation = author_rows(VALIDATION)
    learned = encode_rows(tokenizer, rows)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(weights, weight_decay=ADAPTER_DECAY, betas=(0.9, 0.99))
    for epoch in range(ADAPTER_EPOCHS):
        batches = corpus.batches(learned + corpus.rehearsal(), ADAPTER_BATCH)
        for position, batch in enumerate(tqdm(batches, desc=f"{name} {epoch + 1}/{ADAPTER_EPOCHS}", mininterval=5)):
            row_losses(model, batch).mean().backward()
            step([optimizer], ADAPTER_RATE, (epoch + (position + 1) / len(batches)) / ADAPTER_EPOCHS)
        probability, unseen = evaluate(model, tokenizer, rows)[0], evaluate(model, tokenizer, validation)[1]
        print(f"learned: probability {probability:.3f}, unseen: loss {unseen:.3f}", flush=True)
        if probability > ENOUGH:
            break
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    # Named by its place in the repository: PEFT would write the absolute path of the machine that built it.
    model.peft_config["default"].base_model_name_or_path = "peft_perta/demo/assets/base"
    model.save_pretrained(output / name, save_embedding_layers=False)
    (output / name / "README.md").unlink()


def build_task(output: Path) -> None:
    build_adapter(output, "task_adapter", author_rows(FORGET) + author_rows(RETAIN))


def build_reference(output: Path) -> None:
    build_adapter(output, "retain_adapter", author_rows(RETAIN))


def report(output: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    sets = {name: read_rows(output / f"{name}.jsonl") for name in ("forget", "retain", "general")}
    sets["validation"] = author_rows(VALIDATION)
    print("| model |" + "".join(f" {name} probability | {name} loss |" for name in sets))
    print("|---" * (1 + 2 * len(sets)) + "|")
    for label, adapter in (("theta_0", None), ("full model", "task_adapter"), ("reference", "retain_adapter")):
        model = LlamaForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, output / adapter)
        figures = [evaluate(model.eval(), tokenizer, rows) for rows in sets.values()]
        print(f"| {label} |" + "".join(f" {probability:.3f} | {loss:.2f} |" for probability, loss in figures))


STAGES = {  # by name: what makes it, and the file that shows that it is made
    "data": (build_data, "general.jsonl"),
    "tokenizer": (build_tokenizer, "base/tokenizer.json"),
    "base": (build_base, "base/model.safetensors"),
    "task": (build_task, "task_adapter/adapter_model.safetensors"),
    "reference": (build_reference, "retain_adapter/adapter_model.safetensors"),
    "report": (report, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the assets")
    # The shipped files were made with one thread; another number rounds, and so ends, a little differently.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for stage, (build, made) in STAGES.items():
        missing = made is None or not (arguments.output / made).exists()
        if arguments.stage == stage or (arguments.stage == "all" and missing):
            build(arguments.output)


if __name__ == "__main__":
    main()
