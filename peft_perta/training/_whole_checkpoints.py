"""Which of a training's checkpoints are whole: a mark is written last, with the hash of every file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data import note, read_json, write_file
from ..model import distributed, hash_file

MARK_NAME = "whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class MarksCheckpoints(TrainerCallback):
    """Marks each checkpoint of a ``Trainer`` as whole once all of its files are written, by every process."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mark of the newest checkpoint."""
        distributed.from_all(None)  # each process writes files of its own
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            write_file(directory / MARK_NAME, json.dumps(_hashes(directory), indent=1) + "\n")


def last_whole_checkpoint(directory: str | Path | None) -> str | None:
    """The newest checkpoint in a directory whose files are all as they were written; None if there is none."""
    if directory is None or not Path(directory).is_dir():
        return None
    steps = {int(match[1]): path for path in Path(directory).iterdir() if (match := _NAME.fullmatch(path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        if _is_whole(path):
            return str(path)
        note(f"{path} is damaged or was not written to its end; it is not used")
    return None


def is_write_failure(error: Exception) -> bool:
    """Whether this is what transformers, safetensors or torch.save raises when the disk refuses."""
    return not isinstance(error, RuntimeError) or "inline_container" in str(error) or "StreamWriter" in str(error)


def _is_whole(directory: Path) -> bool:
    try:
        return read_json(directory / MARK_NAME) == _hashes(directory)
    except (OSError, ValueError):
        return False


def _hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARK_NAME)
    return {path.relative_to(directory).as_posix(): hash_file(path) for path in files}
