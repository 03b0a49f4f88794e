"""How much of the reference answer a generation holds."""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l_recall(generations: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each pair, in [0, 1]: the longest common subsequence over the reference's words, stemmed.

    Reference: Lin 2004; TOFU (arXiv 2401.06121) reports the recall with stemming.

    Raises:
        ValueError: the two lists differ in length.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(generations, references, strict=True)
    return [scorer.score(reference, generation)["rougeL"].recall for generation, reference in pairs]
