"""Imports the operator once and forks a process for each start: imports are nine tenths of what a start costs.

Reads one JSON array of arguments and log path a line, answers with the pid. What it forks are whole processes, to be
killed for real.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys

from tuneward_operator.main import run
from tuneward_operator.settings import parse_command


def main() -> None:
    # Nobody waits for the killed: the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    for line in sys.stdin:
        arguments, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_operator(arguments, log)
        print(pid, flush=True)


def _become_operator(arguments: list[str], log: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    try:
        run(parse_command(arguments))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
