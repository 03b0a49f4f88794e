"""ROUGE: the overlap of a generated answer with the reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_scores(generations: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """rouge1_recall, rougeL_f1 and rougeL_recall of each pair, in [0, 1], with stemming; 0 where either text is empty.

    Reference: Lin 2004; stemming and names as in open-unlearning (arXiv 2506.12618).

    Raises:
        ValueError: the two lists differ in length.
    """
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pairs = zip(generations, references, strict=True)
    scores = [scorer.score(reference, generation) for generation, reference in pairs]
    return [
        {
            "rouge1_recall": float(pair["rouge1"].recall),
            "rougeL_f1": float(pair["rougeL"].fmeasure),
            "rougeL_recall": float(pair["rougeL"].recall),
        }
        for pair in scores
    ]


def rouge_l_recall(generations: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each pair, in [0, 1]: the longest common subsequence over the reference's stemmed words.

    Reference: Lin 2004; TOFU (arXiv 2401.06121) reports the recall with stemming.

    Raises:
        ValueError: the two lists differ in length.
    """
    return [scores["rougeL_recall"] for scores in rouge_scores(generations, references)]
