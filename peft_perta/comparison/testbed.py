"""What methods are compared on: a model that must forget, its rows, and the yardstick."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data import GENERAL, read_row_file, read_rows
from ..errors import ConfigError
from ..evaluation import SUITES, Splits, forget_loss_of_log
from ..model import check_adapter_files, find_adapter, hash_file, identify_base_files

SPLITS = ("forget", "retain", "general")
ASSETS = Path(__file__).parent / "assets"
PROSE = GENERAL / "prose.jsonl"
_SUITE_SPLITS = ("real_authors", "world_facts", "holdout")  # which the TOFU suite reads beside forget and retain


@dataclass(frozen=True)
class Testbed:
    """A model to compare methods on, and its rows. Everything is read and checked when it is made.

    Attributes:
        base: the base model: a name, a directory or a GGUF file.
        rows: 'forget', 'retain' and 'general' -> rows.
        task_adapter: the adapter that taught the base what must go; None where the base itself knows it.
        retain_only_adapter: the same training without the forget rows; None without one.
        target_forget_loss: the forget loss of a retain-only model, nats per token, where only that is known.
        suite_rows: further splits of the TOFU suite -> rows.

    Where none of the three is given, no model lacks the knowledge that must go: forgetting is matched where the false
    answers of the forget rows (``perturbed_answer``) are as likely as by chance.
    """

    base: str
    rows: Mapping[str, list[dict]]
    task_adapter: Path | None = None
    retain_only_adapter: Path | None = None
    target_forget_loss: float | None = None
    suite_rows: Splits = field(default_factory=dict)

    __test__ = False  # pytest takes the name for a test's

    @classmethod
    def of_directory(cls, directory: Path) -> Testbed:
        """The testbed in a directory as ``examples/demo_model/build.py`` writes it: base, task_adapter, retain_adapter
        and one file of JSON lines for each split.

        Raises:
            ConfigError: a file of the model is missing.
            DataError: a file of rows is missing or malformed.
        """
        for name in ("base/config.json", "task_adapter/adapter_config.json", "retain_adapter/adapter_config.json"):
            if not (directory / name).is_file():
                raise ConfigError(
                    f"testbed: expected {name} in {directory}, found none; give a directory that "
                    "examples/demo_model/build.py or examples/real_model/build.py wrote"
                )
        splits = SUITES["tofu"].read(directory, None)
        return cls(
            base=str(directory / "base"),
            rows={name: read_row_file(directory / f"{name}.jsonl") for name in SPLITS},
            task_adapter=directory / "task_adapter",
            retain_only_adapter=directory / "retain_adapter",
            suite_rows={name: splits[name] for name in _SUITE_SPLITS if name in splits},
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of forgetting that have a target here."""
        if self.retain_only_adapter is None and self.target_forget_loss is not None:
            return ("loss",)
        if self.retain_only_adapter is None and self.task_adapter is None:
            return ("options",)
        return ("loss", "first-choice")

    @classmethod
    def of_user(
        cls,
        model: str,
        forget: str | Path,
        retain: str | Path,
        *,
        general: str | Path | None = None,
        task_adapter: str | Path | None = None,
        retain_only: str | Path | float | None = None,
    ) -> Testbed:
        """A testbed of the user's own model and rows.

        Args:
            model: the base model: a name, a directory or a GGUF file.
            forget, retain: files of rows. Of the retain rows every second one is judged, and no method sees it.
            general: a file of rows that are in neither set; by default, passages of books in the public domain. TOFU's
                real authors and world facts are asked beside them.
            task_adapter: the adapter that taught the base what must go; None where the base itself knows it.
            retain_only: what forgetting is matched to: the directory of an adapter that learned the retain rows alone,
                the log of such a model, or its forget loss in nats per token. None takes the base's own loss where
                there is a task adapter, else the chance of the false answers among the forget rows.

        Raises:
            AdapterError: an adapter's files are not those of a plain LoRA adapter.
            ConfigError: there is no target of forgetting.
            DataError: a file of rows, or the log, is missing or malformed.
        """
        target = yardstick = None
        if isinstance(retain_only, (int, float)):
            target = float(retain_only)
        elif retain_only is not None and Path(retain_only).is_file():
            target = forget_loss_of_log(retain_only)
        elif retain_only is not None:
            yardstick = Path(retain_only)
        task = None if task_adapter is None else Path(task_adapter)
        for path in (task, yardstick):
            if path is not None:
                check_adapter_files(path)
        files = {"forget": forget, "retain": retain, "general": general or PROSE}
        rows = {name: read_rows(file) for name, file in files.items()}
        if task is None and retain_only is None and not has_options(rows["forget"]):
            raise ConfigError(
                "a comparison needs a target of forgetting: expected --task-adapter (the base's own loss on the forget "
                "rows is the target then), --retain-only-adapter, --retain-only-log, --target-forget-loss, or false "
                "answers beside every question to forget ('perturbed_answer', a list: chance is the target then), "
                "found none"
            )
        facts = {name: read_row_file(ASSETS / f"{name}.jsonl") for name in ("real_authors", "world_facts")}
        return cls(
            base=model,
            rows=rows,
            task_adapter=task,
            retain_only_adapter=yardstick,
            target_forget_loss=target,
            suite_rows=facts,
        )

    def digest(self) -> str:
        """SHA-256 of the rows, the adapters, the target and what the base's files hold."""
        base = identify_base_files(self.base) or self.base
        parts = [json.dumps([base, self.rows, self.suite_rows, self.target_forget_loss], sort_keys=True, default=str)]
        for adapter in (self.task_adapter, self.retain_only_adapter):
            files = sorted(find_adapter(adapter).glob("adapter_*")) if adapter is not None else []
            parts.append(" ".join(hash_file(file) for file in files))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def has_options(rows: Sequence[Mapping]) -> bool:
    """Whether every row holds a question, its answer, and false answers beside it."""
    return all(
        isinstance(false := row.get("perturbed_answer"), list)
        and len(false) > 0
        and all(isinstance(text, str) and text.strip() for text in (row.get("question"), row.get("answer"), *false))
        for row in rows
    )


def small() -> Testbed:
    """The shipped Llama of 5.2 million parameters, which learned TOFU's invented authors."""
    return Testbed.of_directory(ASSETS)
