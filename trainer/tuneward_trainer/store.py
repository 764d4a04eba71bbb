"""The store: its directories, and who may write one of them at a time."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuneward_api import names
from tuneward_trainer.report import input_missing, not_writable, try_again
from tuneward_trainer.supervise import tell

log = logging.getLogger(__name__)

DIRECTORY_MODE: Final = 0o2775
"""All our pods of a namespace share a group; the set-group-id bit hands it down."""
HEARTBEAT_SECONDS: Final = 10.0
STALE_SECONDS: Final = 60.0
"""A lock that has not changed while it was watched for so long belongs to a dead process."""


@dataclass(frozen=True)
class Places:
    """The folders that a pod has mounted; a workstation sets the environment variables."""

    store: Path
    claims: Path
    configmaps: Path

    @classmethod
    def from_environment(cls) -> Places:
        found = {name: Path(os.environ.get(name, default)) for name, default in names.DEFAULT_DIRS.items()}
        return cls(found[names.ENV_STORE_DIR], found[names.ENV_CLAIMS_DIR], found[names.ENV_CONFIGMAPS_DIR])

    def root(self) -> Path:
        """Of the store. Raises EndError if it is not mounted: a folder made in its place would be lost."""
        if not self.store.is_dir():
            raise input_missing(f"the store is not mounted at {self.store}")
        return self.store

    def claim(self, name: str, store_claim: str) -> Path:
        """Root of a claim. Raises EndError if it is not mounted."""
        root = self.store if name == store_claim else self.claims / name
        if not root.is_dir():
            raise input_missing(f"the claim {name} is not mounted at {root}; does the PersistentVolumeClaim exist?")
        return root


def make_directory(path: Path) -> Path:
    """Makes the folder and its parents with our mode. Raises EndError (StoreNotWritable)."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            folder.chmod(DIRECTORY_MODE)
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(13, "Permission denied", str(path))
    except PermissionError as error:
        raise not_writable(Path(str(error.filename)), error) from error
    except FileNotFoundError as error:
        raise input_missing(f"the store is not mounted at {path}") from error
    except OSError as error:
        raise not_writable(path, error) from error
    return path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, over pods and nodes: an exclusive file beside `folder` whose content changes as long as
    its owner lives. Locks of the kernel do not reach over every network file system, and clocks differ: so staleness
    is what this process has seen itself."""
    lock = folder.with_name(f".{folder.name}.lock")
    make_directory(lock.parent)
    token = uuid.uuid4().hex
    _take(lock, token)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, token, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _content(lock).startswith(token):
            lock.unlink(missing_ok=True)


def _take(lock: Path, token: str) -> None:
    seen, since, said = "", time.monotonic(), 0.0
    while True:
        try:
            with lock.open("x") as file:
                file.write(_line(token, 0))
            return
        except FileExistsError:
            content = _content(lock)
        if content != seen:
            seen, since = content, time.monotonic()
            tell()
        if time.monotonic() - since > STALE_SECONDS:
            log.info("the owner of %s is gone; going on", lock)
            _break(lock, content)
            continue
        if time.monotonic() - said > HEARTBEAT_SECONDS:
            said = time.monotonic()
            log.info("waiting for another process that works in %s", lock.parent)
        time.sleep(0.2)


def _break(lock: Path, content: str) -> None:
    """Renaming succeeds for one of several that find the same lock stale."""
    grave = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        lock.rename(grave)
        if _content(grave) != content:  # another one was faster, and this is its fresh lock
            raise try_again(f"two processes took {lock} at once")
        grave.unlink()


def _content(lock: Path) -> str:
    try:
        return lock.read_text()
    except FileNotFoundError:
        return ""


def _beat(lock: Path, token: str, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        count += 1
        # A store that is full, or away for a moment, must not let others think that we are dead.
        with suppress(OSError):
            if not _content(lock).startswith(token):
                return
            with lock.open("r+") as file:
                file.write(_line(token, count))


def _line(token: str, count: int) -> str:
    """Of one length, so that a beat is written in place and needs no room."""
    return f"{token} {count:08d}"
