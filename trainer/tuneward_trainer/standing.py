"""Ends a gang that stands still where it makes no steps: while it loads, evaluates or saves.

Steps are looked at from outside, and may not take longer than runPolicy.hangTimeoutSeconds. Loading and evaluating may take
any time, as long as something goes on: what counts is time on a processor, of the ranks and of all that they started, as
for prepare (`supervise.py`). Of the ranks of one worker all stand still where one does, since the others wait for it
without work. Where there are several workers one of them may rightly wait for another, so none is judged.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tuneward_api.conditions import Reason
from tuneward_api.names import DEFAULT_HANG_SECONDS, ExitCode
from tuneward_trainer.progress import read_ranks, stacks
from tuneward_trainer.supervise import LEAST_SHARE, LOOK_SECONDS, family, moved

DOES: Final = {"Loading": "loaded", "Evaluating": "evaluated", "Saving": "saved"}
_CONCLUDE_SECONDS: Final = 60.0
"""For logs and a result, which lie on the volume that may have stopped answering."""

logger = logging.getLogger("tuneward_trainer.launch")


@contextmanager
def watched(folder: Path, ranks: int, seconds: float | None, give_up: Callable[[str], object]) -> Iterator[None]:
    """Kills the `ranks` that leave their progress in `folder` once they stood still for `seconds`, and leaves word of it
    there. Where the block has not ended a minute later, `give_up` gets the sentence."""
    ended = threading.Event()
    arguments = (folder, ranks, seconds or DEFAULT_HANG_SECONDS, ended, give_up)
    threading.Thread(target=_watch, args=arguments, name="standing", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(folder: Path, ranks: int, seconds: float, ended: threading.Event, give_up: Callable[[str], object]) -> None:
    before, since = None, time.monotonic()
    while not ended.wait(min(LOOK_SECONDS, seconds / 10)):
        found = read_ranks(folder)
        now = _work_of(found) if len(found) == ranks else None
        if now is None or before is None or moved(before, now, LEAST_SHARE * seconds):
            before, since = now, time.monotonic()
        elif time.monotonic() - since >= seconds:
            sentence = _end(folder, found, seconds)
            if not ended.wait(_CONCLUDE_SECONDS):
                give_up(sentence)
            return


def _work_of(ranks: list[dict[str, Any]]) -> tuple[float, bytes] | None:
    """Seconds on processors, and what the ranks are at; None where they are not to be judged."""
    places = [(rank.get("phase"), rank.get("attempt"), rank.get("step")) for rank in ranks]
    families = [family(int(rank["pid"])) for rank in ranks]
    if not all(families) or any(phase not in DOES for phase, *_ in places):
        return None
    return sum(sum(one.values()) for one in families), json.dumps(places).encode()


def _end(folder: Path, ranks: list[dict[str, Any]], seconds: float) -> str:
    does = DOES[ranks[0]["phase"]]
    sentence = (
        f"the ranks {does} and stood still for {seconds:g} s after step {ranks[0].get('step', 0)}; see whether the store's "
        "volume answers, and raise spec.runPolicy.hangTimeoutSeconds if it is only slow (the worker's log says where they "
        "stood)"
    )
    logger.error("%s\n%s", sentence, stacks(folder))
    ending = {"reason": Reason.HANG, "message": sentence, "exit_code": int(ExitCode.TRY_AGAIN), "secondary": False}
    (folder / "ending-0.json").write_text(json.dumps({**ending, "rank": 0, "at": time.time()}))
    # What a rank started is nobody's once it is gone.
    for pid in [pid for rank in ranks for pid in family(int(rank["pid"]))]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return sentence
