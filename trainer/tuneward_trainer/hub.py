"""Fetches a model from a Hugging Face hub, and says in one sentence why it could not.

The hub's library does the transfer and goes on where a killed one ended. Which files belong to the commit, and whether
they arrived whole, is checked here: some releases of the library call a half-fetched folder done when the hub is away.
"""

from __future__ import annotations

import fnmatch
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuneward_api import manifest
from tuneward_trainer.report import EndError, input_missing, try_again
from tuneward_trainer.supervise import tell

log = logging.getLogger(__name__)

_WANTED: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.md", "LICENSE*")
_UNWANTED: Final = ("*/*", "consolidated*", "training_args*")
"""Second copies of the weights in their makers' own formats, which are mostly kept in subfolders."""
_SAY_EVERY: Final = 10.0
_SECRET: Final = "a Secret with the key token in spec.model.secretRef"


@dataclass(frozen=True)
class Remote:
    """A file of a commit. `sha256` is known of large files only."""

    path: str
    size: int
    sha256: str | None


def commit_of(repository: str, revision: str | None) -> str:
    """What a branch or tag (None: the default branch) stands for now. Raises EndError."""
    from huggingface_hub import HfApi

    with _in_words(repository, revision):
        return str(HfApi().model_info(repository, revision=revision, timeout=30).sha)


def download(repository: str, commit: str, folder: Path) -> list[manifest.Entry]:
    """Fetches into `folder` and compares every file with what the hub says of it. Raises EndError."""
    from huggingface_hub import snapshot_download

    with _in_words(repository, commit):
        files = _listing(repository, commit)
        with _saying(repository, folder, sum(file.size for file in files)):
            snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=[file.path for file in files])
    entries = {entry.path: entry for entry in manifest.scan(folder)}
    for file in files:
        entry = entries.get(file.path)
        if entry is None or entry.size != file.size or file.sha256 not in (None, entry.sha256):
            (folder / file.path).unlink(missing_ok=True)
            raise try_again(f"{file.path} of hf://{repository} did not arrive whole; trying again may help")
        (folder / file.path).chmod(0o644)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return [entries[file.path] for file in files]


def _listing(repository: str, commit: str) -> list[Remote]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repository, revision=commit, recursive=False)
    found = [
        Remote(item.path, item.size, item.lfs.sha256 if item.lfs is not None else None)
        for item in tree
        if isinstance(item, RepoFile) and _wanted(item.path)
    ]
    if not any(file.path == "config.json" for file in found):
        raise input_missing(f"hf://{repository} holds no config.json; it is no model of transformers")
    return found


def _wanted(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, one) for one in _WANTED) and not any(
        fnmatch.fnmatchcase(path, one) for one in _UNWANTED
    )


@contextmanager
def _saying(repository: str, folder: Path, total: int) -> Iterator[None]:
    """A line every ten seconds: a wait without a word looks like a hang."""
    stop, start = threading.Event(), time.monotonic()
    log.info("fetching hf://%s: %.2f GB", repository, total / 1e9)

    def say() -> None:
        before = 0
        while not stop.wait(_SAY_EVERY):
            done = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if done != before:
                tell()
            before = done
            rate = done / (time.monotonic() - start)
            log.info("fetched %.2f of %.2f GB, %.1f MB/s", done / 1e9, total / 1e9, rate / 1e6)

    teller = threading.Thread(target=say, daemon=True)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()


@contextmanager
def _in_words(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into the sentence and the exit code that it means."""
    what = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        yield
    except EndError:
        raise
    except Exception as error:
        ending = _ending(what, error)
        if ending is None:
            raise
        raise ending from error


def _ending(what: str, error: Exception) -> EndError | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return input_missing(f"{what} is gated: accept its terms on the hub, and name {_SECRET}")
    if isinstance(error, errors.RevisionNotFoundError):
        return input_missing(f"{what} has no such revision; name a branch, tag or commit that exists")
    if isinstance(error, errors.RepositoryNotFoundError):
        return input_missing(f"{what} does not exist, or is private: check the name, or name {_SECRET}")
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            return input_missing(
                f"the hub refused the token ({status}) for {what}; renew the Secret of spec.model.secretRef"
            )
        return try_again(f"the hub answered {status or 'with an error'} for {what}; trying again may help")
    if _is_unreachable(error):
        return try_again(
            f"the hub cannot be reached for {what} ({type(error).__name__}); check the network of the prepare pod, "
            "or bring the model in with `tuneward import` and name it by pvc://"
        )
    return None


def _is_unreachable(error: Exception) -> bool:
    """By name: the library has changed its HTTP client between releases (requests, httpx, httpx2)."""
    lineage = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        lineage & {"TransportError", "ConnectionError", "TimeoutError", "LocalEntryNotFoundError", "IncompleteSnapshotError"}
    )
