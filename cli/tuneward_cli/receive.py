"""The far end of `tuneward import`, inside a pod: a tar stream on stdin becomes a finished folder of the store.

Imports the contract alone, so that it starts in any image of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from tuneward_api import manifest

_CHUNK = 1 << 20


def unpack(stream: IO[bytes], folder: Path, digest: str) -> None:
    """Writes every file of the stream below `folder`, its manifest last.

    Raises ManifestError, and leaves the folder without a manifest, when what came is not what was promised.
    """
    os.umask(0o002)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    entries = []
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                entries.append(write_file(content, folder, member.name))
    complete(folder, entries, digest)


def complete(folder: Path, entries: list[manifest.Entry], digest: str) -> None:
    """Raises ManifestError unless just what was promised was written. What another model left here goes: a tokenizer or
    weights of it would be read beside this one's."""
    found = manifest.digest_of(entries)
    if found != digest:
        raise manifest.ManifestError(f"received {found}, expected {digest}")
    for stray in set(manifest.list_files(folder)) - {entry.path for entry in entries}:
        (folder / stray).unlink()
    manifest.write_manifest(folder, entries)


def write_file(content: IO[bytes], folder: Path, name: str) -> manifest.Entry:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise manifest.ManifestError(f"{name} lies outside the folder")
    target, digest, size = folder / relative, hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    # A file of another user, left by an import that failed, can be replaced but not written.
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        while chunk := content.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    target.chmod(0o644)
    return manifest.Entry(relative.as_posix(), size, digest.hexdigest())


def held(folder: Path) -> str:
    """Digest of the finished folder; empty when there is none."""
    return manifest.read_manifest(folder)[0] if manifest.complete(folder) else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """`wait` keeps a pod alive; `held DIR` and `unpack DIR DIGEST` answer with one JSON."""
    parser = argparse.ArgumentParser(prog="python -m tuneward_cli.receive", description=__doc__)
    parser.add_argument("action", choices=("wait", "held", "unpack"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("digest", nargs="?", default="")
    parsed = parser.parse_args(arguments)
    if parsed.action == "wait":
        while True:
            time.sleep(3600)
    answer = {"digest": "", "error": ""}
    try:
        if parsed.action == "unpack":
            unpack(sys.stdin.buffer, parsed.folder, parsed.digest)
        answer["digest"] = held(parsed.folder)
    except (manifest.ManifestError, tarfile.TarError, OSError) as error:
        answer["error"] = str(error)
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1 if answer["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
