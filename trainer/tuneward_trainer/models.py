"""Finds the base model that an address names: in place on a volume, or fetched once from a hub into the store.

A model's key is known before its download (a commit, or a folder's listing), so nothing is ever renamed, and a folder
is complete when its MANIFEST.json, written last, says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuneward_api import manifest
from tuneward_api.uris import Uri, parse_uri
from tuneward_trainer.report import config_bad, input_missing, model_unsupported, try_again
from tuneward_trainer.store import Places, alone, make_directory

log = logging.getLogger(__name__)

SOURCE: Final = "source.json"
"""Beside a model: what its key stands for. For one read in place, the digest too, which takes minutes to compute."""
_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")
_WANTED: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
_UNWANTED: Final = ("original/*", "consolidated*", "*/*", "training_args*")
"""Second copies of the weights in their makers' own format, and subfolders of other formats."""


@dataclass(frozen=True)
class Found:
    """`folder` is where this process reads it; `claim` and `sub_path` where every other pod mounts it; `cache` is the
    folder in the store that holds what was found out about it."""

    folder: Path
    cache: Path
    uri: str
    key: str
    digest: str
    claim: str
    sub_path: str


def find(uri: str, *, places: Places, store_claim: str, pins: Path | None = None) -> Found:
    """`pins`: a file that keeps the commit an address stood for, so that the same job never sees another one.

    Raises EndError: InputMissing, ModelUnsupported, or Infrastructure where a hub cannot be reached.
    """
    parsed = parse_uri(uri)
    if parsed.scheme == "hf":
        return _hub(parsed, places, store_claim, pins)
    return _in_place(parsed, places, store_claim)


def _in_place(uri: Uri, places: Places, store_claim: str) -> Found:
    root = places.claim(uri.authority, store_claim)
    folder = root / uri.path
    if not folder.resolve().is_relative_to(root.resolve()):
        raise config_bad(f"spec.model.uri {uri} leads out of its claim; name a folder inside it")
    if not (folder / "config.json").is_file():
        seen = "holds no config.json" if folder.is_dir() else "does not exist"
        raise input_missing(
            f"the folder of spec.model.uri {uri} {seen}; it must hold config.json, tokenizer and safetensors"
        )
    _check_weights(folder, str(uri))
    key = _key(str(uri), *_listing(folder))
    cache = make_directory(places.store / "models" / key)
    digest = _digest_in_place(folder, cache, str(uri))
    return Found(folder, cache, str(uri), key, digest, uri.authority, uri.path.strip("/"))


def _digest_in_place(folder: Path, cache: Path, uri: str) -> str:
    """From the folder's manifest if it has one, else computed once for each state of the folder."""
    if manifest.complete(folder):
        return manifest.read_manifest(folder)[0]
    try:
        return str(json.loads((cache / SOURCE).read_text())["digest"])
    except (OSError, ValueError, KeyError):
        log.info("computing the digest of %s", folder)
        digest = manifest.digest_of(manifest.scan(folder))
        manifest.write_synced(cache / SOURCE, json.dumps({"uri": uri, "digest": digest}).encode())
        return digest


def _listing(folder: Path) -> list[str]:
    """One line a file: path, size, time of its last change."""
    lines = []
    for path in manifest.list_files(folder):
        status = (folder / path).stat()
        lines.append(f"{path}\t{status.st_size}\t{status.st_mtime_ns}")
    return lines


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _check_weights(folder: Path, uri: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise model_unsupported(f"{uri} holds no .safetensors file; other weight formats can run code and are not read")


def _hub(uri: Uri, places: Places, store_claim: str, pins: Path | None) -> Found:
    repository = f"{uri.authority}/{uri.path}"
    commit = _commit(repository, uri, pins)
    pinned = f"hf://{repository}@{commit}"
    key = _key(pinned)
    folder = places.store / "models" / key
    with alone(folder):
        if not manifest.complete(folder):
            make_directory(folder)
            _download(repository, commit, folder)
            _check_weights(folder, pinned)
            manifest.write_synced(folder / SOURCE, json.dumps({"uri": pinned}).encode())
            manifest.write_manifest(folder)
    return Found(folder, folder, pinned, key, manifest.read_manifest(folder)[0], store_claim, f"models/{key}")


def _commit(repository: str, uri: Uri, pins: Path | None) -> str:
    """The commit of a branch or tag, asked once for each job."""
    if uri.revision and _COMMIT.match(uri.revision):
        return uri.revision
    known = _read_pins(pins)
    if str(uri) not in known:
        known[str(uri)] = _ask_commit(repository, uri.revision)
        if pins is not None:
            manifest.write_synced(pins, json.dumps(known).encode())
    return known[str(uri)]


def _read_pins(pins: Path | None) -> dict[str, str]:
    if pins is None or not pins.is_file():
        return {}
    content: dict[str, str] = json.loads(pins.read_text())
    return content


def _ask_commit(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    with _in_words(repository, revision):
        commit = HfApi().model_info(repository, revision=revision, timeout=30).sha
    return str(commit)


def _download(repository: str, commit: str, folder: Path) -> None:
    """Goes on where a killed download ended."""
    from huggingface_hub import snapshot_download

    log.info("fetching %s at %s", repository, commit[:12])
    with _in_words(repository, commit):
        snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in manifest.list_files(folder):
        (folder / path).chmod(0o644)


@contextmanager
def _in_words(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into the sentence and the exit code that it means."""
    import httpx
    from huggingface_hub import errors

    what = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise input_missing(
            f"{what} is gated: accept its terms on the hub, and name a Secret with the key token in spec.model.secretRef"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise input_missing(f"{what} has no such revision; name a branch, tag or commit that exists") from error
    except errors.RepositoryNotFoundError as error:
        raise input_missing(
            f"{what} does not exist, or is private: check the name, or name a Secret with the key token "
            "in spec.model.secretRef"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise input_missing(
                f"the hub refused the token ({status}) for {what}; renew the Secret of spec.model.secretRef"
            ) from error
        raise try_again(f"the hub answered {status or 'with an error'} for {what}; trying again may help") from error
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx.TransportError) as error:
        raise try_again(
            f"the hub cannot be reached for {what} ({type(error).__name__}); check the network of the prepare pod, "
            "or bring the model in with `tuneward import` and name it by pvc://"
        ) from error
