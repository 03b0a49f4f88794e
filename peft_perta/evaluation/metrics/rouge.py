"""ROUGE: the overlap of a generated answer with the reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from .words import is_mostly_latin, unicode_words

PUBLISHED_TOKENIZER, UNICODE_TOKENIZER = "rouge_score", "unicode words"


def rouge_scores(generations: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """rouge1_recall, rougeL_f1 and rougeL_recall of each pair, in [0, 1]; 0 where either text is empty.

    Texts are split into words by ``rouge_tokenizer`` of the reference: stemmed Latin words, as published, or the words
    of any script.

    Reference: Lin 2004; stemming and names as in open-unlearning (arXiv 2506.12618).

    Raises:
        ValueError: the two lists differ in length.
    """
    scorers = {name: RougeScorer(["rouge1", "rougeL"], tokenizer=tokenizer) for name, tokenizer in _TOKENIZERS.items()}
    pairs = zip(generations, references, strict=True)
    scores = [scorers[rouge_tokenizer(reference)].score(reference, generation) for generation, reference in pairs]
    return [
        {
            "rouge1_recall": float(pair["rouge1"].recall),
            "rougeL_f1": float(pair["rougeL"].fmeasure),
            "rougeL_recall": float(pair["rougeL"].recall),
        }
        for pair in scores
    ]


def rouge_tokenizer(reference: str) -> str:
    """The name of the tokenizer that a reference and what is compared with it are split by.

    rouge_score's own keeps nothing but a to z and 0 to 9. It is used wherever published numbers are: on references
    whose letters are Latin, half of them at least. Where most are not (東京, القاهرة, Лев Толстой), or where it finds
    no word at all, ``unicode_words`` is used, without stemming.
    """
    published = is_mostly_latin(reference) and _TOKENIZERS[PUBLISHED_TOKENIZER].tokenize(reference)
    return PUBLISHED_TOKENIZER if published or not unicode_words(reference) else UNICODE_TOKENIZER


def rouge_l_recall(generations: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each pair, in [0, 1]: the longest common subsequence over the reference's stemmed words.

    Reference: Lin 2004; TOFU (arXiv 2401.06121) reports the recall with stemming.

    Raises:
        ValueError: the two lists differ in length.
    """
    return [scores["rougeL_recall"] for scores in rouge_scores(generations, references)]


class _UnicodeTokenizer(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return unicode_words(text)


_TOKENIZERS: dict[str, Tokenizer] = {
    PUBLISHED_TOKENIZER: DefaultTokenizer(use_stemmer=True),
    UNICODE_TOKENIZER: _UnicodeTokenizer(),
}
