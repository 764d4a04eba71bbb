"""How a process ends: one report, as the termination message, in the run directory, and as the exit code.

Every way to fail is an EndError with the sentence that a person reads in `status`; `ending` turns whatever else is
raised into one too, so that no pod ends without a word.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from tuneward_api import names
from tuneward_api.conditions import Reason
from tuneward_api.files import Report, canonical_json, termination_message
from tuneward_api.manifest import write_synced
from tuneward_api.names import MAX_MESSAGE, ExitCode

log = logging.getLogger(__name__)
T = TypeVar("T")

REPORT: Final = "report.json"
CRASHED: Final = 1
"""Exit code for what we did not foresee; the log holds the traceback."""


class EndError(Exception):
    """The process ends here. `message` says what happened and what to do."""

    def __init__(self, code: int, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def input_missing(message: str) -> EndError:
    return EndError(ExitCode.INPUT_MISSING, Reason.INPUT_MISSING, message)


def config_bad(message: str) -> EndError:
    return EndError(ExitCode.CONFIG_BAD, Reason.CONFIG_INVALID, message)


def model_unsupported(message: str) -> EndError:
    return EndError(ExitCode.CONFIG_BAD, Reason.MODEL_UNSUPPORTED, message)


def try_again(message: str) -> EndError:
    return EndError(ExitCode.TRY_AGAIN, Reason.INFRASTRUCTURE, message)


def ending(work: Callable[[], T]) -> tuple[T | None, EndError | None]:
    """Runs `work`; gives what it gave, or why there is nothing."""
    try:
        return work(), None
    except EndError as error:
        return None, error
    except OSError as error:
        log.exception("input or output failed")
        return None, _of_os_error(error)
    except Exception as error:  # the last handler of a process: no pod ends without a sentence
        log.exception("an unforeseen error")
        return None, EndError(CRASHED, Reason.UNKNOWN, f"{type(error).__name__}: {error}")


def _of_os_error(error: OSError) -> EndError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return not_writable(Path(str(error.filename)), error)
    if isinstance(error, ChildProcessError):
        # Of the processes that tokenize, with its own remedy: no volume is at fault.
        return try_again(str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return try_again(f"the store is full ({error}); remove folders of old jobs below jobs/, or enlarge the claim")
    return try_again(f"{error}; if it happens again, the volume or the node needs a look")


def not_writable(path: Path, error: OSError) -> EndError:
    """Owner, mode and the command that repairs them."""
    found = path if path.exists() else path.parent
    try:
        status = found.stat()
        facts = f"owner {status.st_uid}:{status.st_gid}, mode {status.st_mode & 0o7777:04o}"
    except OSError:
        facts = "owner unknown"
    return EndError(
        ExitCode.CONFIG_BAD,
        Reason.STORE_NOT_WRITABLE,
        f"the store cannot be written by {os.geteuid()}:{os.getegid()}: {found} has {facts} ({error.strerror}); "
        f"run once, as root and where the volume is mounted: chown -R {os.geteuid()}:{os.getegid()} {found}",
    )


def emit(report: Report, folder: Path | None, *, code: int) -> int:
    """Writes the report wherever it can be written, says its message, and returns `code`."""
    if folder is not None and folder.is_dir():
        try:
            write_synced(folder / REPORT, canonical_json(report.to_json()).encode() + b"\n")
        except OSError as error:
            log.warning("%s was not written: %s", folder / REPORT, error)
    _tell_kubelet(termination_message(report))
    sys.stdout.write(report.message + "\n")
    sys.stdout.flush()
    return code


def _tell_kubelet(text: str) -> None:
    """The file is there in a pod; on a workstation nobody made it."""
    path = Path(os.environ.get(names.ENV_TERMINATION_LOG, names.DEFAULT_TERMINATION_LOG))
    if names.ENV_TERMINATION_LOG not in os.environ and not path.exists():
        return
    try:
        path.write_text(text)
    except OSError as error:
        log.warning("%s was not written: %s", path, error)


def start_logging() -> None:
    """Lines for people, with UTC times, on stderr."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )
    for chatty in ("httpx", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
