"""Multiple choice, as WMDP and MMLU ask it: the option that the model finds likeliest counts as its answer.

Reference: WMDP (Li et al. 2024, arXiv 2403.03218) and MMLU (arXiv 2009.03300), as lm-evaluation-harness scores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch

from ...data import IGNORED, Batch, Sample, encode_row
from ...errors import DataError, NumericalError
from ...model import sample_losses
from ..completions import forward_batches
from ..logs.files import Log
from ..metrics.choices import chosen_option
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings, by_index, check_texts, read_list


def read(path: Path, split: str | None) -> Splits:
    """Read a file of rows {question, choices, answer[, subject]}, or a directory of such files.

    ``answer`` is the option's index from 0, its letter, or its text.

    Args:
        path: the file or the directory.
        split: the file of the directory ('wmdp_bio') that is asked; None for all.

    Raises:
        DataError: there are no files, or a row is malformed.
    """
    if path.is_file():
        return {path.stem: _read(path)}
    files = {file.stem: file for file in sorted(path.glob("*.json*")) if file.suffix in (".json", ".jsonl")}
    asked = {stem: file for stem, file in files.items() if split in (None, stem)}
    if not asked:
        expected = f"{split}.json" if split else ".json or .jsonl files of questions"
        raise DataError(f"expected {expected} at {path}, found {', '.join(files) or 'none'}; check the path")
    return {stem: _read(file) for stem, file in asked.items()}


def evaluate(subject: Subject, splits: Splits, settings: SuiteSettings) -> Log:
    """Accuracies by three measures of an option's likelihood.

    - choices_acc: the prompt lists the options, and the likelihoods of their letters are compared. Over all rows, and
      as choices_acc_<subject> for each subject (for each file, where there are several and a row names no subject).
    - choices_text_acc: the likelihoods of the options' texts are compared.
    - choices_text_acc_norm: the same, log-likelihoods divided by the option's number of characters.
    """
    rows = [row for of in splits.values() for row in of]
    letters = [list(ascii_uppercase[: len(row["choices"])]) for row in rows]
    texts = [row["choices"] for row in rows]
    by_letter = _log_likelihoods(subject, [_listed(row) for row in rows], letters, "choices: letters")
    by_text = _log_likelihoods(subject, [_plain(row) for row in rows], texts, "choices: texts")
    per_character = [
        [value / len(option) for value, option in zip(values, options, strict=True)]
        for values, options in zip(by_text, texts, strict=True)
    ]
    log: Log = {
        "choices_acc": _chosen(by_letter, rows),
        "choices_text_acc": _chosen(by_text, rows),
        "choices_text_acc_norm": _chosen(per_character, rows),
    }
    groups = [row.get("subject") or (stem if len(splits) > 1 else None) for stem, of in splits.items() for row in of]
    for (index, row), group in zip(log["choices_acc"]["value_by_index"].items(), groups, strict=True):
        if group is not None:
            metric = f"choices_acc_{'_'.join(str(group).split())}"
            log.setdefault(metric, {"agg_value": None, "value_by_index": {}})["value_by_index"][index] = row
    return log


SUITE = Suite("choices", "CHOICES_EVAL.json", read, evaluate)


def _read(file: Path) -> list[dict]:
    """The rows of a file, with each answer as the option's index."""
    rows = read_list(file)
    check_texts(rows, ["question"], str(file))
    for number, row in enumerate(rows, start=1):
        options = row.get("choices")
        if (
            not isinstance(options, list)
            or not 2 <= len(options) <= len(ascii_uppercase)
            or not all(isinstance(option, str) and option.strip() for option in options)
        ):
            raise DataError(f"{file}, row {number}: expected 'choices' as 2 to 26 texts, found {options!r:.80}")
    return [
        {**row, "answer": _index(row.get("answer"), row["choices"], f"{file}, row {n}")}
        for n, row in enumerate(rows, start=1)
    ]


