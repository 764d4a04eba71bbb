"""MANIFEST.json: which files a finished folder holds, written last, so that a folder is complete or is not there.

A folder's digest is sha256 over the sorted (path, size, sha256) list. Nothing depends on renaming folders,
which object-store mounts cannot do.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "MANIFEST.json"
_CHUNK = 1 << 22


class ManifestError(Exception):
    """A folder is not what its manifest says; the text names the file."""


@dataclass(frozen=True)
class Entry:
    path: str
    size: int
    sha256: str


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(entries: list[Entry]) -> str:
    """`sha256:<hex>` over the sorted entries."""
    lines = sorted(f"{entry.path}\t{entry.size}\t{entry.sha256}\n" for entry in entries)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files below `folder`, sorted, without the manifest and hidden files."""
    found = []
    for root, dirs, files in os.walk(folder):
        dirs[:] = sorted(name for name in dirs if not name.startswith("."))
        for name in files:
            relative = (Path(root) / name).relative_to(folder).as_posix()
            if relative != MANIFEST and not name.startswith("."):
                found.append(relative)
    return sorted(found)


def entry(folder: Path, path: str) -> Entry:
    """Reads the file `path` below `folder`."""
    return Entry(path, (folder / path).stat().st_size, hash_file(folder / path))


def scan(folder: Path) -> list[Entry]:
    """Reads every file: minutes for a large model."""
    return [entry(folder, path) for path in list_files(folder)]


def write_manifest(folder: Path, entries: list[Entry] | None = None) -> str:
    """Syncs every file, then writes the manifest. Returns the folder's digest."""
    entries = scan(folder) if entries is None else entries
    for entry in entries:
        _sync(folder / entry.path)
    for directory in sorted({(folder / entry.path).parent for entry in entries}):
        _sync(directory)
    digest = digest_of(entries)
    body = {
        "digest": digest,
        "files": [vars(entry) for entry in sorted(entries, key=lambda entry: entry.path)],
    }
    write_synced(folder / MANIFEST, json.dumps(body, indent=1).encode() + b"\n")
    # Its own name too: whoever sees the folder complete may remove an older one, and power may fail after that.
    _sync(folder.parent)
    return digest


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash it is old, absent or whole: a temporary sibling, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> tuple[str, list[Entry]]:
    """Digest and entries. Raises ManifestError if it is absent, unreadable, or disagrees with itself."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        entries = [Entry(str(item["path"]), int(item["size"]), str(item["sha256"])) for item in body["files"]]
        digest = str(body["digest"])
    except FileNotFoundError as error:
        raise ManifestError(f"{folder} holds no {MANIFEST}: it is not complete") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is not a manifest: {error}") from error
    if digest != digest_of(entries):
        raise ManifestError(f"{path} disagrees with its own digest")
    return digest, entries


def complete(folder: Path) -> bool:
    """Whether the folder is there with every file at its size; quick, reads no content."""
    try:
        _, entries = read_manifest(folder)
    except ManifestError:
        return False
    return all((folder / entry.path).is_file() and (folder / entry.path).stat().st_size == entry.size for entry in entries)


def verify(folder: Path, *, digest: str | None = None) -> str:
    """Reads every byte. Returns the digest; raises ManifestError naming the first file that differs."""
    found, entries = read_manifest(folder)
    if digest is not None and found != digest:
        raise ManifestError(f"{folder} has digest {found}, expected {digest}")
    for entry in entries:
        file = folder / entry.path
        if not file.is_file():
            raise ManifestError(f"{file} is missing")
        if file.stat().st_size != entry.size or hash_file(file) != entry.sha256:
            raise ManifestError(f"{file} was changed after it was finished")
    return found
