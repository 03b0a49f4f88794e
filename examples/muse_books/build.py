"""Build this directory's files, in MUSE's layout, from the public-domain books of the demo model.

    python examples/muse_books/build.py [--output examples/muse_books]

Each row of questions.jsonl holds the opening words of a passage, and a question whose answer the passage contains word
for word. A passage ends with the first sentence after which it has at least SIZE characters and contains the answer.
Its first third is the prompt whose continuation verbmem asks for.
"""

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path

BOOKS = Path(__file__).resolve().parents[1] / "demo_model" / "data" / "books.jsonl"
SIZE = 160  # minimum number of characters of a passage
PROMPT = 1 / 3  # share of a passage's words
HOLDOUT = 20  # number of passages

BOOK_OF = {
    "forget": "The Marvelous Land of Oz",
    "retain": "The Rose and the Ring",
    "holdout": "A Christmas Carol",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    output = parser.parse_args().output

    books = {row["title"]: row["text"].replace("\n", " ") for row in read_rows(BOOKS)}
    table = read_rows(Path(__file__).resolve().parent / "questions.jsonl")
    for name in ("forget", "retain"):
        rows = [row for row in table if row["set"] == name]
        passages = [passage(books[BOOK_OF[name]], row["opening"], row["answer"]) for row in rows]
        check(passages, rows, books[BOOK_OF[name]])
        questions = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        write(output / "knowmem" / f"{name}_qa.json", questions)
        write(output / "privleak" / f"{name}.json", passages)
        if name == "forget":
            write(output / "verbmem" / "forget.json", [split_passage(text) for text in passages])
    write(output / "privleak" / "holdout.json", spread_passages(books[BOOK_OF["holdout"]], HOLDOUT))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> list[str]:
    """The sentences of a text, with their closing quotation marks; 'Mrs.' does not end a sentence."""
    return [sentence.strip() for sentence in re.findall(r".+?(?<!Mr)(?<!Mrs)[.!?][\"')]*(?=\s|$)", text)]


def passage(text: str, opening: str, answer: str = "") -> str:
    start = text.index(opening)
    if text.count(opening) != 1:
        raise ValueError(f"{opening!r} opens {text.count(opening)} passages")
    taken = ""
    for sentence in sentences(text[start : start + 4_000]):
        taken = f"{taken} {sentence}".strip()
        if len(taken) >= SIZE and answer in taken:
            break
    return taken


def spread_passages(text: str, count: int) -> list[str]:
    """Passages at ``count`` even distances through the text, each beginning with a sentence."""
    starts = [text.index(". ", len(text) * step // count) + 2 for step in range(count)]
    return [passage(text, text[start : start + 200]) for start in starts]


def check(passages: list[str], rows: list[dict[str, str]], text: str) -> None:
    """Check that every passage contains its answer, and that no two passages overlap."""
    spans = sorted((text.index(passage), text.index(passage) + len(passage)) for passage in passages)
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise ValueError(f"two passages share {text[start:end]!r}")
    for passage, row in zip(passages, rows, strict=True):
        if row["answer"] not in passage:
            raise ValueError(f"{row['question']!r}: {row['answer']!r} is not in {passage!r}")


def split_passage(text: str) -> dict[str, str]:
    words = text.split(" ")
    length = round(len(words) * PROMPT)
    return {"prompt": " ".join(words[:length]), "gt": " ".join(words[length:])}


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
