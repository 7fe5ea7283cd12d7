"""Files of the Hugging Face hub, fetched and pushed through ``huggingface_hub``; imported on first use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..__about__ import __version__
from ..errors import FileFormatError, InputError, MissingDependencyError, first_line

__all__ = ["SOLVER", "check_repo", "fetched", "names_a_repo", "pushed"]

SOLVER = "solver.safetensors"
"""Name of the solver's file in a repository."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def names_a_repo(path: object) -> bool:
    """Whether a path is the name of a repository, "owner/name".

    A path is no such name if the path or a local folder "owner" exists, or if the path ends in ".safetensors".
    """
    if not isinstance(path, str) or not _REPO.fullmatch(path) or os.path.exists(path):
        return False
    return not path.endswith(".safetensors") and not os.path.isdir(path.partition("/")[0])


def check_repo(repo: object) -> str:
    """The name of a repository; InputError for any form but "owner/name"."""
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise InputError(f"a repository of the hub has a name such as 'owner/name', got {repo!r}.")
    return repo


def fetched(repo: str, file: str, revision: str | None) -> Path:
    """The local copy of a file of a repository, from the cache of ``huggingface_hub`` or from the hub.

    Raises
    ------
    MissingDependencyError : huggingface_hub is not installed.
    FileFormatError : the repository, the revision or the file does not exist, or the hub does not answer.
    """
    hub = _client(f"there is no local file {repo!r}, and loading from the hub")
    with _answers(f"{file!r} of {repo!r}{'' if revision is None else f' at revision {revision!r}'}"):
        return Path(
            hub.hf_hub_download(repo, file, revision=revision, library_name="iia_ode", library_version=__version__)
        )


def pushed(
    repo: str,
    files: Mapping[str, bytes],
    message: str,
    *,
    revision: str | None,
    private: bool | None,
    token: str | None,
) -> str:
    """Commit files to a repository, made where missing; return the address of the commit.

    Raises
    ------
    MissingDependencyError : huggingface_hub is not installed.
    FileFormatError : the hub refuses, or does not answer.
    """
    hub = _client("pushing to the hub")
    with _answers(f"a commit to {repo!r}"):
        api = hub.HfApi(token=token, library_name="iia_ode", library_version=__version__)
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(path_in_repo=k, path_or_fileobj=v) for k, v in files.items()]
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)


def _client(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs huggingface_hub: pip install 'iia-ode[hub]'.") from error
    return huggingface_hub


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Raise errors of the hub and of the network as a FileFormatError."""
    try:
        yield
    except MissingDependencyError:
        raise
    except Exception as error:  # of any kind: the client changed the library behind its errors more than once
        raise FileFormatError(f"the hub did not give {what}: {type(error).__name__}: {first_line(error)}") from error
