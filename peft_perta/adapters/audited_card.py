"""An audit's verdict in the model card of the adapter that was audited, with the results that model hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from ..data import write_file
from ..errors import AdapterError
from ..evaluation import RULE, Audit

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- audit -->", "<!-- end of the audit -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)


def read_card(directory: str | Path) -> ModelCard:
    """The model card of an adapter's directory.

    Raises:
        AdapterError: there is none, or its metadata are no YAML.
    """
    path = Path(directory) / CARD_NAME
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"{path}: expected the adapter's model card, with metadata in YAML, found none that can be read "
            f"({reason}); audit an adapter that this package wrote"
        ) from error


def add_audit(directory: str | Path, audit: Audit) -> None:
    """Write the verdict into the model card of an adapter, in the place of an earlier one.

    Raises:
        AdapterError: as ``read_card`` does.
        OutputError: the card cannot be written.
    """
    card: Any = read_card(directory)
    card.data.model_name = Path(directory).resolve().name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="own-rows",
            dataset_name=f"{audit.rows} forget rows, against the {audit.yardstick} model",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, value in _results(audit)
    ]
    section = f"\n\n{_BEGIN}\n{_section(audit)}\n{_END}\n"
    text = _SECTION.sub("", card.text).rstrip("\n")
    card.text = text + section
    write_file(Path(directory) / CARD_NAME, str(card))


def _results(audit: Audit) -> list[tuple[str, str, float]]:
    """(type, name, value) of what the verdict rests on."""
    strongest = audit.verdict.reasons[0] if audit.verdict.reasons else audit.verdict.widest
    assert strongest.share is not None
    return [
        ("share-of-what-was-known", f"share of what was known: {strongest.name}", strongest.share.mean),
        ("kept-probability", "kept of the retain rows' probability", audit.kept["unlearned"].mean),
    ]


def _section(audit: Audit) -> str:
    name, _, because = str(audit.verdict).partition(": ")
    return "\n".join(
        [
            "## Audit",
            "",
            f"**{name}**: {because}.",
            "",
            f"On {audit.rows} forget rows, against the {audit.yardstick} model. The rule: {RULE}.",
            "",
            f"Kept of the retain rows' probability: {audit.kept['unlearned']} of the full model's.",
        ]
    )
