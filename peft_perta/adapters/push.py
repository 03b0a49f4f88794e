"""An emitted adapter on the Hugging Face Hub: private, and nothing of others replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..data import note
from ..errors import AdapterError, ConfigError, OutputError, PerTAError
from ..model import CONFIG_NAME, PROVENANCE_NAME, WEIGHTS_NAME
from .emitted import STRENGTH_NAME, load_provenance
from .model_card import is_on_hub
from .verify import verify_adapter

_PUSHED = (CONFIG_NAME, WEIGHTS_NAME, PROVENANCE_NAME, STRENGTH_NAME, "README.md")  # a report may quote rows
_HUBS_OWN = (".gitattributes",)


def push_adapter(directory: str | Path, name: str, *, public: bool = False) -> str:
    """Upload an adapter's files; its report, which may quote rows, stays.

    The token is the one that ``hf auth login`` stored, or that the environment variable HF_TOKEN holds; it is read by
    huggingface_hub and written nowhere.

    Args:
        directory: an adapter that a function or command of this package wrote. A forget adapter, which knows what must
            go, is none.
        name: ``ORG/NAME`` on the Hub. A new repository is made; in one that is there, the adapter that this package
            uploaded earlier is replaced, and stays in its history.
        public: everyone may read it.

    Returns:
        The address of the repository.

    Raises:
        AdapterError: the directory holds no adapter of this package, or its files are not as they were written.
        ConfigError: ``name`` is no ``ORG/NAME``.
        OutputError: the Hub refuses, the repository holds files of others, or it is public, which ``public`` does not
            allow.
    """
    files = _files_of(Path(directory))
    _check_name(name)
    api = HfApi()
    with _told(name):
        there = _check_repository(api, name, public=public)
        if there is None:
            api.create_repo(name, private=not public)
        stale = [CommitOperationDelete(file) for file in _PUSHED if file in (there or ()) and file not in files]
        added = [CommitOperationAdd(file, str(path)) for file, path in files.items()]
        api.create_commit(name, [*added, *stale], commit_message="Upload an unlearning adapter made with peft_perta")
    return f"{api.endpoint}/{name}"


def _files_of(directory: Path) -> dict[str, Path]:
    """Name -> path of what is uploaded."""
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory, expected one that a command of peft-perta wrote")
    provenance, _ = load_provenance(directory)
    failed = [check for check in verify_adapter(directory) if check.failed]
    if failed:
        raise AdapterError(f"{directory} is not uploaded: {failed[0]}; `peft-perta verify {directory}` says more")
    if not is_on_hub(provenance.base_name):
        note(
            f"the card names the base model {provenance.base_name}, which is no name on the Hub: others cannot load it"
        )
    return {name: directory / name for name in _PUSHED if (directory / name).is_file()}


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
        valid = "/" in name
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"expected ORG/NAME, a name on the Hugging Face Hub, found {name!r}")


def _check_repository(api: HfApi, name: str, *, public: bool) -> list[str] | None:
    """The files of a repository that may be written; None if there is none of that name."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        return None
    files = [sibling.rfilename for sibling in found.siblings or []]
    if not found.private and not public:
        raise OutputError(
            f"{name} is public on the Hub, expected a private repository; choose another name, or say that it may be "
            "public (--public)"
        )
    if PROVENANCE_NAME not in files and not set(files) <= set(_HUBS_OWN):
        raise OutputError(
            f"{name} holds files on the Hub that were not written by peft_perta (no {PROVENANCE_NAME}); choose another "
            "name"
        )
    return files


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except PerTAError:
        raise
    except Exception as error:  # huggingface_hub and its HTTP client raise errors of many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OutputError(
            f"{name} could not be uploaded ({reason}); log in with `hf auth login` or set HF_TOKEN to a token that may "
            "write there, and check the name and the network"
        ) from error
