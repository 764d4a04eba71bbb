"""`python -m tuneward_operator run [flags]`."""

from __future__ import annotations

import sys

from tuneward_operator.main import run
from tuneward_operator.settings import parse_command

if __name__ == "__main__":
    run(parse_command(sys.argv[1:]))
