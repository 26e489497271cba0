"""The Hugging Face hub: models fetched by name and uploaded. Weights, settings and the card; never code or pickle."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ddad import __version__
from ddad.errors import ConfigError, ModelError

_OF_A_MODEL = (
    "detector.json",
    "README.md",
    "statistics.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "features/config.json",
    "features/model.safetensors",
)
FILES = (*_OF_A_MODEL, *(f"fast/{file}" for file in _OF_A_MODEL))
"""All that is fetched of a repository, whatever else is in it, and all that is uploaded."""
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")
_TIMEOUT = 3.0


def parse_name(model: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """What is to be fetched, as (`owner/name`, revision); None where `model` is a place on this machine.

    Args:
        model: a folder, which comes first, or `owner/name`, or `owner/name@revision`.
        revision: a branch, a tag or a commit.

    Raises:
        ConfigError: two revisions, or one of a folder.
    """
    match = None if Path(model).exists() else _NAME.fullmatch(str(model))
    if revision and (match is None or match[2]):
        raise ConfigError(
            f"Expected a model as owner/name on the hub to take revision {revision} of, found {model}; "
            "leave the revision out, or correct the name."
        )
    return None if match is None else (match[1], revision or match[2])


def model_name(folder: Path) -> str:
    """What people call a model: the name of its folder, or of its repository where that is in the hub's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def download(name: str, revision: str | None = None) -> Path:
    """The folder, in the hub's cache, of the model `owner/name`; fetched where it is not there yet.

    Raises:
        ModelError: it cannot be had, or is no model of ddad; in one sentence, and at once where there is no network.
    """
    from huggingface_hub import snapshot_download

    place = f"{name}{f' at revision {revision}' if revision else ''}"
    with fail_fast():
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), **_signature()))
        except Exception as error:  # the hub's, the network's and the cache's errors share no base class
            raise ModelError(
                f"Expected a model folder, or a model on the hub, found neither at {place} ({_why(error)}); correct "
                "the name."
            ) from None
    if not (folder / "detector.json").is_file():
        raise ModelError(f"Expected a model of ddad on the hub, found no detector.json in {place}; name another one.")
    return folder


def upload(
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Put `files` into the repository `owner/name`, in one commit, in place of the files of an older model.

    Args:
        files: by their place in the repository, which is one of `FILES`.
        private: for a repository that is not there yet.
        revision: a branch, made where it is not there yet; the main one by default.

    Returns:
        The hash of the commit.

    Raises:
        ConfigError: it cannot be written.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, **_signature())
    with fail_fast():
        try:
            api.create_repo(name, private=private, exist_ok=True)
            if revision:
                api.create_branch(name, branch=revision, exist_ok=True)
            old = set(api.list_repo_files(name, revision=revision)).intersection(FILES) - files.keys()
            added = [CommitOperationAdd(place, file) for place, file in files.items()]
            # Not `upload_folder`, which makes several commits of large folders: no revision may hold half a model.
            commit = api.create_commit(
                name,
                [*added, *map(CommitOperationDelete, sorted(old))],
                commit_message=message or "Upload a model of ddad",
                revision=revision,
            )
        except Exception as error:
            raise ConfigError(
                f"Expected to write to {name} on the hub, found that it cannot be done ({_why(error)}); log in with "
                "`hf auth login`, or set HF_TOKEN, as somebody who may."
            ) from None
    return commit.oid


def _signature() -> dict[str, str]:
    return {"library_name": "ddad", "library_version": __version__}


def _why(error: Exception) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RepositoryNotFoundError):
        return "the hub shows none of that name; a private one takes a login, `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub cannot be reached, and it was not fetched before"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub cannot be reached"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the hub answers {error.response.status_code}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def fail_fast() -> Iterator[None]:
    """Without a network the hub's client retries for half a minute; look once, and stay offline if nobody answers."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not offline and not _reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable() -> bool:
    from huggingface_hub import constants

    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy resolves the name: only trying tells
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=_TIMEOUT).close()
    except OSError:
        return False
    return True
