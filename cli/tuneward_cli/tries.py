"""How often a job is tried again: prepare, its gangs and finish draw on one budget for each class of failure, as on a
cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tuneward_api.conditions import FailureClass, Phase
from tuneward_api.failures import DEFAULT_RETRIES, Failure
from tuneward_api.finetunejob import RunPolicy
from tuneward_cli.errors import CommandError
from tuneward_cli.voice import Voice
from tuneward_cli.words import phase_line

T = TypeVar("T")
_LONGEST_WAIT = 30.0


class HelperError(CommandError):
    """prepare or finish failed, in a way that may go by."""

    def __init__(self, sentence: str, *, paste: str, code: int, failure: Failure) -> None:
        super().__init__(sentence, paste=paste, code=code)
        self.failure = failure


def budget(policy: RunPolicy | None) -> dict[FailureClass, int]:
    """Retries for each class of failure: the spec's, else the table's."""
    asked = policy.retries.to_json() if policy and policy.retries else {}
    return {known: int(asked.get(known[0].lower() + known[1:], count)) for known, count in DEFAULT_RETRIES.items()}


@dataclass
class Tries:
    """Of one job."""

    job: str
    left: dict[FailureClass, int]
    voice: Voice
    wait: Callable[[float], None] = time.sleep
    spent: Counter[FailureClass] = field(default_factory=Counter)

    def again(self, failure: Failure, phase: Phase = Phase.RECOVERING) -> bool:
        """Whether it may be tried again; if so, says it and waits a while."""
        kind = failure.failure_class
        self.spent[kind] += 1
        if self.spent[kind] > self.left[kind]:
            return False
        self.voice.line(phase_line(self.job, phase, f"{failure.sentence} (try {self.spent[kind]} of {self.left[kind]})"))
        self.wait(min(_LONGEST_WAIT, 2.0 ** (self.spent[kind] - 1)))
        return True

    def until_done(self, work: Callable[[], T], phase: Phase = Phase.RECOVERING) -> T:
        """What prepare or finish gives at last. Raises HelperError where nothing is left."""
        while True:
            try:
                return work()
            except HelperError as error:
                if not self.again(error.failure, phase):
                    raise
