"""Finds the base model that an address names: in place on a volume, or fetched once from a hub into the store.

A model's key is known before its download (a commit, or a folder's listing), so nothing is ever renamed, and a folder
is complete when its MANIFEST.json, written last, says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuneward_api import manifest
from tuneward_api.uris import Uri, parse_uri
from tuneward_trainer.report import config_bad, input_missing, model_unsupported
from tuneward_trainer.store import Places, alone, make_directory

log = logging.getLogger(__name__)

SOURCE: Final = "source.json"
"""In the store, of a model that is read in place: its digest, which takes minutes to compute."""
_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")


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
    if (folder / manifest.MANIFEST).exists() and not manifest.complete(folder):
        raise input_missing(f"{uri} is not complete: files of its {manifest.MANIFEST} are missing or cut; import it again")
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
    from tuneward_trainer import hub

    repository = f"{uri.authority}/{uri.path}"
    commit = _commit(repository, uri, pins)
    pinned = f"hf://{repository}@{commit}"
    key = _key(pinned)
    folder = places.root() / "models" / key
    with alone(folder):
        if not manifest.complete(folder):
            make_directory(folder)
            entries = hub.download(repository, commit, folder)
            _check_weights(folder, pinned)
            manifest.write_manifest(folder, entries)
    return Found(folder, folder, pinned, key, manifest.read_manifest(folder)[0], store_claim, f"models/{key}")


def _commit(repository: str, uri: Uri, pins: Path | None) -> str:
    """The commit of a branch or tag, asked once for each job."""
    if uri.revision and _COMMIT.match(uri.revision):
        return uri.revision
    from tuneward_trainer import hub

    known = _read_pins(pins)
    if str(uri) not in known:
        known[str(uri)] = hub.commit_of(repository, uri.revision)
        if pins is not None:
            manifest.write_synced(pins, json.dumps(known).encode())
    return known[str(uri)]


def _read_pins(pins: Path | None) -> dict[str, str]:
    if pins is None or not pins.is_file():
        return {}
    content: dict[str, str] = json.loads(pins.read_text())
    return content
