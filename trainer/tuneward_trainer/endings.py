"""The ways a training ends other than well, each with its reason and exit code in the words of the contract."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tuneward_api.conditions import Reason
from tuneward_api.names import MAX_MESSAGE, ExitCode
from tuneward_trainer.model import ModelUnsupportedError

FAILED = 1
"""Exit code of failures that have no own one; the result's reason says which it was."""


@dataclass(frozen=True)
class Ending:
    """How a rank failed. `secondary`: it only noticed that another one had."""

    reason: Reason
    message: str
    exit_code: int
    secondary: bool = False


class EndingError(Exception):
    """Raise to end the training with this reason; the text is for people and says what to change."""

    reason = Reason.UNKNOWN
    exit_code: int = FAILED
    secondary = False


class InputMissingError(EndingError):
    reason, exit_code = Reason.INPUT_MISSING, ExitCode.INPUT_MISSING


class ConfigBadError(EndingError):
    reason, exit_code = Reason.CONFIG_INVALID, ExitCode.CONFIG_BAD


class DivergedError(EndingError):
    reason = Reason.NUMERICAL_DIVERGENCE


class FencedError(EndingError):
    """A later attempt has begun."""

    reason, exit_code, secondary = Reason.INFRASTRUCTURE, ExitCode.TRY_AGAIN, True


class TryAgainError(EndingError):
    reason, exit_code = Reason.INFRASTRUCTURE, ExitCode.TRY_AGAIN


_PEER_LOST = re.compile(
    r"connection (closed|reset|refused)|connection was (closed|reset)|broken pipe|socket|gloo|nccl|timed out|TCPStore",
    re.IGNORECASE,
)
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


def classify(error: BaseException, remedy: Callable[[], str]) -> Ending:
    """Of any exception that ends a rank. `remedy` says what to lower where memory ran out."""
    text = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    if isinstance(error, EndingError):
        return Ending(error.reason, str(error)[:MAX_MESSAGE], int(error.exit_code), error.secondary)
    if isinstance(error, ModelUnsupportedError):
        return Ending(Reason.MODEL_UNSUPPORTED, str(error)[:MAX_MESSAGE], ExitCode.CONFIG_BAD)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        return Ending(
            Reason.OUT_OF_MEMORY,
            f"not enough memory; {remedy()}: {text}"[:MAX_MESSAGE],
            FAILED,
        )
    if found := _NOT_DETERMINISTIC.search(text):
        return Ending(
            Reason.CONFIG_INVALID,
            f"spec.hyperparameters.deterministic: {found[1]}, which this model needs, has no deterministic kernel here; "
            "leave the field out",
            ExitCode.CONFIG_BAD,
        )
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and _PEER_LOST.search(text)):
        return Ending(Reason.INFRASTRUCTURE, f"another rank went away: {text}"[:MAX_MESSAGE], ExitCode.TRY_AGAIN, True)
    if isinstance(error, OSError):
        return Ending(Reason.INFRASTRUCTURE, _disk(error)[:MAX_MESSAGE], ExitCode.TRY_AGAIN)
    return Ending(Reason.USER_CODE, text, FAILED)


def _disk(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the store is full; free some of it or enlarge the claim: {error}"
    return f"the store could not be read or written: {error}"