def _index(answer: Any, choices: list[str], where: str) -> int:
    """The index of the option that ``answer`` names by its index, letter or text."""
    indices = [index for index, option in enumerate(choices) if option == answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in ascii_uppercase[: len(choices)]:
        indices = sorted({*indices, ascii_uppercase.index(answer)})
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        indices = [answer]
    if len(indices) != 1:
        raise DataError(
            f"{where}: expected 'answer' as an index below {len(choices)}, a letter, or the text of one option, found "
            f"{answer!r:.80}, which names {len(indices)} of them"
        )
    return indices[0]


def _listed(row: Mapping) -> str:
    """The prompt that lists the options, as MMLU and WMDP have it."""
    about = f" about {' '.join(str(row['subject']).replace('_', ' ').split())}" if row.get("subject") else ""
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(ascii_uppercase, row["choices"], strict=False))
    task = f"The following are multiple choice questions (with answers){about}."
    return f"{task}\n\n{row['question'].strip()}\n{options}Answer:"


def _plain(row: Mapping) -> str:
    """The prompt without the options."""
    return f"Question: {row['question'].strip()}\nAnswer:"


def _log_likelihoods(
    subject: Subject, prompts: Sequence[str], options: Sequence[Sequence[str]], name: str
) -> list[list[float]]:
    """The log-likelihood of each option after its prompt, nats, summed over the option's tokens.

    Raises:
        DataError: a prompt is too long for ``subject.max_length``.
        NumericalError: a likelihood is not finite.
    """
    samples = [
        _sample(subject, prompt, option, f"{name}, row {number}")
        for number, (prompt, of) in enumerate(zip(prompts, options, strict=True), start=1)
        for option in of
    ]

    def log_likelihoods(batch: Batch) -> list[float]:
        losses = sample_losses(subject.model, batch).double().cpu()
        return (-losses * (batch.labels[:, 1:] != IGNORED).sum(1).cpu()).tolist()

    values_of_options = iter(
        forward_batches(
            subject.model,
            samples,
            log_likelihoods,
            adapters=subject.adapters,
            batch_size=subject.batch_size,
            progress=name if subject.show_progress_bar else None,
        )
    )
    by_row = [[next(values_of_options) for _ in of_row] for of_row in options]
    for number, values in enumerate(by_row, start=1):
        if not all(map(math.isfinite, values)):
            raise NumericalError(
                f"{name}, row {number}: the options' log-likelihoods are {values}; evaluate in float32 or bfloat16, or "
                "lower the strength of the adapters"
            )
    return by_row


def _sample(subject: Subject, prompt: str, option: str, where: str) -> Sample:
    """Prompt and option as one sample, with labels on the option alone.

    The two are tokenised as one text, so that the tokens are those that a model would generate. The token that closes a
    turn is left out.
    """
    tokenizer = subject.tokenizer
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, asked + option))
        shared = 0
        while shared < len(ids) and ids[shared] == whole[shared]:
            shared += 1
        input_ids = torch.tensor(whole)
        labels = input_ids.clone()
        labels[:shared] = IGNORED
    else:
        row = {"prompt": prompt, "completion": f" {option}"}
        sample = encode_row(row, tokenizer, max_length=2**30, where=where)
        input_ids, labels = sample.input_ids[:-1], sample.labels[:-1]
    if subject.max_length is not None and len(input_ids) > subject.max_length:
        raise DataError(
            f"{where}: a question of {len(input_ids)} tokens with its option is longer than max_length="
            f"{subject.max_length}; raise max_length"
        )
    return Sample(input_ids, labels)


def _chosen(log_likelihoods: Sequence[Sequence[float]], rows: Sequence[Mapping]) -> dict[str, Any]:
    """The log entry of the options that the model finds likeliest."""
    chosen = [chosen_option(-torch.tensor(values, dtype=torch.float64)) for values in log_likelihoods]
    return by_index(
        {"score": int(option == row["answer"]), "chosen": option, "answer": row["answer"], "log_likelihoods": values}
        for option, row, values in zip(chosen, rows, log_likelihoods, strict=True)
    )
